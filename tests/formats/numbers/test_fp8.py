"""FP8 against torch's own cast, llm-compressor's channel rule and transformers' block rule."""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from mlx_diffgemma.formats.numbers import chunks, fp8
from tests.formats.numbers.arrays import BFLOAT16, DTYPES, STRUCTURED, cast, normal, weights

BLOCK = (128, 128)


def torch_codes(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.copy()).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def test_encode_equals_torch_at_every_midpoint():
    values = fp8.VALUES[:127]
    middle = (values[1:] + values[:-1]) / 2
    near = [np.nextafter(middle, np.float32(end)) for end in (-1, 1000)]
    x = np.concatenate([values, middle, *near, np.float32([448, 449, 464, 500, 1e30, 3.4e38, 1e-45])])
    x = np.concatenate([x, -x])
    assert np.array_equal(fp8.encode(x), torch_codes(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_encode_equals_torch_on_every_value_of_two_bytes(dtype: str):
    x = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float32)
    x = x[~np.isnan(x)]
    assert np.array_equal(fp8.encode(x), torch_codes(x))


def test_no_code_is_nan():
    codes = fp8.encode(np.float32([np.nan, -np.nan, np.inf, -np.inf, 1e38, 480]))
    assert set(codes.tolist()) == {126, 254}


def test_decode_equals_torch():
    codes = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(fp8.decode(codes), values, equal_nan=True)
    assert np.array_equal(fp8.decode(codes.view(fp8.E4M3)), values, equal_nan=True)


def by_channel(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """llm-compressor's rule, written from its formula: the scale in bfloat16, 2**-7 for a channel of zeros."""
    x = torch.from_numpy(w.astype(np.float32))
    scale = (x.abs().amax(-1, keepdim=True) / 448).bfloat16()
    scale[scale == 0] = torch.finfo(torch.bfloat16).eps
    codes = (x / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).numpy(), scale.float().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_scales(dtype: str):
    for name, w in {"random": normal(1, 64, 300), **STRUCTURED}.items():
        w = cast(w, dtype)
        codes, scales = fp8.pack(w)
        assert codes.dtype == fp8.E4M3 and scales.dtype == BFLOAT16 and scales.shape == (len(w), 1)
        theirs = by_channel(w)
        assert np.array_equal(codes.view(np.uint8), theirs[0]), name
        assert np.array_equal(scales.astype(np.float32), theirs[1]), name
        assert np.array_equal(fp8.unpack(codes, scales), fp8.decode(codes) * theirs[1])


def test_a_channel_of_zeros():
    codes, scales = fp8.pack(np.zeros((2, 8), BFLOAT16))
    assert (scales == 2**-7).all() and not fp8.unpack(codes, scales).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_scales_are_those_of_transformers(dtype: str):
    config = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=BLOCK, scale_fmt="float"))
    w = normal(2, 2, 256, 384, dtype=dtype)
    w[0, :128, :128] = 0
    w[1, 0, 0] = 50
    theirs = Fp8Quantize(config).convert({"x.weight": torch.from_numpy(w.astype(np.float32))})
    codes, scales = fp8.pack(w, BLOCK)
    assert scales.dtype == np.float32 and scales[0, 0, 0] == 1
    assert np.array_equal(scales, theirs["x.weight_scale_inv"].numpy())
    assert np.array_equal(codes.view(np.uint8), theirs["x.weight"].view(torch.uint8).numpy())


@pytest.mark.parametrize("shape", [(200, 300), (128, 64), (5, 7), (130, 128), (2, 176, 704)])
def test_partial_blocks(shape: tuple[int, ...]):
    w = normal(3, *shape, dtype="bfloat16")
    codes, scales = fp8.pack(w, BLOCK)
    values = fp8.unpack(codes, scales, BLOCK)
    assert scales.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    for row in range(scales.shape[-2]):
        for column in range(scales.shape[-1]):
            at = (..., slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
            alone, scale = fp8.pack(w[at], BLOCK)
            assert np.array_equal(scale[..., 0, 0], scales[..., row, column])
            assert np.array_equal(codes[at].view(np.uint8), alone.view(np.uint8))
            assert np.array_equal(values[at], fp8.decode(alone) * scale)


@given(weights(64), st.sampled_from([None, (1, 32), BLOCK]), st.sampled_from(sorted(DTYPES)))
@settings(max_examples=100, deadline=None)
def test_never_nan(w: np.ndarray, block: tuple[int, int] | None, dtype: str):
    with np.errstate(over="ignore"):
        codes, _ = fp8.pack(cast(w, dtype), block)
    assert not np.isnan(fp8.decode(codes)).any()


@pytest.mark.parametrize("block", [None, BLOCK])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_within_the_bound(dtype: str, block: tuple[int, int] | None):
    for name in ("normal", "small", "one outlier", "constant", "zero", "ramp", "sign-symmetric"):
        w = cast(STRUCTURED[name], dtype)
        codes, scales = fp8.pack(w, block)
        exact = w.astype(np.float64)
        scale = (scales if block is None else scales.repeat(128, -1)[..., : w.shape[-1]]).astype(np.float64)
        bound = np.maximum(np.abs(exact) / 16, scale * 2.0**-10) * (1 + 1e-6)
        assert (np.abs(fp8.unpack(codes, scales, block) - exact) <= bound).all(), name


def test_codes_survive_a_round_trip():
    rng = np.random.default_rng(4)
    codes = rng.choice([c for c in range(256) if c & 127 != 127], (8, 96)).astype(np.uint8)
    codes[:, 5] = 126
    scales = rng.uniform(1e-4, 1, (8, 1)).astype(BFLOAT16)
    again = fp8.pack(fp8.unpack(codes, scales))
    assert np.array_equal(again[0].view(np.uint8), codes) and np.array_equal(again[1], scales)


@pytest.mark.parametrize("block", [None, BLOCK])
def test_experts_strides_and_pieces_do_not_show(block: tuple[int, int] | None, monkeypatch):
    w = normal(5, 3, 256, 160, dtype="bfloat16")
    codes, scales = fp8.pack(w, block)
    each = [fp8.pack(expert, block) for expert in w]
    assert np.array_equal(codes.view(np.uint8), np.stack([c.view(np.uint8) for c, _ in each]))
    assert np.array_equal(scales, np.stack([s for _, s in each]))
    values = fp8.unpack(codes, scales, block)
    assert np.array_equal(fp8.unpack(codes[:, :128], scales[:, : 128 if block is None else 1], block), values[:, :128])
    turned = fp8.pack(np.ascontiguousarray(w.swapaxes(0, 2)).swapaxes(0, 2), block)
    assert np.array_equal(turned[0].view(np.uint8), codes.view(np.uint8)) and np.array_equal(turned[1], scales)
    for module in (chunks, fp8):
        monkeypatch.setattr(module, "CHUNK", 256)
    again = fp8.pack(w, block)
    assert np.array_equal(again[0].view(np.uint8), codes.view(np.uint8)) and np.array_equal(again[1], scales)


def test_scales_of_another_dtype():
    w = normal(6, 8, 64)
    for block in (None, BLOCK):
        assert fp8.pack(w, block, np.float32)[1].dtype == np.float32
        assert fp8.pack(w, block, ml_dtypes.bfloat16)[1].dtype == BFLOAT16


def test_what_does_not_fit_is_refused():
    codes, scales = fp8.pack(normal(7, 8, 64))
    with pytest.raises(AssertionError, match="do not fit"):
        fp8.unpack(codes, scales[:4])
    with pytest.raises(AssertionError, match="do not fit"):
        fp8.unpack(codes, scales, (4, 4))
    with pytest.raises(AssertionError, match="int64"):
        fp8.pack(np.zeros((4, 4), np.int64))
    with pytest.raises(AssertionError, match="bytes"):
        fp8.decode(np.zeros(4, np.uint16))
