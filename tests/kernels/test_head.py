"""The passes over the vocabulary, plain and as kernels: against float64, the sampler's rules, and their memory.

Hidden states and table are multiples of a power of two, so that every product of them is exact in any order of sums:
then all sides see the same logits, equal ones included, and differ only in what they make of them.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cuda_backend.kernels import head, vocabulary
from cuda_backend.kernels.head import NEVER, Bias, Cut, Seen, bias_of_bans, look_kernel, look_ops, soft_kernel, soft_ops
from cuda_backend.kernels.launch import recording
from cuda_backend.kernels.quantize import Fp8Rows
from mlx_diffgemma.sampling import rules
from tests.kernels.harness import CARD, in_every_order, relative_error

DTYPES = (torch.float32, torch.bfloat16)
CARD = CARD
ALMOST = 1 - 2**-24
LIMIT = 64 * 10**6
SIZES = [  # rows, width, vocabulary, cut: chunks that do not divide, one chunk, less than a span, whole chunks
    (3, 37, 130, Cut(8, 16, 64)),
    (3, 20, 601, Cut(16, 64, 256)),
    (2, 8, 5, Cut(8, 16, 64)),
    (1, 130, 256, Cut(16, 64, 128)),
    (2, 8, 77, Cut(8, 32, 1024)),
]


@dataclasses.dataclass
class Case:
    hidden: torch.Tensor
    table: torch.Tensor
    cap: float | None
    uniform: torch.Tensor
    shape: dict  # what ``look`` and ``soft`` take alike

    def look(self, kernel: bool) -> Seen:
        given = {"uniform": self.uniform, **self.shape}
        if kernel:
            return look_kernel(self.hidden, self.table, self.cap, card=CARD, **given)
        return look_ops(self.hidden, self.table, self.cap, **given)

    def soft(self, kernel: bool, seen: Seen) -> torch.Tensor:
        given = {"scale": 53.0, "seen": seen, **self.shape}
        if kernel:
            return soft_kernel(self.hidden, self.table, self.cap, card=CARD, **given)
        return soft_ops(self.hidden, self.table, self.cap, **given)

    def y(self) -> torch.Tensor:
        """float64 [N, V]."""
        hidden, table = self.hidden, self.table.double()
        if (fp8 := self.shape.get("table_fp8")) is not None:
            hidden, table = vocabulary.quantize_ops(hidden).dense(torch.float64), fp8.dense(torch.float64)
        x = (hidden.double() @ table.T).to(self.hidden.dtype).double()
        x = x if self.cap is None else torch.tanh(x / self.cap) * self.cap
        bias = self.shape["bias"]
        x = x if bias is None else x + bias.values[:, bias.classes.long()].double()
        return x / self.shape["temperature"][:, None].double()


def grid(*shape: int) -> torch.Tensor:
    return torch.randint(-16, 17, shape) / 8


def case(rows, width, vocab, cut, dtype, place, *, cap=30.0, classes=0) -> Case:
    torch.manual_seed(rows * vocab + width)
    bias = None
    if classes:
        values = torch.randn(rows, classes)
        values[:, 1] = NEVER
        values[0] = 0
        of = torch.randint(0, classes, (vocab,), dtype=torch.int32)
        of[0] = 0  # so that something is left
        bias = Bias(of.to(place), values.to(place))
    temperature = torch.linspace(0.4, 1.3, rows)
    shape = {"temperature": temperature.to(place), "bias": bias, "cut": cut}
    hidden, table = grid(rows, width).to(place, dtype), grid(vocab, width).to(place, dtype)
    return Case(hidden, table, cap, torch.rand(rows).to(place), shape)


def check_seen(found: Seen, given: Case) -> None:
    """Against float64. An id drawn may be a neighbour where the uniform is within 1e-5 of the border between both."""
    y, dtype = given.y(), given.hidden.dtype
    odds = torch.softmax(y, -1)
    single = y.float()
    assert torch.equal(found.argmax, single.argmax(-1))
    assert relative_error(found.confidence, odds.amax(-1)) < 2e-5
    truth = torch.from_numpy(rules.entropy(y.cpu().numpy())).to(y)
    assert torch.allclose(found.entropy.double(), truth, rtol=2e-5, atol=5e-6)
    low = single.to(dtype).double()
    assert relative_error(found.greatest, low.amax(-1)) <= (1e-6 if dtype == torch.float32 else 0)
    assert relative_error(found.total, (low - low.amax(-1, keepdim=True)).exp().sum(-1)) < 1e-4
    check_drawn(found.drawn, y, given.uniform)
    assert all(x.dtype == torch.float32 for x in (found.entropy, found.confidence, found.greatest, found.total))


def check_drawn(drawn: torch.Tensor, y: torch.Tensor, uniform: torch.Tensor) -> None:
    odds = torch.softmax(y, -1)
    border = odds.cumsum(-1)
    clear = ((border - uniform[:, None]).abs() > 1e-5).all(-1)
    expected = rules.draw(y.cpu().numpy(), uniform.double().cpu().numpy())
    assert torch.equal(drawn[clear], torch.from_numpy(expected).long().to(drawn.device)[clear])
    above = border.gather(1, drawn[:, None])[:, 0]
    own = odds.gather(1, drawn[:, None])[:, 0]
    assert (own > 0).all()
    assert ((above > uniform - 1e-5) & (above - own < uniform + 1e-5)).all()


def check_soft(found: torch.Tensor, given: Case) -> None:
    y, dtype = given.y().float(), given.hidden.dtype
    odds = torch.softmax(y.to(dtype).double(), -1).to(dtype).double()
    truth = (odds @ given.table.double()).to(dtype).double() * 53.0
    assert found.dtype == dtype
    assert relative_error(found, truth) < (1e-5 if dtype == torch.float32 else 2**-7)


# ---- both passes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("size", SIZES)
def test_both_passes_against_float64(size, classes, dtype, place, proof):
    given = case(*size, dtype, place, classes=classes)
    plain, found = given.look(False), in_every_order(lambda: given.look(True))
    check_seen(plain, given)
    check_seen(found, given)
    check_soft(given.soft(False, plain), given)
    check_soft(in_every_order(lambda: given.soft(True, found)), given)
    proof("look", dtype)
    proof("soft", dtype)


@pytest.mark.parametrize("kernel", [False, True])
def test_without_softcap(kernel, place):
    given = case(3, 20, 300, Cut(8, 32, 128), torch.float32, place, cap=None)
    seen = given.look(kernel)
    check_seen(seen, given)
    check_soft(given.soft(kernel, seen), given)


@pytest.mark.parametrize(("kernel", "dtype"), [(False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)])
def test_an_fp8_table_makes_the_logits(dtype, kernel, place):
    """Scales are powers of two, so these logits are exact as well."""
    given = case(3, 32, 304, Cut(16, 64, 128), dtype, place, classes=3)
    given.hidden[:, 0] = 7
    codes, scales = grid(304, 32).to(place), 2.0 ** torch.randint(-2, 2, (304, 1)).to(place)
    given.shape["table_fp8"] = Fp8Rows(codes.to(torch.float8_e4m3fn), scales)
    seen = in_every_order(lambda: given.look(kernel))
    check_seen(seen, given)
    check_soft(given.soft(kernel, seen), given)


@pytest.mark.parametrize("kernel", [False, True])
def test_of_equal_logits_the_lowest_id_wins(kernel, place):
    """The same row of the table in one block, in another block, in another chunk."""
    given = case(2, 16, 400, Cut(8, 32, 128), torch.bfloat16, place)
    best = given.look(kernel).argmax
    for lower, copies in ((3, (9, 60, 300)), (130, (131, 399))):
        for row in range(2):
            given.table[lower] = given.hidden[row] * 2
            given.table[list(copies)] = given.table[lower].clone()
            assert given.look(kernel).argmax[row] == lower
        given.table[[lower, *copies]] = 0
    assert best.dtype == torch.int64


# ---- the draw


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_follow_the_distribution_and_no_banned_id_is_drawn(dtype, kernel, place, monkeypatch):
    """Two distributions, one lot of logits with other bans; of each 16 draws, from 0 to just below 1.

    All logits lie about 2048, where bfloat16 goes by 16: those that a draw makes again must be rounded too.
    """
    monkeypatch.setattr(vocabulary, "BUFFER", 5 * 8 * 24 * 4)  # some rows at a time
    rows, vocab = 16, 150
    given = case(1, 24, vocab, Cut(8, 32, 64), dtype, place, cap=None)
    given.hidden[:, 0], given.table[:, 0] = 16, 128
    given.hidden = given.hidden.expand(2 * rows, -1).contiguous()
    uniform = torch.cat([torch.arange(rows - 1) / (rows - 1), torch.tensor([ALMOST])])
    given.uniform = uniform.repeat(2).to(place)
    ends = {0, 1, *range(64, 96), vocab - 2, vocab - 1}
    banned = [sorted({*ends, *range(start, vocab, 3)}) for start in (2, 3)]
    bias = bias_of_bans([(ids, rows) for ids in banned], rows, vocab, torch.device(place))
    given.shape |= {"bias": bias, "temperature": torch.full((2 * rows,), 4.0, device=place)}
    drawn = given.look(kernel).drawn
    check_drawn(drawn, given.y(), given.uniform)
    for found, ids in zip(drawn.split(rows), banned, strict=True):
        assert not set(found.tolist()) & set(ids)
        allowed = [id for id in range(vocab) if id not in ids]
        assert found[0] == allowed[0] and found[-1] == allowed[-1]
        assert (found.diff() >= 0).all() and len(found.unique()) > 4


def test_an_id_of_weight_0_is_never_drawn_though_sums_rise_there():
    """Sums made in parallel may: here those of ones and zeros, with a rounding of 1e-7 put into the zeros."""
    weight = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]] * 4)
    share = torch.tensor([0.0, 0.5, 0.5 + 1e-8, ALMOST])
    index, inner = head.draw(weight, share)
    assert index.tolist() == [1, 3, 3, 3]
    assert ((inner >= 0) & (inner <= 1)).all()
    index, _ = head.draw(weight, torch.ones(4))
    assert index.tolist() == [3] * 4


# ---- cuts, bias, uses outside a step


@pytest.mark.parametrize("dtype", DTYPES)
def test_how_the_vocabulary_is_cut_changes_nothing(dtype):
    given = case(4, 24, 500, Cut(8, 32, 64), dtype, "cpu", classes=2)
    first = given.look(False)
    soft = given.soft(False, first)
    for cut in (Cut(64, 64, 512), Cut(4, 4, 4), Cut(16, 16, 112), None):
        given.shape["cut"] = cut
        seen = given.look(False)
        assert torch.equal(seen.argmax, first.argmax) and torch.equal(seen.drawn, first.drawn)
        for name in ("entropy", "confidence", "greatest", "total"):
            assert torch.allclose(getattr(seen, name), getattr(first, name), rtol=1e-5, atol=1e-6)
        assert relative_error(given.soft(False, seen), soft) < (1e-5 if dtype == torch.float32 else 2**-7)


def test_the_soft_embedding_is_summed_in_float32(place):
    """Over 64 chunks, of bfloat16: no rounding in between."""
    torch.manual_seed(0)
    odds, table = torch.rand(3, 512).to(place, torch.bfloat16), torch.randn(512, 40).to(place, torch.bfloat16)
    total = torch.zeros(3, 40, device=place)
    for part in head.chunks(512, 8):
        vocabulary.accumulate(total, odds[:, part].contiguous(), table[part])
    assert relative_error(total, odds.double() @ table.double()) < 1e-6


def test_bans_become_classes():
    bans = [((3, 5), 2), ((), 4), ((5, 7, 5), 4), ((1,), 0)]
    bias = bias_of_bans(bans, 4, 9, torch.device("cpu"))
    assert bias is not None and bias.classes.dtype == torch.int32
    dense = bias.of(slice(0, 9)).view(4, 4, 9)
    for row, (banned, until) in enumerate(bans):
        for position in range(4):
            expected = [NEVER if id in banned and position < until else 0 for id in range(9)]
            assert dense[row, position].tolist() == pytest.approx(expected)
    assert bias.values.shape == (16, 4)  # no row, the first, the third, both
    assert bias_of_bans([((3,), 0), ((), 4)], 4, 9, torch.device("cpu")) is None


@pytest.mark.filterwarnings("ignore:overflow")  # -1e30 / 1e-10, which is then put back
def test_a_tiny_temperature_keeps_banned_ids_finite():
    given = case(2, 8, 100, Cut(8, 32, 64), torch.bfloat16, "cpu", classes=2)
    given.shape["temperature"] = torch.full((2,), 1e-10)
    for kernel in (False, True):
        seen = given.look(kernel)
        assert all(torch.isfinite(x).all() for x in vars(seen).values())
        assert torch.equal(seen.drawn, seen.argmax)
        assert torch.isfinite(given.soft(kernel, seen)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities_and_logits(dtype, monkeypatch):
    monkeypatch.setattr("cuda_backend.kernels.logits.ROWS", 4)
    given = case(7, 16, 210, Cut(8, 16, 64), dtype, "cpu")
    given.shape["temperature"] = torch.ones(7)
    target = torch.tensor([0, 63, 64, 209, 100, 5, 128])
    truth = torch.log_softmax(given.y(), -1)
    found = head.log_probabilities(given.hidden, given.table, 30.0, target, chunk=64)
    assert torch.allclose(found.double(), truth.gather(1, target[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    logits = torch.zeros(7, 210)
    for part, block in head.logits_chunks(given.hidden, given.table, 30.0, chunk=64):
        logits[:, part] = block
    assert torch.allclose(logits.double(), given.y(), atol=1e-5)
    check_soft(head.soften(logits, given.table, 53.0), given)


# ---- the real vocabulary


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor made within, but for views of ``given``."""

    def __init__(self, *given: torch.Tensor):
        super().__init__()
        self.given, self.bytes, self.count = {x.untyped_storage()._cdata for x in given}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.given:
                self.bytes, self.count = max(self.bytes, x.untyped_storage().nbytes()), self.count + 1
        return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tensor_is_large_at_the_real_vocabulary(dtype, record):
    rows, vocab, width = 256, 262144, 64
    torch.manual_seed(0)
    hidden, table = grid(rows, width).to(dtype), grid(vocab, width).to(dtype)
    shape = {"temperature": torch.full((rows,), 0.7)}
    shape["bias"] = bias_of_bans([((1, 2), rows)], rows, vocab, torch.device("cpu"))
    given = Case(hidden, table, 30.0, torch.rand(rows), shape)
    with torch.inference_mode(), Largest(table) as largest:
        seen = given.look(False)
        soft = given.soft(False, seen)
    assert 0 < largest.bytes <= LIMIT, largest.bytes
    few = [0, 100, 255]
    for name in ("temperature", "bias"):
        value = shape[name]
        shape[name] = value[few] if name == "temperature" else Bias(value.classes, value.values[few])
    given.hidden, given.uniform = hidden[few], given.uniform[few]
    check_seen(Seen(*(x[few] for x in vars(seen).values())), given)
    check_soft(soft[few], given)
    record(what="largest tensor of a plain pass over 262,144 ids", dtype=str(dtype), bytes=largest.bytes)


@pytest.mark.parametrize(
    ("rows", "dtype"), [(256, torch.bfloat16), (256, torch.float32), (512, torch.bfloat16), (4096, torch.bfloat16)]
)
def test_no_tensor_is_large_at_the_real_width(rows, dtype):
    """Shapes alone, as on a GPU: plain, with kernels, with an FP8 table."""
    vocab, width = 262144, 2816
    with torch.device("meta"):
        hidden, table = torch.empty(rows, width, dtype=dtype), torch.empty(vocab, width, dtype=dtype)
        codes, scales = torch.empty(vocab, width, dtype=torch.float8_e4m3fn), torch.empty(vocab, 1)
        bias = Bias(torch.empty(vocab, dtype=torch.int32), torch.empty(rows, 3))
        shape = {"temperature": torch.empty(rows), "bias": bias}
        given = Case(hidden, table, 30.0, torch.empty(rows), shape)
        for fp8 in (None, Fp8Rows(codes, scales))[: 1 if rows == 4096 else 2]:
            shape["table_fp8"] = fp8
            for kernel in (False, True) if fp8 is None or dtype == torch.bfloat16 else (False,):
                with recording(), Largest(table, codes) as largest:
                    soft = given.soft(kernel, given.look(kernel))
                assert soft.shape == hidden.shape and soft.dtype == dtype
                assert 0 < largest.bytes <= LIMIT, (fp8, kernel, largest.bytes)
