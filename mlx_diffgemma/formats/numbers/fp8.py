"""FP8: e4m3fn codes (one sign, four exponent, three mantissa bits; no infinity, largest 448) and a scale to multiply.

Two layouts of the scales: one for each output channel (compressed-tensors ``float-quantized``, bfloat16 [..., out, 1])
or one for each block of 128 by 128 (transformers' fine-grained FP8, ``weight_scale_inv``, float32).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .chunks import CHUNK, check_groups, flat, spans

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = np.float32(448)
VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)  # what each code stands for
ZERO_CHANNEL = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)  # compressed-tensors' scale of a channel of zeros


def pack(
    w: np.ndarray, block: tuple[int, int] | None = None, scale_dtype: np.dtype | type | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize float32, float16 or bfloat16 [..., out, in].

    Without ``block``: a scale for each output channel, amax / 448 rounded to ``scale_dtype`` (bfloat16), as
    llm-compressor writes it; a channel of zeros has the scale 2**-7 and codes of zero. The codes are w / scale in
    float32, clamped to 448 and rounded once to the nearest, ties to even.

    With ``block``: transformers' rule, to the bit. Its factor is (1 / amax) * 448, the codes are w * factor rounded
    likewise, the stored scale is 1 / factor in ``scale_dtype`` (float32); a block of zeros has the scale 1. The last
    blocks may be partial, where transformers leaves a weight as it is.

    Returns:
        codes float8_e4m3fn [..., out, in]; scales [..., out, 1] or [..., ceil(out / rows), ceil(in / columns)].
        The error is at most 1/16 of the value (half a step of three mantissa bits), or 2**-10 * scale for values
        below 2**-6 * scale; where the rounding of the scale lets w / scale pass 448, the part beyond it as well.
    """
    check_groups(w, 1)
    assert w.ndim >= 2, f"a weight is [..., out, in], not {w.shape}"
    codes = np.empty(w.shape, np.uint8)
    if block is None:
        scales = _pack_channels(w, codes, np.dtype(scale_dtype or ml_dtypes.bfloat16))
    else:
        scales = _pack_blocks(w, codes, block).astype(scale_dtype or np.float32)
    return codes.view(E4M3), scales


def unpack(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int] | None = None) -> np.ndarray:
    """code * scale in float32 -> [..., out, in]; scales of any float dtype, codes as float8_e4m3fn or its bytes."""
    w = decode(codes)
    if block is None:
        assert scales.shape == (*w.shape[:-1], 1), f"channel scales {scales.shape} do not fit a weight {w.shape}"
        w *= scales.astype(np.float32)
        return w
    grid = tuple(-(-size // step) for size, step in zip(w.shape[-2:], block, strict=True))
    assert scales.shape == (*w.shape[:-2], *grid), f"block scales {scales.shape} do not fit a weight {w.shape}"
    columns = np.repeat(scales.astype(np.float32), block[1], axis=-1)[..., : w.shape[-1]]
    for row in range(grid[0]):
        w[..., row * block[0] : (row + 1) * block[0], :] *= columns[..., row : row + 1, :]
    return w


def encode(x: np.ndarray) -> np.ndarray:
    """float32 -> e4m3fn codes, uint8: to the nearest, ties to even; beyond 448 saturates, and no code is ever nan."""
    size = np.abs(x).view(np.uint32)
    np.minimum(size, LARGEST.view(np.uint32), out=size)  # as integers, where infinity and nan are large too
    # Above 2**-6 a code is the top of the float32: drop 20 bits of the mantissa and 127 - 7 of the exponent.
    code = size >> np.uint32(20)
    code &= np.uint32(1)
    code += size
    code += np.uint32(0x7FFFF + 2**32 - (120 << 23))  # half of what is dropped, less a bit where the rest is even
    code >>= np.uint32(20)
    # Below, codes are evenly spaced by 2**-9, which is float32's own spacing just above 2**14.
    anchor = np.float32(2**14)
    small = (size.view(np.float32) + anchor).view(np.uint32)
    small -= anchor.view(np.uint32)
    np.copyto(code, small, where=size < np.float32(2**-6).view(np.uint32))
    codes = code.astype(np.uint8)
    codes |= np.signbit(x).view(np.uint8) * np.uint8(128)
    return codes


def decode(codes: np.ndarray) -> np.ndarray:
    """e4m3fn codes, as that dtype or as bytes -> float32 of the same shape."""
    assert codes.dtype.itemsize == 1, f"e4m3 codes are bytes, not {codes.dtype}"
    w = np.empty(codes.shape, np.float32)
    source, target = flat(codes).view(np.uint8), w.reshape(-1)
    for part in spans(target.size):
        np.take(VALUES, source[part], out=target[part], mode="clip")
    return w


def _pack_channels(w: np.ndarray, codes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Fill ``codes`` and return the scales [..., out, 1]. Works on some rows at a time."""
    rows, target = w.reshape(-1, w.shape[-1]), codes.reshape(-1, w.shape[-1])
    scales = np.empty((rows.shape[0], 1), dtype)
    step = max(1, CHUNK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        x = rows[start : start + step].astype(np.float32)
        scale = (np.abs(x).max(-1, keepdims=True, initial=0) / LARGEST).astype(dtype)
        scale[scale == 0] = ZERO_CHANNEL
        x /= scale.astype(np.float32)
        scales[start : start + step], target[start : start + step] = scale, encode(x)
    return scales.reshape(*w.shape[:-1], 1)


def _pack_blocks(w: np.ndarray, codes: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Fill ``codes`` and return the scales [..., grid]. Works on one row of blocks at a time."""
    out, size = w.shape[-2:]
    experts, target = w.reshape(-1, out, size), codes.reshape(-1, out, size)
    edges = np.arange(0, size, block[1])
    scales = np.empty((len(experts), -(-out // block[0]), len(edges)), np.float32)
    for e in range(len(experts)):
        for row in range(scales.shape[1]):
            rows = slice(row * block[0], (row + 1) * block[0])
            x = experts[e, rows].astype(np.float32)
            amax = np.maximum.reduceat(np.abs(x).max(0), edges)
            with np.errstate(over="ignore", invalid="ignore"):  # amax below 1 / the largest float32: codes of 448
                factor = np.where(amax > 0, np.float32(1) / np.where(amax > 0, amax, 1) * LARGEST, np.float32(1))
                x *= np.repeat(factor, block[1])[:size]
            target[e, rows], scales[e, row] = encode(x), np.float32(1) / factor
    return scales.reshape(*w.shape[:-2], *scales.shape[1:])
