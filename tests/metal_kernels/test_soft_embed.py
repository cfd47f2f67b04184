"""Soft embeddings from survivors: the kernel against float64, the stated bound, and reading whole canvases with it."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.mlx_backend import vocabulary
from mlx_diffgemma.mlx_backend.kernels.head import Seen, look_kernel, look_ops, odds_kernel, odds_ops
from mlx_diffgemma.mlx_backend.kernels.launch import running_on
from mlx_diffgemma.mlx_backend.kernels.logits import bias_of_bans
from mlx_diffgemma.mlx_backend.kernels.ops import PLAIN, with_kernels
from mlx_diffgemma.mlx_backend.kernels.soft_embed import gathers, survivors_kernel, survivors_ops
from mlx_diffgemma.mlx_backend.linear import Dense, Linear, Quantized
from tests.metal_cpu.runner import emulate
from tests.metal_kernels.harness import in_every_order, random, wide

ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # of one number, relative
DTYPES = tuple(ROUNDING)
OFF = 4e-5  # of a probability, through y: see test_head
FORMATS = {
    "dense": None,
    **{f"affine{bits}g{size}": ("affine", bits, size) for bits in (4, 8) for size in (32, 64, 128)},
    "mxfp4": ("mxfp4", 4, 32),
    "mxfp8": ("mxfp8", 8, 32),
    "nvfp4": ("nvfp4", 4, 16),
    "nvfp4 with a scale per row": ("nvfp4", 4, 16),
    "fp8 with a scale per row": ("mxfp8", 8, 32),
}


def table_of(form: str, vocab: int, width: int, dtype: mx.Dtype, scales: mx.Dtype = mx.float32) -> Linear:
    values = random(vocab + width, vocab, width)
    if form == "dense":
        return Dense(values.astype(dtype))
    mode, bits, size = FORMATS[form]
    weight, *parts = mx.quantize(values.astype(scales), group_size=size, bits=bits, mode=mode)
    rows = mx.random.uniform(0.5, 2, (vocab,), key=mx.random.key(3)) if "row" in form else None
    return Quantized(weight, parts[0], parts[1] if len(parts) > 1 else None, mode, bits, size, mx.float32, rows)


def seen_of(logits: mx.array, temperature: mx.array, keep: int, bias=None) -> Seen:
    """From plain operations, but without the weights that only those have."""
    uniform = mx.full((len(logits),), 0.5)
    seen = look_ops(logits, 30.0, temperature=temperature, uniform=uniform, bias=bias, keep=keep)
    return Seen(**{**vars(seen), "weight": None})


def truth(logits: mx.array, temperature: mx.array, table: Linear, bias=None, all_ids: bool = False) -> np.ndarray:
    """float64 [N, D] with y and probabilities rounded to the dtype of the logits."""
    dtype = logits.dtype
    y = 30 * np.tanh(wide(logits) / 30)
    if bias is not None:
        y = y + wide(bias.values)[:, np.array(bias.classes)]
    y = wide(mx.array((y / wide(temperature)[:, None]).astype(np.float32)).astype(dtype))
    shifted = y - y.max(-1, keepdims=True)
    odds = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    odds = wide(mx.array(odds.astype(np.float32)).astype(dtype))
    rows = wide(table.rows(mx.arange(logits.shape[1])))
    return np.where((shifted >= -10) | all_ids, odds, 0) @ rows


def near(found: mx.array, expected: np.ndarray, dtype: mx.Dtype, table: Linear) -> None:
    """Each probability may be off by ``OFF`` and by a rounding; the sum is rounded."""
    largest = np.abs(wide(table.rows(mx.arange(_rows(table))))).max()
    assert found.dtype == dtype and found.shape == expected.shape
    assert np.abs(wide(found) - expected).max() <= (OFF + 2 * ROUNDING[dtype]) * largest


def _rows(table: Linear) -> int:
    return table.arrays[0].shape[0]


def logits_with(counts: list[int], vocab: int, dtype: mx.Dtype) -> mx.array:
    """[N, V]: so many survivors per row at temperature 1, here and there; the others are far below."""
    rows = np.full((len(counts), vocab), -24.0)
    for row, count in enumerate(counts):
        at = np.random.default_rng(row).permutation(vocab)[:count]
        rows[row, at] = np.random.default_rng(count).integers(0, 24, count) / 8
    return mx.array(rows).astype(dtype)


# ---- the kernel


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form, place, proof):
    """Against float64 and plain MLX. Scales of affine codes also as bfloat16; widths above one threadgroup's."""
    for width, dtype, scales in ((128, mx.bfloat16, mx.bfloat16), (1152, mx.float32, mx.float32)):
        vocab, temperature = 300, mx.array([0.5, 1.0, 1.0])
        logits = random(1, 3, vocab, dtype=dtype, scale=4)
        logits[1] = 0
        table = table_of(form, vocab, width, dtype, scales)
        shape = {"temperature": temperature, "bias": None, "seen": seen_of(logits, temperature, 200), "table": table}
        shape["skip"] = mx.array([False] * 3)
        found = in_every_order(lambda x=logits, shape=shape: survivors_kernel(x, 30.0, **shape), place)
        near(found, truth(logits, temperature, table), dtype, table)
        near(found, wide(survivors_ops(logits, 30.0, **shape)), dtype, table)
        assert gathers(table) == ""
        proof("survivors", dtype)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "dense"])
def test_rows_are_decoded_exactly(form, place):
    """One survivor of probability 1: its row of the table to the last bit, whatever codes and scales there are."""
    table, vocab = table_of(form, 64, 128, mx.float32), 64
    words = np.random.default_rng(0).integers(0, 2**32, table.weight.shape, dtype=np.uint32)
    scales = table.scales
    if table.mode != "affine":
        most = {"mxfp4": 250, "mxfp8": 246, "nvfp4": 127}[table.mode]
        codes = np.random.default_rng(1).integers(0, most, scales.shape, dtype=np.uint8)
        codes[0, :2] = 0, 127
        scales = mx.array(codes)
    table = Quantized(mx.array(words), scales, *[getattr(table, n) for n in ("biases", "mode", "bits", "group_size")],
                      mx.float32, table.row_scale)  # fmt: skip
    logits = mx.where(mx.eye(vocab) > 0, 29.0, -29.0)[::3]
    temperature, ids = mx.full((len(logits),), 0.2), mx.arange(vocab)[::3]
    shape = {"temperature": temperature, "bias": None, "seen": seen_of(logits, temperature, 8), "table": table}
    skip = mx.zeros((len(logits),), mx.bool_)
    found = in_every_order(lambda: survivors_kernel(logits, 30.0, skip=skip, **shape), place)
    with mx.stream(mx.cpu):
        expected = np.array(table.rows(ids))
    assert np.isnan(expected).any() == (table.mode in ("mxfp8", "nvfp4"))  # which have codes for that
    denormal = 0 if place == "cpu-emulated" else 2**-110  # 2^-127 as a scale, which a GPU may take for 0
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=denormal)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_probabilities_are_rounded(dtype, place):
    """Two ids whose rows cancel, but for the rounding of the probabilities: 0.73 and 0.27 as the dtype has them."""
    odds = np.array([np.e, 1]) / (np.e + 1)
    logits = mx.array([[1.0, 0.0] + [-29.0] * 6]).astype(dtype)
    rows = np.zeros((8, 4), np.float32)
    rows[:2] = [[odds[1]] * 4, [-odds[0]] * 4]
    temperature = mx.array([1.0])
    uniform = mx.array([0.5])
    seen = look_ops(logits, None, temperature=temperature, uniform=uniform, keep=4)
    shape = {"temperature": temperature, "bias": None, "seen": seen, "table": Dense(mx.array(rows))}
    found = in_every_order(lambda: survivors_kernel(logits, None, skip=mx.array([False]), **shape), place)
    rounded = wide(mx.array(odds.astype(np.float32)).astype(dtype))
    expected = rounded[0] * odds[1] - rounded[1] * odds[0]
    assert abs(expected) > 2e-5
    np.testing.assert_allclose(wide(found), expected, rtol=0, atol=1e-7 + 2 * ROUNDING[dtype] * abs(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_that_end_and_lists_that_overflow(dtype, place, proof):
    """Rows of 1, of just as many as are listed, of one more, of all ids; an odd width, a skipped row, a ban."""
    vocab, width, keep = 301, 67, 130
    logits = logits_with([1, keep, keep + 1, vocab, 5, keep + 1], vocab, dtype)
    table, temperature, rows = table_of("dense", vocab, width, dtype), mx.ones((6,)), 6
    bias = bias_of_bans([((3, 4, 100), rows)], rows, vocab)
    skip = mx.array([False, False, False, False, True, True])
    for added, counts in ((None, [1, keep, keep + 1, vocab, 5, keep + 1]), (bias, None)):
        shape = {"temperature": temperature, "bias": added, "seen": seen_of(logits, temperature, keep, added)}
        assert counts is None or shape["seen"].count.tolist() == counts
        found = in_every_order(
            lambda shape=shape: survivors_kernel(logits, 30.0, table=table, skip=skip, **shape), place
        )
        expected = truth(logits, temperature, table, added) * ~np.array(skip)[:, None]
        near(found, expected, dtype, table)
        near(survivors_ops(logits, 30.0, table=table, skip=skip, **shape), expected, dtype, table)
        assert not np.array(found[4:].astype(mx.float32)).any()
    proof("survivors", dtype)


def test_with_or_without_a_list_the_sum_is_the_same(place):
    """Bit for bit: the same survivors in the same order."""
    logits, temperature = random(5, 2, 500, scale=4), mx.array([0.7, 1.0])
    table, skip = table_of("affine4g64", 500, 64, mx.float32), mx.array([False, False])
    listed, unlisted = (seen_of(logits, temperature, keep) for keep in (400, 1))
    assert listed.count.tolist() == unlisted.count.tolist() and min(listed.count.tolist()) > 1
    made = [
        in_every_order(
            lambda seen=seen: survivors_kernel(
                logits, 30.0, temperature=temperature, bias=None, seen=seen, table=table, skip=skip
            ),
            place,
        )
        for seen in (listed, unlisted)
    ]
    assert np.array_equal(np.array(made[0]), np.array(made[1]))


def test_the_stated_bound(place):
    """|survivors - all ids| <= max |row| * probability left out < max |row| * V e^-10 max p; and it is not idle."""
    vocab, width = 4000, 32
    table, temperature = table_of("dense", vocab, width, mx.float32), mx.array([0.5, 0.8, 1.2])
    logits = random(9, 3, vocab, scale=3)
    y = 30 * np.tanh(wide(logits) / 30) / wide(temperature)[:, None]
    odds = np.exp(y - y.max(-1, keepdims=True))
    odds /= odds.sum(-1, keepdims=True)
    left_out = np.where(odds < np.exp(-10) * odds.max(-1, keepdims=True), odds, 0).sum(-1)
    longest = np.linalg.norm(wide(table.weight), axis=-1).max()
    assert (left_out < vocab * np.exp(-10) * odds.max(-1)).all() and (left_out > 1e-5).all()
    seen, skip = seen_of(logits, temperature, 1024), mx.array([False] * 3)
    shape = {"temperature": temperature, "bias": None, "seen": seen}
    found = in_every_order(lambda: survivors_kernel(logits, 30.0, table=table, skip=skip, **shape), place)
    apart = np.linalg.norm(wide(found) - odds @ wide(table.weight), axis=-1)
    assert (apart <= longest * left_out + OFF).all()
    assert (np.array(seen.count) < vocab).all()


def test_tables_it_cannot_read():
    values = random(0, 8, 128)
    six = mx.quantize(values, group_size=64, bits=6)
    assert "6 bits" in gathers(Quantized(*six, "affine", 6, 64, mx.float32))
    assert "class" in gathers(SimpleNamespace())


# ---- read_canvas

VOCAB, WIDTH, LENGTH = 1500, 32, 6


def network(dtype: mx.Dtype, ops=PLAIN) -> SimpleNamespace:
    config = SimpleNamespace(vocab_size=VOCAB, final_logit_softcapping=30.0)
    table = Dense(random(0, VOCAB, WIDTH, dtype=dtype))
    return SimpleNamespace(config=config, table=table, dtype=dtype, scale=mx.array(4.0, dtype=dtype), ops=ops)


def canvases(dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """Hidden states of two canvases, the second one flatter from row to row; temperature; uniforms."""
    scale = mx.array([[1.0] * LENGTH, [1.0, 0.5, 0.3, 0.1, 0.05, 0.0]])[..., None]
    hidden = (random(1, 2, LENGTH, WIDTH) * scale).astype(dtype)
    return hidden, mx.array([0.6, 0.9]), mx.random.uniform(shape=(2, LENGTH), key=mx.random.key(2))


def flat_rows(dtype: mx.Dtype) -> list[int]:
    """How many rows of each canvas have more than ``CAP`` survivors, no id being banned."""
    hidden, temperature, _ = canvases(dtype)
    x = wide(network(dtype).table.apply(hidden))
    y = (30 * np.tanh(x / 30) / wide(temperature)[:, None, None]).astype(np.float32)
    low = wide(mx.array(y).astype(dtype))
    return ((low - low.max(-1, keepdims=True) >= -10).sum(-1) > vocabulary.CAP).sum(-1).tolist()


def read(net, dtype, dense=None, bias=None):
    with running_on(emulate):
        found = vocabulary.read_canvas(net, *canvases(dtype), bias, dense)
        mx.eval(vars(found))
    return found


@pytest.fixture
def fused():
    return with_kernels(["look", "odds", "survivors"])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_every_way_to_read_a_canvas(dtype, fused, monkeypatch):
    """Plain or with kernels, all ids or survivors with 0, some or all rows dense, and in slices."""
    bias = bias_of_bans([((1, 2, 700), 4), ((5,), 6)], LENGTH, VOCAB)
    whole = read(network(dtype), dtype, bias=bias)
    assert whole.flat.dtype == mx.int32 and whole.flat.tolist() == [0, 0]
    rows = np.abs(wide(network(dtype).table.weight)).max() * 4
    flat = flat_rows(dtype)
    assert flat[0] == 0 and 3 < flat[1] < LENGTH
    for ops in (PLAIN, fused):
        for dense in (None, 0.0, 0.25, 1.0):
            found = read(network(dtype, ops), dtype, dense, bias)
            assert found.argmax.tolist() == whole.argmax.tolist() and found.drawn.tolist() == whole.drawn.tolist()
            np.testing.assert_allclose(wide(found.entropy), wide(whole.entropy), rtol=OFF, atol=OFF)
            np.testing.assert_allclose(wide(found.confidence), wide(whole.confidence), rtol=OFF)
            assert found.soft.dtype == dtype and found.soft.shape == (2, LENGTH, WIDTH)
            left_out = VOCAB * np.exp(-10) if dense in (0.0, 0.25) else 0
            bound = (left_out + OFF + 4 * ROUNDING[dtype]) * rows
            assert np.abs(wide(found.soft) - wide(whole.soft)).max() <= bound
            assert found.flat.tolist() == ([0, 0] if dense is None else flat)
        monkeypatch.setattr(vocabulary, "SLICE_ELEMENTS", 5 * VOCAB)
        monkeypatch.setattr(vocabulary, "SLICE_BYTES", 5 * VOCAB * dtype.size)
        sliced = read(network(dtype, ops), dtype, bias=bias)
        assert sliced.drawn.tolist() == whole.drawn.tolist()
        assert np.abs(wide(sliced.soft) - wide(whole.soft)).max() <= (OFF + 4 * ROUNDING[dtype]) * rows
        monkeypatch.undo()


def test_the_rows_with_the_most_survivors_go_dense(fused):
    """A quarter of them, three; the others are gathered, and none is where all go dense."""
    dtype, asked = mx.float32, []

    def survivors(logits, cap, *, skip, **shape):
        asked.append(skip.tolist())
        return survivors_kernel(logits, cap, skip=skip, **shape)

    ops = SimpleNamespace(look=look_kernel, odds=odds_kernel, survivors=survivors)
    dense = read(network(dtype, fused), dtype).soft.flatten(0, 1)
    found = read(network(dtype, ops), dtype, 0.25).soft.flatten(0, 1)
    assert asked == [[False] * 9 + [True] * 3]
    np.testing.assert_allclose(wide(found[9:]), wide(dense[9:]), atol=1e-5)
    read(network(dtype, ops), dtype, 1.0)
    assert len(asked) == 1


def test_how_many_rows_a_slice_has(fused):
    plain, kernels = (vocabulary.bytes_each(ops, mx.bfloat16, survivors=False) for ops in (PLAIN, fused))
    assert (plain, kernels) == (0, 2)
    some = with_kernels(["look", "odds"])
    assert [vocabulary.bytes_each(some, mx.bfloat16, survivors=x) for x in (False, True)] == [2, 0]
    assert vocabulary.slices(256, 262144, plain)[:2] == [(0, 32), (32, 64)]
    assert vocabulary.slices(256, 262144, kernels) == [(0, 256)]
    assert vocabulary.slices(1100, 262144, kernels) == [(0, 512), (512, 1024), (1024, 1100)]
    assert vocabulary.slices(3, 2**28, 4) == [(0, 1), (1, 2), (2, 3)]
    assert odds_ops is PLAIN.odds
