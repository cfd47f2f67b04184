"""Canvas attention against float64, against plain MLX, against MLX's own, and against what nobody may see."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.mlx_backend.kernels.attention import (
    Tiling,
    Visible,
    canvas_attention_kernel,
    canvas_attention_ops,
    tiling,
)
from mlx_diffgemma.mlx_backend.kernels.launch import running_on
from tests.metal_kernels.harness import in_every_order, random, relative_error, wide

UNIT = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # the largest relative error of a rounding


@dataclass(frozen=True)
class Case:
    """A canvas behind ``held`` tokens per row, in buffers of ``capacity`` slots."""

    held: tuple[int, ...]
    capacity: int
    canvas: int
    groups: int
    stacked: int
    dim: int

    @property
    def visible(self) -> Visible:
        return Visible(max(self.held), mx.array(self.held, dtype=mx.int32), len(set(self.held)) == 1)


SMALL = [
    Case((33, 7), 50, 20, 2, 2, 16),  # two tiles of keys, rows of different length
    Case((64, 64), 64, 16, 1, 2, 16),  # nothing is partial, and the buffer is full
    Case((0,), 1, 5, 1, 1, 16),
    Case((0, 9, 1), 9, 3, 2, 4, 16),  # fewer slots than a matrix has rows
    Case((1,), 2, 4, 1, 2, 16),
    Case((19,), 24, 9, 1, 8, 72),  # 9 x 8 columns do not divide among two simdgroups
    Case((40,), 41, 48, 1, 4, 64),
]
LARGE = [Case((40, 3), 60, 20, 1, 2, 256), Case((27,), 40, 5, 1, 8, 512)]
EVERY = [(case, dtype) for case in SMALL for dtype in UNIT]
EVERY += [(case, dtype) for case in LARGE for dtype in (mx.float32, mx.bfloat16)]


def inputs(case: Case, dtype: mx.Dtype, unseen: float = 1e3) -> tuple[mx.array, ...]:
    """q, k, v, prefix_k, prefix_v; slots that a row does not hold are filled with ``unseen``."""
    rows, kv = len(case.held), (len(case.held), case.groups)
    q = random(1, rows, case.groups * case.stacked, case.canvas, case.dim, dtype=dtype, scale=3 / case.dim**0.5)
    k, v = (random(seed, *kv, case.canvas, case.dim, dtype=dtype) for seed in (2, 3))
    past = [random(seed, *kv, case.capacity, case.dim, dtype=dtype) for seed in (4, 5)]
    seen = mx.arange(case.capacity)[:, None] < mx.array(case.held)[:, None, None, None]
    return q, k, v, *(mx.where(seen, x, mx.array(unseen, dtype)) for x in past)


def truth(case: Case, q, k, v, prefix_k, prefix_v) -> tuple[np.ndarray, np.ndarray]:
    """In float64, by the definition. Also the sums of |value| with the same weights: errors are measured by them."""
    out = np.empty((2, len(case.held), case.canvas, case.groups * case.stacked, case.dim))
    for row, held in enumerate(case.held):
        for head in range(case.groups * case.stacked):
            at = row, head // case.stacked
            keys = np.concatenate([wide(prefix_k[at])[:held], wide(k[at])])
            values = np.concatenate([wide(prefix_v[at])[:held], wide(v[at])])
            scores = wide(q[row, head]) @ keys.T
            odds = np.exp(scores - scores.max(-1, keepdims=True))
            odds /= odds.sum(-1, keepdims=True)
            out[0, row, :, head], out[1, row, :, head] = odds @ values, odds @ np.abs(values)
    return tuple(out.reshape(2, len(case.held), case.canvas, -1))


def joined(case: Case, q, k, v, prefix_k, prefix_v) -> mx.array:
    """MLX's own attention over keys and values in one piece."""
    end = max(case.held)
    seen = mx.arange(end + case.canvas) < mx.array(case.held)[:, None, None, None]
    mask = seen | (mx.arange(end + case.canvas) >= end)
    k, v = mx.concatenate([prefix_k[:, :, :end], k], 2), mx.concatenate([prefix_v[:, :, :end], v], 2)
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
    return out.swapaxes(1, 2).flatten(2)


@pytest.mark.parametrize(("case", "dtype"), EVERY, ids=str)
def test_canvas_sees_itself_and_the_prefix(case, dtype, place, proof):
    given = inputs(case, dtype)
    wanted, size = truth(case, *given)
    found = in_every_order(lambda: canvas_attention_kernel(*given, case.visible), place)
    assert found.dtype == dtype and found.shape == wanted.shape
    # Rounded are the weights and the result. The sums are float32: a score of 10 is wrong by 1e-6 or so.
    assert (np.abs(wide(found) - wanted) <= UNIT[dtype] * (size + np.abs(wanted)) + 4e-6 * size).all()
    proof("canvas_attention", dtype)


@pytest.mark.parametrize(("case", "dtype"), EVERY, ids=str)
def test_plain_operations_round_once_more_than_those_of_mlx(case, dtype):
    given = inputs(case, dtype)
    found, theirs = canvas_attention_ops(*given, case.visible), joined(case, *given)
    wanted, size = truth(case, *given)
    assert found.dtype == dtype
    if dtype == mx.float32:
        assert relative_error(found, wide(theirs)) <= 2e-6
    # Two products are rounded once more than one: a uniform error of at most one unit, 1 / sqrt(3) of it on average.
    ours, other, most = (np.sqrt(np.mean(x**2)) for x in (wide(found) - wanted, wide(theirs) - wanted, size))
    assert ours <= other + UNIT[dtype] * most / 3**0.5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_what_is_not_held_does_not_count(dtype, place):
    """Not even NaN, nor how much room there is."""
    case = replace(SMALL[0], capacity=40)
    first = inputs(case, dtype)
    wanted = in_every_order(lambda: canvas_attention_kernel(*first, case.visible), place)
    more = [mx.concatenate([x, mx.full((2, 2, 30, case.dim), 7.0, dtype)], 2) for x in first[3:]]
    for given in (inputs(case, dtype, np.nan), (*first[:3], *more)):
        found = in_every_order(lambda given=given: canvas_attention_kernel(*given, case.visible), place)
        assert mx.array_equal(found, wanted)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_neither_overflow_nor_vanish(sign, dtype, place):
    """Scores of thousands, rising or falling from key to key: the maximum moves in every tile, or never."""
    case = Case((70,), 70, 6, 1, 2, 16)
    q, k, v, past_k, past_v = inputs(case, dtype)
    ramp = sign * mx.linspace(-200, 200, 76)[:, None]
    k, past_k = (k + ramp[70:]).astype(dtype), (past_k + ramp[:70]).astype(dtype)
    given = (mx.abs(q) * 10 + 1, k, v, past_k, past_v)
    wanted, size = truth(case, *given)
    found = in_every_order(lambda: canvas_attention_kernel(*given, case.visible), place)
    # From key to key scores differ by hundreds, so that one key takes it all: only the result is rounded.
    assert (np.abs(wide(found) - wanted) <= UNIT[dtype] * size).all()
    assert np.isfinite(wide(canvas_attention_ops(*given, case.visible))).all()


@pytest.mark.parametrize("dtype", UNIT)
def test_of_equal_scores_the_mean_is_rounded_once(dtype, place):
    """Exactly: weights are 1, and sums of small integers have no error."""
    case = Case((37,), 40, 10, 1, 2, 16)
    q, k, v, past_k, past_v = inputs(case, dtype)
    v, past_v = (mx.random.randint(-100, 101, x.shape, key=mx.random.key(6)).astype(dtype) for x in (v, past_v))
    given = (mx.zeros_like(q), k, v, past_k, past_v)
    found = in_every_order(lambda: canvas_attention_kernel(*given, case.visible), place)
    total = mx.concatenate([past_v[:, :, :37], v], 2).astype(mx.float32).sum(2)
    wanted = (total / 47).astype(dtype)  # [1, 1, d]
    assert mx.array_equal(found, mx.broadcast_to(mx.tile(wanted, (1, 1, 2)), found.shape))


def test_buffers_are_taken_whole_and_the_launch_knows_no_lengths():
    """So nothing of the prefix is copied, and one compiled step serves every length."""
    calls = []

    def runner(kernel, arrays, arguments):
        calls.append((arrays, arguments))
        return [mx.zeros(arguments["output_shapes"][0], arguments["output_dtypes"][0])]

    with running_on(runner):
        for case in (Case((33, 7), 50, 20, 2, 2, 16), Case((0, 90), 99, 20, 2, 2, 16)):
            given = inputs(case, mx.bfloat16)
            canvas_attention_kernel(*given, case.visible)
            assert all(a is b for a, b in zip(calls[-1][0], given, strict=False))
    assert calls[0][1] == calls[1][1]


@pytest.mark.parametrize("dtype", UNIT)
def test_every_tiling_fits(dtype):
    for dim in range(8, 513, 8):
        cut = tiling(dim, dtype)
        sharers = cut.simds * 32 // cut.rows
        assert sharers in (1, 2, 4, 8, 16, 32) and cut.keys % sharers == 0
        odds = cut.rows * (cut.keys + 16 // dtype.size) * dtype.size
        assert cut.simds * cut.keys * (cut.rows + 4) * 4 + odds + 8 * cut.rows <= 32768
        columns = -(-dim // 8 // cut.simds)
        registers = cut.rows // 8 * columns * (2 + 2 * dtype.size / 4)
        assert registers <= 96 + 32 * (dtype == mx.float32)
    assert tiling(512, mx.bfloat16) == Tiling(8, 32, 16)
    assert tiling(256, mx.bfloat16) == Tiling(4, 32, 32)


@pytest.mark.parametrize("dim", [20, 520])
def test_other_head_dimensions_are_refused(dim):
    case = Case((3,), 3, 2, 1, 1, dim)
    with pytest.raises(AssertionError):
        canvas_attention_kernel(*inputs(case, mx.float32), case.visible)
