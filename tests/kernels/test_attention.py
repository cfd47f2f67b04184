"""Attention over the cache against loops in float64, against the plain version, and against what nobody may see."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cuda_backend.kernels.attention import (
    canvas_attention_kernel,
    canvas_attention_ops,
    chunk_attention_kernel,
    chunk_attention_ops,
)
from cuda_backend.kernels.attention_plan import splits_for, tile_for
from cuda_backend.kernels.cards import CARDS
from cuda_backend.kernels.launch import Config, recording
from tests.kernels.harness import CARD, in_every_order, relative_error

CARD = CARD
DTYPES = (torch.float32, torch.bfloat16)
POISON = 1e4
BOUND = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # of the largest value: two roundings of it to bfloat16
SMALL = Config({"ROWS": 16, "KEYS": 16, "COLUMNS": 16}, 4, 1)


@dataclass(frozen=True)
class Case:
    """A cache with ``before`` tokens per row (at most ``capacity`` slots of them), and queries behind it."""

    before: tuple[int, ...]
    length: int
    groups: int
    stacked: int
    dim: int
    capacity: int
    canvas: int
    window: int | None = None

    @property
    def heads(self) -> int:
        return self.groups * self.stacked


CANVAS = [
    Case((0,), 5, 1, 1, 16, 0, 5),
    Case((150, 0, 64), 37, 1, 2, 32, 160, 37),
    Case((33, 91), 11, 2, 8, 16, 91, 11),
    Case((79,), 10, 1, 2, 256, 100, 10),
    Case((40,), 9, 1, 8, 512, 64, 9),
]
CHUNK = [
    Case((0, 3), 1, 1, 1, 16, 3, 2),
    Case((70, 0), 45, 1, 2, 32, 80, 7),
    Case((17, 50), 11, 2, 8, 16, 50, 4),
    Case((0, 90), 70, 1, 2, 16, 22, 3, window=23),  # wrapped four times; the window is smaller than the chunk
    Case((11, 330, 63), 20, 2, 1, 32, 64, 5, window=65),  # and larger
    Case((20,), 20, 1, 2, 32, 24, 5, window=65),  # the ring has not grown to its size yet
    Case((1, 2), 9, 1, 1, 16, 1, 2, window=2),  # a ring of one slot
    Case((100,), 12, 1, 2, 256, 39, 6, window=40),
    Case((30,), 9, 1, 8, 512, 32, 9),
]


def random(case: Case, place: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, own k, own v, keys, values: the slots of the cache hold what nobody may see, until they are filled."""
    torch.manual_seed(case.length)
    rows, slots = len(case.before), case.canvas + case.capacity
    q = torch.randn(rows, case.length, case.heads, case.dim) * 3 / case.dim**0.5
    own = torch.randn(2, rows, case.length, case.groups, case.dim)
    keys, values = torch.full((2, rows, case.groups, slots, case.dim), POISON).to(place, dtype)
    return q.to(place, dtype), *own.to(place, dtype).transpose(2, 3), keys, values


def history_of(case: Case, keys: Tensor, values: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """Token after token goes to its slot. By row and position: the key and value [K, d]."""
    torch.manual_seed(1)
    history = []
    for row, count in enumerate(case.before):
        tokens = []
        for position in range(count):
            slot = case.canvas + (position if case.window is None else position % (case.window - 1))
            keys[row, :, slot] = torch.randn(case.groups, case.dim)
            values[row, :, slot] = torch.randn(case.groups, case.dim)
            tokens.append((keys[row, :, slot].clone(), values[row, :, slot].clone()))
        history.append(tokens)
    return history


def canvas_inputs(case: Case, place: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, keys, values and lengths, the canvas written, the prefix too, POISON behind it."""
    q, k, v, keys, values = random(case, place, dtype)
    history_of(case, keys, values)
    keys[:, :, : case.canvas], values[:, :, : case.canvas] = k, v
    return q, keys, values, torch.tensor(case.before, dtype=torch.int32, device=place)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query [d] over k, v [n, d], in float64."""
    return torch.softmax(k.double() @ q.double(), 0) @ v.double()


def canvas_truth(case: Case, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for row, count in enumerate(case.before):
        seen = case.canvas + count
        for token in range(case.length):
            for head in range(case.heads):
                k, v = (x[row, head // case.stacked, :seen] for x in (keys, values))
                out[row, token, head] = attended(q[row, token, head], k, v)
    return out.flatten(2)


def chunk_truth(case: Case, q: Tensor, own_k: Tensor, own_v: Tensor, history) -> Tensor:
    """By the definition: each query at its position over a list of every key ever, from the first it sees."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for row, count in enumerate(case.before):
        for head in range(case.heads):
            group = head // case.stacked
            k = torch.stack([k[group] for k, _ in history[row]] + list(own_k[row, group]))
            v = torch.stack([v[group] for _, v in history[row]] + list(own_v[row, group]))
            for token in range(case.length):
                position = count + token
                first = 0 if case.window is None else max(0, position - case.window + 1)
                seen = slice(first, position + 1)
                out[row, token, head] = attended(q[row, token, head], k[seen], v[seen])
    return out.flatten(2)


def chunk_inputs(case: Case, place: str, dtype: torch.dtype):
    """The arguments of ``chunk_attention``, and the history behind the cache."""
    q, own_k, own_v, keys, values = random(case, place, dtype)
    history = history_of(case, keys, values)
    before = torch.tensor(case.before, dtype=torch.int32, device=place)
    return (q, own_k, own_v, keys, values, before, case.window, case.canvas), history


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CANVAS, ids=str)
def test_canvas_sees_itself_and_the_prefix(case, dtype, place, proof):
    inputs = canvas_inputs(case, place, dtype)
    truth, plain = canvas_truth(case, *inputs[:3]), canvas_attention_ops(*inputs)
    assert relative_error(plain, truth) < BOUND[dtype]
    for splits in (None, 1):
        found = canvas_attention_kernel(*inputs, CARD, splits=splits)
        assert found.dtype == dtype
        assert max(relative_error(found, truth), relative_error(found, plain)) < BOUND[dtype]
    found = in_every_order(lambda: canvas_attention_kernel(*inputs, CARD, splits=5))
    assert relative_error(found, truth) < BOUND[dtype]
    proof("canvas_attention", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CHUNK, ids=str)
def test_chunk_is_causal_within_its_window(case, dtype, place, proof):
    inputs, history = chunk_inputs(case, place, dtype)
    truth, plain = chunk_truth(case, *inputs[:3], history), chunk_attention_ops(*inputs)
    assert relative_error(plain, truth) < BOUND[dtype]
    for splits in (None, 1):
        found = chunk_attention_kernel(*inputs, CARD, splits=splits)
        assert found.dtype == dtype
        assert max(relative_error(found, truth), relative_error(found, plain)) < BOUND[dtype]
    found = in_every_order(lambda: chunk_attention_kernel(*inputs, CARD, splits=5))
    assert relative_error(found, truth) < BOUND[dtype]
    proof("chunk_attention", dtype)


def test_every_tile_and_split_gives_the_same(place):
    """Tiles smaller than the chunk, the window, a head's columns; more splits than tiles, so that parts are empty."""
    canvas, chunk = Case((60, 5), 6, 1, 3, 32, 60, 6), Case((60, 5), 23, 1, 3, 32, 19, 4, window=20)
    seen = canvas_inputs(canvas, place, torch.float32)
    wanted = canvas_attention_ops(*seen)
    inputs, _ = chunk_inputs(chunk, place, torch.float32)
    causal = chunk_attention_ops(*inputs)
    for splits in (1, 2, 5, 9):
        found = canvas_attention_kernel(*seen, CARD, splits=splits, config=SMALL)
        assert relative_error(found, wanted) < 1e-5
        found = chunk_attention_kernel(*inputs, CARD, splits=splits, config=SMALL)
        assert relative_error(found, causal) < 1e-5


def test_own_keys_may_lie_token_by_token_and_queries_in_a_wider_buffer(place):
    case = Case((21,), 13, 2, 2, 16, 32, 4)
    (q, own_k, own_v, *rest), _ = chunk_inputs(case, place, torch.float32)
    wide = torch.full((1, 13, 8, 16), POISON, device=place)
    wide[:, :, :4] = q
    laid = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (own_k, own_v)]
    assert not laid[0].is_contiguous()
    found = chunk_attention_kernel(wide[:, :, :4], *laid, *rest, CARD)
    assert relative_error(found, chunk_attention_ops(q, own_k, own_v, *rest)) < 1e-5


@pytest.mark.parametrize("window", [None, 11])
def test_a_query_depends_on_what_it_sees_and_on_nothing_else(window, place):
    """Each position is changed in turn: exactly the queries that see it change."""
    past, length = 21, 19
    case = Case((past,), length, 1, 2, 16, 10 if window else past, 3, window)
    (q, own_k, own_v, keys, values, *rest), _ = chunk_inputs(case, place, torch.float32)
    first = chunk_attention_kernel(q, own_k, own_v, keys, values, *rest, CARD, config=SMALL)
    oldest = past - 10 if window else 0
    for position in range(oldest, past + length):
        changed = [x.clone() for x in (own_v, values)]
        if position >= past:
            changed[0][:, :, position - past] += 100
        else:
            changed[1][:, :, 3 + (position % 10 if window else position)] += 100
        then = chunk_attention_kernel(q, own_k, changed[0], keys, changed[1], *rest, CARD, config=SMALL)
        differs = (then != first).any(-1)[0].tolist()
        assert differs == [q >= position > q - (window or 99) for q in range(past, past + length)], position


def test_no_lengths_are_all_slots(place):
    case = Case((30,), 7, 1, 2, 16, 30, 7)
    q, keys, values, lengths = canvas_inputs(case, place, torch.float32)
    wanted = canvas_attention_ops(q, keys, values, lengths)
    assert relative_error(canvas_attention_ops(q, keys, values, None), wanted) < 1e-5
    assert relative_error(canvas_attention_kernel(q, keys, values, None, CARD), wanted) < 1e-5


def test_large_scores_do_not_overflow(place):
    """Scores of thousands, rising from key to key: the maximum moves in every tile."""
    case = Case((60,), 6, 1, 2, 16, 60, 6)
    q, keys, values, lengths = canvas_inputs(case, place, torch.float32)
    keys[:, :, :66] = torch.linspace(-200, 200, 66, device=place)[:, None]
    q = q.abs() * 10 + 1
    for splits in (1, 2):
        found = canvas_attention_kernel(q, keys, values, lengths, CARD, splits=splits, config=SMALL)
        assert relative_error(found, canvas_truth(case, q, keys, values)) < 1e-5


def test_splits_fill_the_processors_and_no_more():
    assert splits_for(1024, 20, 132) == 1  # 16 rows of a sliding layer
    assert splits_for(32, 20, 132) == 4  # one row: 128 programs
    assert splits_for(64, 4100, 132) == 2  # one row of a full layer, 131 thousand tokens
    assert splits_for(1, 1, 132) == 1
    for programs in range(1, 600, 7):
        assert splits_for(programs, 100, 132) * programs <= max(programs, 4 * 132)


@pytest.mark.parametrize("sm", CARDS)
def test_launches_depend_on_shapes_alone(sm):
    """On meta tensors there is nothing to read: what would be started follows from shapes."""
    for dim in (256, 512):
        assert tile_for(CARDS[sm], dim, 2)["COLUMNS"] == 256
    q, keys = torch.empty(1, 256, 16, 512, device="meta"), torch.empty(1, 2, 256 + 8192, 512, device="meta")
    with recording() as launches:
        out = canvas_attention_kernel(q, keys, keys, torch.empty(1, dtype=torch.int32, device="meta"), CARDS[sm])
    assert out.shape == (1, 256, 16 * 512)
    grid = launches[0].grid
    assert [len(launches) - 1, grid[1]] == [grid[2] > 1, 2]
