"""Blocks and encodings, both ways, against the gguf package's own arithmetic."""

from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mlx_diffgemma.formats.encoding import Encoded, encode, grouped
from mlx_diffgemma.formats.gguf_blocks import EXACT, cross, mxfp4_blocks, q8_0_blocks, quantize_q8_0, uncross

SETTINGS = settings(max_examples=100, deadline=None)
WEIGHTS = arrays.arrays(np.float32, (3, 2, 64), elements=st.floats(-100, 100, width=16))


def bytes_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Blocks of any bytes, but with scales that are numbers; uint8 [2, 5, row]."""
    size = gguf.GGML_QUANT_SIZES[Type[kind]][1]
    raw = rng.integers(0, 256, (2, 5, 4, size), np.uint8)
    for at in range(0, 1 if kind == "MXFP4" else 4 if kind.endswith("1") else 2, 2):
        if kind == "MXFP4":
            raw[..., 0] %= 250  # above, 6 times the scale leaves float32; 255 is no number here and a large one in ggml
        else:
            scale = rng.uniform(-9, 9, raw.shape[:-1]) * 2.0 ** rng.integers(-24, 12, raw.shape[:-1])
            raw[..., at : at + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(2, 5, -1)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("seed", range(20))
def test_every_code_and_scale_there_is(kind: str, seed: int):
    raw = bytes_of(kind, np.random.default_rng(seed))
    encoding, unpack = EXACT[kind]
    found = Encoded(encoding, (2, 5, 128), unpack(raw)).decode()
    assert np.array_equal(found, gguf.dequantize(raw, Type[kind]))


@pytest.mark.parametrize("kind", EXACT)
def test_no_rows_at_all(kind: str):
    encoding, unpack = EXACT[kind]
    parts = unpack(bytes_of(kind, np.random.default_rng(0))[:0])
    assert {n: a.shape for n, a in parts.items()} == {n: s for n, (s, _) in encoding.parts((0, 5, 128)).items()}


@SETTINGS
@given(WEIGHTS)
def test_q8_0_is_ggmls(values: np.ndarray):
    expected = gguf.quantize(values, Type.Q8_0)
    assert np.array_equal(quantize_q8_0(values), expected)
    parts = EXACT["Q8_0"][1](expected)
    assert np.array_equal(q8_0_blocks(parts), expected)


def test_halves_go_away_from_zero():
    """And what lies a hair below them does not."""
    half = np.arange(-126, 127, dtype=np.float32) + np.float32(0.5)
    values = np.concatenate([half, np.nextafter(half, np.float32(0)), np.nextafter(half, np.float32(200))])
    values = np.resize(values, (40, 32)).astype(np.float32)
    values[:, 0] = 127  # so that a step is 1
    assert np.array_equal(quantize_q8_0(values), gguf.quantize(values, Type.Q8_0))


def test_q8_0_of_other_floats():
    rng = np.random.default_rng(0)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = rng.standard_normal((4, 96)).astype(dtype)
        assert np.array_equal(quantize_q8_0(values), gguf.quantize(values.astype(np.float32), Type.Q8_0))


def test_affine_codes_that_q8_0_cannot_hold():
    """MLX's own 8-bit codes are not symmetric, and a scale may need more than float16 has."""
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    encoded = encode(values, grouped("affine", bits=8, group_size=32, dtype="float32"))
    assert q8_0_blocks(dict(encoded.parts)) is None
    parts = EXACT["Q8_0"][1](gguf.quantize(values, Type.Q8_0))
    for factor in (np.float32(1 + 2**-12), np.float32(1e6)):
        assert q8_0_blocks(parts | {name: parts[name] * factor for name in ("scales", "biases")}) is None
    assert q8_0_blocks(parts | {"biases": np.nextafter(parts["biases"], np.float32(0))}) is None


def test_mxfp4_both_ways_bit_for_bit():
    """Any bytes at all, negative zeros and scales that are no numbers among them."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (3, 7, 5 * 17), np.uint8)
    assert np.array_equal(mxfp4_blocks(EXACT["MXFP4"][1](raw)), raw)
    words = {
        "weight": rng.integers(0, 2**32, (3, 7, 20), np.uint32),
        "scales": rng.integers(0, 256, (3, 7, 5), np.uint8),
    }
    back = EXACT["MXFP4"][1](mxfp4_blocks(words))
    assert all(np.array_equal(back[name], words[name]) for name in words)


def test_crossing_is_undone():
    nibbles = np.random.default_rng(0).integers(0, 256, (4, 9, 16), np.uint8)
    assert np.array_equal(uncross(cross(nibbles)), nibbles) and np.array_equal(cross(uncross(nibbles)), nibbles)
    side = uncross(nibbles)
    assert side[0, 0, 0] & 15 == nibbles[0, 0, 0] & 15 and side[0, 0, 15] >> 4 == nibbles[0, 0, 15] >> 4
