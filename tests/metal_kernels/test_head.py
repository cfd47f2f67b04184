"""What a step reads off its logits, and probabilities, against float64 and against plain MLX."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.mlx_backend.kernels.head import Seen, look_kernel, look_ops, odds_kernel, odds_ops
from mlx_diffgemma.mlx_backend.kernels.logits import NEVER, Bias, bias_of_bans
from mlx_diffgemma.sampling import rules
from tests.metal_kernels.harness import in_every_order, random, wide

ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # of one number, relative
DTYPES = tuple(ROUNDING)
ALMOST = 1 - 2**-24
# Rows, ids, classes of a bias: one simdgroup; rows that no vector load fits; several spans each, the last one short
SIZES = [(3, 128, 0), (2, 299, 3), (4, 3004, 3), (2, 9001, 0)]
# Through tanh, a product and a quotient y is off by a few 2^-24 of 75, so an odd by as much: 8 * 75 / 2^24 < 4e-5.
OFF = 4e-5


@dataclass
class Case:
    """Logits lie on a grid, so that each dtype has them exactly and many are equal."""

    logits: mx.array
    cap: float | None
    shape: dict

    def y(self) -> np.ndarray:
        """float64 [N, V]."""
        x, bias = wide(self.logits), self.shape["bias"]
        y = x if self.cap is None else self.cap * np.tanh(x / self.cap)
        if bias is not None:
            y = y + wide(bias.values)[:, np.array(bias.classes)]
        return np.maximum(y / wide(self.shape["temperature"])[:, None], -2e38)

    def low(self) -> np.ndarray:
        """y as the dtype of the logits has it."""
        return wide(mx.array(self.y().astype(np.float32)).astype(self.logits.dtype))


def case(rows: int, vocab: int, dtype: mx.Dtype, *, cap: float | None = 30.0, classes: int = 0, scale=4.0) -> Case:
    grid = mx.round(random(vocab, rows, vocab, scale=scale) * 8) / 8
    bias = None
    if classes:
        of = np.random.default_rng(vocab).integers(0, classes, vocab)
        of[vocab // 2] = 0  # so that something is left
        values = np.array(random(rows, rows, classes))
        values[:, 1], values[0, 2:] = NEVER, 0
        bias = Bias(mx.array(of.astype(np.uint8)), mx.array(values))
    temperature = mx.linspace(0.4, 1.3, rows) if rows > 1 else mx.array([0.7])
    return Case(grid.astype(dtype), cap, {"temperature": temperature, "bias": bias})


def uniforms(rows: int) -> mx.array:
    return mx.random.uniform(shape=(rows,), key=mx.random.key(rows))


def look(given: Case, uniform: mx.array, place: str | None, keep: int = 0) -> Seen:
    """By the kernel in every order of threads, or by plain operations where there is no place."""

    def run(op) -> Seen:
        return op(given.logits, given.cap, uniform=uniform, keep=keep, **given.shape)

    return run(look_ops) if place is None else in_every_order(lambda: run(look_kernel), place)


def check(found: Seen, given: Case, uniform: mx.array, keep: int = 0) -> None:
    y, dtype = given.y(), given.logits.dtype
    odds = np.exp(y - y.max(-1, keepdims=True))
    odds /= odds.sum(-1, keepdims=True)
    assert found.argmax.dtype == found.drawn.dtype == mx.int32
    assert np.array_equal(np.array(found.argmax), y.argmax(-1))
    np.testing.assert_allclose(wide(found.confidence), odds.max(-1), rtol=OFF)
    np.testing.assert_allclose(wide(found.entropy), rules.entropy(y), rtol=OFF, atol=OFF)
    check_drawn(found.drawn, y, uniform)
    low = given.low()
    exact = ROUNDING[mx.float32] if dtype == mx.float32 else 0
    np.testing.assert_allclose(wide(found.greatest), low.max(-1), rtol=8 * exact)
    np.testing.assert_allclose(wide(found.total), np.exp(low - low.max(-1, keepdims=True)).sum(-1), rtol=OFF)
    if keep:
        check_listed(found, low - low.max(-1, keepdims=True) >= -10, keep)


def check_drawn(drawn: mx.array, y: np.ndarray, uniform: mx.array) -> None:
    """By the rule; a neighbour where the uniform is within 1e-5 of the border between both. Never a zero weight."""
    odds = np.exp(y - y.max(-1, keepdims=True))
    odds /= odds.sum(-1, keepdims=True)
    border, u, at = odds.cumsum(-1), wide(uniform), np.array(drawn)
    clear = (np.abs(border - u[:, None]) > 1e-5).all(-1)
    assert np.array_equal(at[clear], rules.draw(y, u)[clear])
    above, own = (np.take_along_axis(x, at[:, None], -1)[:, 0] for x in (border, odds))
    assert (own > 0).all()
    assert ((above > u - 1e-5) & (above - own < u + 1e-5)).all()


def check_listed(found: Seen, near: np.ndarray, keep: int) -> None:
    assert found.count is not None and found.ids is not None and found.ids.shape == (len(near), keep)
    assert np.array_equal(np.array(found.count), near.sum(-1))
    for ids, row in zip(np.array(found.ids), near, strict=True):
        listed = np.flatnonzero(row) if row.sum() <= keep else []
        assert ids.tolist() == [*listed, *[-1] * (keep - len(listed))]


# ---- one look


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(size, dtype, place, proof):
    *shape, classes = size
    given, uniform = case(*shape, dtype, classes=classes), uniforms(size[0])
    plain, found = look(given, uniform, None), look(given, uniform, place)
    check(plain, given, uniform)
    check(found, given, uniform)
    assert found.count is None and found.ids is None and found.weight is None
    proof("look", dtype)


KEPT = [(mx.float32, 1), *((dtype, 40) for dtype in DTYPES), (mx.bfloat16, 2000)]


@pytest.mark.parametrize(("dtype", "keep"), KEPT)
def test_survivors_are_listed(dtype, keep, place, proof):
    """Counts on both sides of ``keep``, with a bias, across spans and simdgroups."""
    for size, classes in (((2, 299), 0), ((4, 5004), 3)):
        given, uniform = case(*size, dtype, classes=classes), uniforms(size[0])
        check(look(given, uniform, None, keep), given, uniform, keep)
        check(look(given, uniform, place, keep), given, uniform, keep)
    proof("look", dtype)


@pytest.mark.parametrize(("vocab", "dtype"), [(262144, mx.bfloat16), (262500, mx.bfloat16), (140001, mx.float16)])
def test_long_rows(vocab, dtype, place):
    """As many spans as are kept; longer ones; several to a thread of the draw."""
    given, uniform = case(1, vocab, dtype, scale=3.0), mx.array([0.77])
    found = look(given, uniform, place, 8192)
    check(found, given, uniform, 8192)
    plain = look(given, uniform, None, 8192)
    assert found.argmax.item() == plain.argmax.item() and found.greatest.item() == plain.greatest.item()


def test_without_softcap(place):
    for keep in (0, 30):
        given, uniform = case(3, 700, mx.bfloat16, cap=None), uniforms(3)
        check(look(given, uniform, None, keep), given, uniform, keep)
        check(look(given, uniform, place, keep), given, uniform, keep)


@pytest.mark.parametrize("vocab", [6000, 6001])
def test_of_equal_logits_the_lowest_id_wins(vocab, place):
    """Copies in the same lane, another lane, another step, another span of the same simdgroup, another simdgroup."""
    lowest = [0, 1, 5, 130, 700, 4200, 5990]
    given = case(len(lowest), vocab, mx.bfloat16)
    logits = np.array(given.logits.astype(mx.float32))
    for row, low in enumerate(lowest):
        logits[row, low] = 29.0
        logits[
            row, [at for at in (low + 2, low + 7, low + 131, low + 300, low + 256 * 16, vocab - 1) if at < vocab]
        ] = 29.0
    given.logits = mx.array(logits).astype(mx.bfloat16)
    found = look(given, uniforms(len(lowest)), place)
    assert found.argmax.tolist() == lowest == look(given, uniforms(len(lowest)), None).argmax.tolist()


# ---- the draw


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_follow_the_distribution_and_no_banned_id_is_drawn(dtype, place):
    """One row of logits with two lots of bans; of each 16 draws, from 0 to just below 1."""
    rows, vocab = 16, 1100
    given = case(1, vocab, dtype, scale=1.0)
    given.logits = mx.repeat(given.logits, 2 * rows, 0)
    ends = {0, 1, *range(256, 520), *range(1000, vocab)}
    banned = [sorted({*ends, *range(start, vocab, 3)}) for start in (2, 3)]
    given.shape = {
        "temperature": mx.full((2 * rows,), 0.8),
        "bias": bias_of_bans([(b, rows) for b in banned], rows, vocab),
    }
    uniform = mx.array([i / (rows - 1) for i in range(rows - 1)] + [ALMOST]).astype(mx.float32)
    uniform = mx.concatenate([uniform, uniform])
    drawn = look(given, uniform, place).drawn
    check_drawn(drawn, given.y(), uniform)
    for found, ids in zip(np.split(np.array(drawn), 2), banned, strict=True):
        allowed = [id for id in range(vocab) if id not in set(ids)]
        assert not set(found.tolist()) & set(ids)
        assert found[0] == allowed[0] and found[-1] == allowed[-1]
        assert (np.diff(found) >= 0).all() and len(set(found.tolist())) > 8


DRAWN = {0.0: 700, 0.25: 890, 0.5: 1500, 0.75: 1510, ALMOST: 1510, 1.0: 1510}


@pytest.mark.parametrize("uniform", DRAWN)
def test_a_zero_weight_is_never_drawn(uniform, place):
    """Four ids have a weight, all the same; targets on the borders belong to the next, at the total to the last."""
    logits = mx.full((1, 2000), -3000.0)
    logits[0, [700, 890, 1500, 1510]] = 5.0
    given = Case(logits, None, {"temperature": mx.array([1.0]), "bias": None})
    for where in (None, place):
        assert look(given, mx.array([uniform]), where).drawn.item() == DRAWN[uniform]


def test_all_ids_alike(place):
    """Flat rows: the draw is the uniform in ids, the entropy log V, and every id survives."""
    vocab, rows = 1000, 5
    given = Case(mx.zeros((rows, vocab), mx.bfloat16), 30.0, {"temperature": mx.full((rows,), 0.5), "bias": None})
    uniform = mx.array([0.0, 0.0105, 0.4995, 0.7505, 0.9995])
    found = look(given, uniform, place, 1000)
    assert found.drawn.tolist() == [0, 10, 499, 750, 999] and found.argmax.tolist() == [0] * rows
    np.testing.assert_allclose(wide(found.entropy), np.log(vocab), rtol=1e-6)
    check_listed(found, np.ones((rows, vocab), bool), 1000)
    check_listed(look(given, uniform, place, 999), np.ones((rows, vocab), bool), 999)


def test_survivors_reach_ten_nats(place):
    """Exactly 10 below the greatest survives, a bit less does not; in float32 and where y is rounded to it."""
    for dtype, beyond in ((mx.float32, -10.000001), (mx.bfloat16, -10.0625)):
        logits = mx.full((1, 600), -20.0)
        logits[0, 3], logits[0, 300], logits[0, 599], logits[0, 301] = 0.0, -10.0, -10.0, beyond
        given = Case(logits.astype(dtype), None, {"temperature": mx.array([1.0]), "bias": None})
        for where in (None, place):
            found = look(given, mx.array([0.5]), where, 4)
            assert found.count.item() == 3 and found.ids.tolist() == [[3, 300, 599, -1]]
    y = mx.array([[0.0, -10.01, -10.04] + [-30.0] * 5])  # in bfloat16 -10 and -10.0625
    given = Case(y, None, {"temperature": mx.array([1.0]), "bias": None})
    assert look(given, mx.array([0.5]), place, 4).count.item() == 1
    given.logits = y.astype(mx.bfloat16)
    assert look(given, mx.array([0.5]), place, 4).count.item() == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tiny_temperature_and_bans_everywhere_stay_finite(dtype, place):
    given = case(3, 700, dtype, classes=2)
    given.shape["temperature"] = mx.array([1e-10, 1.0, 1e-10])
    if dtype == mx.float16:  # whose greatest y is infinite at such a temperature, as in transformers
        given.shape["temperature"] = mx.array([0.01, 1.0, 0.01])
    values = np.array(given.shape["bias"].values)
    values[1:] = NEVER
    given.shape["bias"] = Bias(given.shape["bias"].classes, mx.array(values))
    for where in (None, place):
        seen = look(given, mx.array([0.3, 0.3, 0.3]), where, 10)
        assert all(np.isfinite(wide(x)).all() for x in vars(seen).values() if x is not None)
        assert seen.drawn[0].item() == seen.argmax[0].item()
        assert seen.argmax[1:].tolist() == [0, 0] and seen.count[1:].tolist() == [700, 700]
        np.testing.assert_allclose(wide(seen.entropy)[1:], np.log(700), rtol=1e-6)


def test_what_is_not_a_number_shows(place):
    """In one row: its entropy, confidence and total; ids stay in range, other rows as they were."""
    given, uniform = case(2, 900, mx.bfloat16), mx.array([0.5, 0.5])
    expected = look(given, uniform, None)
    given.logits[0, 300] = float("nan")
    for where in (None, place):
        seen = look(given, uniform, where, 5)
        for name in ("entropy", "confidence", "total"):
            assert np.isnan(getattr(seen, name)[0].item()), name
            np.testing.assert_allclose(getattr(seen, name)[1].item(), getattr(expected, name)[1].item(), rtol=1e-5)
        assert 0 <= seen.drawn[0].item() < 900 and 0 <= seen.argmax[0].item() < 900
        assert seen.drawn[1].item() == expected.drawn[1].item()
        shape = {"seen": seen, **given.shape}
        made = odds_ops(given.logits, given.cap, **shape)
        if where:
            made = in_every_order(lambda shape=shape: odds_kernel(given.logits, given.cap, **shape), place)
        assert np.isnan(wide(made)[0, 300])


# ---- probabilities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (1, 8, 0)])
def test_probabilities(size, dtype, place, proof):
    *shape, classes = size
    given, uniform = case(*shape, dtype, classes=classes), uniforms(size[0])
    seen = look(given, uniform, None)
    bare = Seen(**{**vars(seen), "weight": None})
    shifted = given.low() - given.low().max(-1, keepdims=True)
    truth = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    kernel = in_every_order(lambda: odds_kernel(given.logits, given.cap, seen=bare, **given.shape), place)
    for found in (kernel, *(odds_ops(given.logits, given.cap, seen=s, **given.shape) for s in (seen, bare))):
        assert found.dtype == dtype and found.shape == given.logits.shape
        assert (np.abs(wide(found) - truth) <= (OFF + ROUNDING[dtype]) * truth + 2.0**-25).all()
        if classes:
            banned = wide(given.shape["bias"].values)[:, np.array(given.shape["bias"].classes)] == NEVER
            assert (wide(found)[banned] == 0).all()
    proof("odds", dtype)


def test_bans_become_classes():
    bans = [((3, 5), 2), ((), 4), ((5, 7, 5), 4), ((1,), 0)]
    bias = bias_of_bans(bans, 4, 9)
    assert bias is not None and bias.classes.dtype == mx.uint8 and bias.values.shape == (16, 4)
    dense = np.array(bias.values)[:, np.array(bias.classes)].reshape(4, 4, 9)
    for row, (banned, until) in enumerate(bans):
        for position in range(4):
            expected = [np.float32(NEVER) if id in banned and position < until else 0 for id in range(9)]
            assert dense[row, position].tolist() == expected
    assert bias_of_bans([((3,), 0), ((), 4)], 4, 9) is None


def test_many_classes_take_two_bytes(place):
    rows, vocab = 300, 320
    bias = bias_of_bans([((row,), 1) for row in range(rows)], 1, vocab)
    assert bias is not None and bias.classes.dtype == mx.uint16 and bias.values.shape == (rows, rows + 1)
    some = mx.array([0, 255, 256, 299])
    given = case(4, vocab, mx.bfloat16)
    given.shape["bias"] = bias.rows(some)
    uniform = uniforms(4)
    check(look(given, uniform, None), given, uniform)
    check(look(given, uniform, place), given, uniform)
