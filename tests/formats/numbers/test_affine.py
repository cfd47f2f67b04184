"""The affine format against ``mx.quantize`` and ``mx.dequantize``, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.formats.numbers import affine, bits, chunks
from tests.formats.numbers.arrays import DTYPES, ROUNDING, STRUCTURED, cast, from_mlx, normal, to_mlx, weights

ALL = [(width, group) for width in affine.BITS for group in affine.GROUP_SIZES]


def equal_to_mlx(w: np.ndarray, width: int, group: int) -> bool:
    theirs = mx.quantize(to_mlx(w), group_size=group, bits=width, mode="affine", stream=mx.cpu)
    ours = affine.pack(w, width, group)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(ours, map(from_mlx, theirs), strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "group"), ALL)
def test_equal_to_mlx(width: int, group: int, dtype: str):
    assert equal_to_mlx(normal(1, 32, 512, dtype=dtype), width, group)
    for name, w in STRUCTURED.items():
        assert equal_to_mlx(cast(w, dtype), width, group), name


@given(weights(), st.sampled_from(ALL), st.sampled_from(sorted(DTYPES)))
@settings(max_examples=150, deadline=None)
def test_equal_to_mlx_on_anything(w: np.ndarray, form: tuple[int, int], dtype: str):
    assert equal_to_mlx(cast(w, dtype), *form)


@pytest.mark.parametrize(("width", "group"), ALL)
def test_unpack_equals_mlx(width: int, group: int):
    w = normal(2, 3, 16, 256)
    parts = affine.pack(w, width, group)
    theirs = mx.dequantize(*map(to_mlx, parts), group_size=group, bits=width, stream=mx.cpu)
    ours = affine.unpack(*parts, width, group)
    assert ours.dtype == np.float32 and np.array_equal(ours, from_mlx(theirs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_unpack_works_in_float32_from_narrow_scales(dtype: str):
    words, scales, biases = affine.pack(normal(3, 8, 256, dtype=dtype), 5, 64)
    spread = (np.repeat(part.astype(np.float32), 64, -1) for part in (scales, biases))
    scale, bias = spread
    assert np.array_equal(affine.unpack(words, scales, biases, 5, 64), bits.unpack(words, 5) * scale + bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "group"), ALL)
def test_the_error_is_within_a_step(width: int, group: int, dtype: str):
    last, rounding = 2**width - 1, ROUNDING[dtype]
    for name in ("normal", "one outlier", "sign-symmetric", "positive", "negative", "ramp", "constant", "zero"):
        w = cast(STRUCTURED[name], dtype)
        words, scales, biases = affine.pack(w, width, group)
        exact = w.astype(np.float64)
        error = np.abs(affine.unpack(words, scales, biases, width, group) - exact).reshape(-1, group).max(-1)
        groups = exact.reshape(-1, group)
        step = np.maximum(np.ptp(groups, axis=-1) / last, 1e-7)
        stored = (last * np.abs(scales.astype(np.float64)) + np.abs(biases.astype(np.float64))).reshape(-1)
        assert (error <= step + 2 * rounding * stored + 2.0**-24).all(), name


@pytest.mark.parametrize(("width", "group"), ALL)
def test_codes_survive_a_round_trip(width: int, group: int):
    """Groups that use the first and the last code, zero on a code nearer the last: nothing to adjust."""
    rng, last = np.random.default_rng(4), 2**width - 1
    codes = rng.integers(0, last + 1, (6, 2 * group), dtype=np.uint8)
    codes[:, ::group], codes[:, 1::group] = 0, last
    scales = np.exp2(rng.integers(-9, 3, (6, 2))).astype(np.float32) * rng.choice(np.float32([-1, 1]), (6, 2))
    biases = -scales * rng.integers(last // 2 + 1, last + 1, (6, 2)).astype(np.float32)
    words = bits.pack(codes, width)
    again = affine.pack(affine.unpack(words, scales, biases, width, group), width, group)
    assert all(np.array_equal(a, b) for a, b in zip(again, (words, scales, biases), strict=True))


def test_experts_strides_and_pieces_do_not_show(monkeypatch):
    w = normal(5, 3, 10, 384, dtype="bfloat16")
    whole = affine.pack(w, 3, 64)
    each = [affine.pack(expert, 3, 64) for expert in w]
    assert all(np.array_equal(a, np.stack(b)) for a, b in zip(whole, zip(*each, strict=True), strict=True))
    odd = affine.pack(w[:, ::2], 3, 64)
    assert all(np.array_equal(a[:, ::2], b) for a, b in zip(whole, odd, strict=True))
    values = affine.unpack(*whole, 3, 64)
    assert np.array_equal(affine.unpack(*odd, 3, 64), values[:, ::2])
    monkeypatch.setattr(chunks, "CHUNK", 256)
    assert all(np.array_equal(a, b) for a, b in zip(whole, affine.pack(w, 3, 64), strict=True))
    assert np.array_equal(affine.unpack(*whole, 3, 64), values)


def test_the_source_is_left_alone():
    w = normal(6, 4, 128)
    before = w.copy()
    w.flags.writeable = False
    affine.pack(w, 4, 32)
    assert np.array_equal(w, before)


def test_what_does_not_fit_is_refused():
    with pytest.raises(AssertionError, match="do not divide"):
        affine.pack(normal(0, 4, 96), 4, 64)
    with pytest.raises(AssertionError, match="7 bits"):
        affine.pack(normal(0, 4, 64), 7, 64)
    with pytest.raises(AssertionError, match="groups of 16"):
        affine.pack(normal(0, 4, 64), 4, 16)
    with pytest.raises(AssertionError, match="float64"):
        affine.pack(np.zeros((4, 64)), 4, 64)
    words, scales, biases = affine.pack(normal(0, 4, 128), 4, 64)
    with pytest.raises(AssertionError, match="do not fit"):
        affine.unpack(words, scales, biases, 4, 32)
