"""compressed-tensors' int4 and int8, and their exact form in MLX's affine format."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.formats.numbers import affine, int4
from tests.formats.numbers.arrays import BFLOAT16, DTYPES, to_mlx


def draw(*shape: int, low: int = -8, high: int = 7) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(low, high + 1, shape).astype(np.int8)


def word(codes: np.ndarray) -> int:
    """Eight codes by the rule in words: 8 is added, and the first takes the lowest four bits."""
    return sum((int(code) + 8) << 4 * k for k, code in enumerate(codes))


def test_words_by_the_rule():
    codes = draw(3, 5, 24)
    packed = int4.pack(codes)
    assert packed.dtype == np.int32 and packed.shape == (3, 5, 3)
    assert all(
        int(packed.view(np.uint32)[at]) == word(codes[at[0], at[1], 8 * at[2] : 8 * at[2] + 8])
        for at in np.ndindex(packed.shape)
    )


@pytest.mark.parametrize("n", [8, 64, 100, 3])
def test_round_trip(n: int):
    codes = draw(7, n)
    packed = int4.pack(codes)
    assert np.array_equal(int4.unpack(packed, n), codes)
    assert np.array_equal(int4.pack(int4.unpack(packed, n)), packed)


def test_zero_points_lie_along_the_output():
    zero_points = draw(12, 5)
    packed = np.swapaxes(int4.pack(np.swapaxes(zero_points, 0, 1)), 0, 1)
    assert packed.shape == (2, 5)
    assert np.array_equal(int4.unpack_zero_points(packed, 12), zero_points)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_int4_is_affine_exactly(dtype: str, group: int):
    codes = draw(2, 6, 256)
    scales = np.random.default_rng(1).uniform(1e-3, 0.1, (2, 6, 256 // group)).astype(DTYPES[dtype])
    packed = int4.pack(codes)
    words, ours, biases = int4.to_affine(packed, scales)
    assert ours.dtype == biases.dtype == scales.dtype
    assert np.array_equal(words, packed.view(np.uint32)) and np.shares_memory(words, packed)
    assert np.array_equal(biases.astype(np.float64), -8 * scales.astype(np.float64))
    exact = codes * np.repeat(scales.astype(np.float64), group, -1)
    values = affine.unpack(words, ours, biases, 4, group)
    # A float32 scale has no bits to spare for the product; the others have.
    assert np.abs(values - exact).max() <= (2.0**-24 * 16 * 0.1 if dtype == "float32" else 0)
    theirs = mx.dequantize(
        *(to_mlx(part) for part in (words, ours.astype(np.float32), biases.astype(np.float32))),
        group_size=group,
        bits=4,
        stream=mx.cpu,
    )
    assert np.array_equal(values, np.array(theirs))


def test_zero_points_are_exact_in_float32():
    codes, zero_points = draw(6, 128), draw(6, 4)
    scales = np.random.default_rng(2).uniform(1e-3, 0.1, (6, 4)).astype(BFLOAT16)
    words, ours, biases = int4.to_affine(int4.pack(codes), scales, zero_points)
    assert ours.dtype == biases.dtype == np.float32
    exact = (codes - np.repeat(zero_points.astype(np.float64), 32, -1)) * np.repeat(scales.astype(np.float64), 32, -1)
    assert np.array_equal(affine.unpack(words, ours, biases, 4, 32), exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_int8_is_affine_exactly(dtype: str):
    codes = draw(2, 5, 192, low=-128, high=127)
    scales = np.random.default_rng(3).uniform(1e-4, 0.01, (2, 5, 1)).astype(DTYPES[dtype])
    parts = int4.int8_to_affine(codes, scales)
    assert parts[0].shape == (2, 5, 48) and parts[1].shape == parts[2].shape == (2, 5, 3)
    assert parts[1].dtype == parts[2].dtype == scales.dtype
    assert np.array_equal(affine.unpack(*parts, 8, 64), codes * scales.astype(np.float64))
    turned = np.ascontiguousarray(codes.swapaxes(1, 2)).swapaxes(1, 2)
    assert np.array_equal(int4.int8_to_affine(turned, scales)[0], parts[0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(AssertionError, match="int32"):
        int4.unpack(np.zeros((2, 4), np.uint32), 32)
    with pytest.raises(AssertionError, match="does not hold"):
        int4.unpack(np.zeros((2, 4), np.int32), 40)
    with pytest.raises(AssertionError, match="do not divide"):
        int4.int8_to_affine(np.zeros((2, 96), np.int8), np.ones((2, 1), np.float32))
    with pytest.raises(AssertionError, match="scales"):
        int4.int8_to_affine(np.zeros((2, 64), np.int8), np.ones(2, np.float32))
