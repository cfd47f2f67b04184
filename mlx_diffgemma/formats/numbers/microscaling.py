"""Small floats with a scale for each short group along the input: mxfp4, mxfp8 (OCP microscaling) and NVIDIA's nvfp4.

    mxfp4: e2m1 codes, groups of 32, scales e8m0 (powers of two)
    mxfp8: e4m3 codes, groups of 32, scales e8m0
    nvfp4: e2m1 codes, groups of 16, scales e4m3, and optionally one more float32 scale for the tensor or each row

Codes lie in uint32 words, the first in the lowest bits; the same bytes are MLX's weights, and ModelOpt's and
compressed-tensors' packed uint8. e2m1 stands for 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (code + 8).

The packers equal ``mx.quantize`` of mlx 0.32.4 on the CPU, bit for bit. It rounds amax / largest to the dtype of the
weight before the scale is made, e8m0 scales upwards so that no value saturates, and ties between two e2m1 codes to the
smaller one, never writing a negative zero. Where its own numbers break down, ours differ: an e8m0 scale of 2**-127 or
less, which wraps round there, is held at 2**-126; a value beyond 2**24 times its nvfp4 scale, which float32 cannot tell
apart from its neighbours there, is the largest code. Weights must be finite.
"""

from __future__ import annotations

import numpy as np

from . import fp8
from .chunks import check_groups, flat, group_reduce, parts, scaled, spans

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
MX_GROUP, NV_GROUP = 32, 16
NV_LARGEST = np.float32(6 * 448)  # the largest code times the largest scale

# A byte of two e2m1 codes -> two float32, carried as one 8-byte item: half as many look-ups.
_PAIRS = E2M1[np.stack([np.arange(256) & 15, np.arange(256) >> 4], -1)].view(np.uint64).reshape(-1)
_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))


def pack_mxfp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., in] float32, float16 or bfloat16 -> words uint32 [..., in / 8], scales uint8 (e8m0) [..., in / 32].

    The error is at most scale (half the widest step of e2m1, from 4 to 6) and scale <= amax / 3.
    """
    return _pack_mx(w, np.float32(6), 4)


def pack_mxfp8(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., in] float32, float16 or bfloat16 -> words uint32 [..., in / 4], scales uint8 (e8m0) [..., in / 32].

    The error is at most 1/16 of the value, or 2**-10 * scale for values below 2**-6 * scale.
    """
    return _pack_mx(w, fp8.LARGEST, 8)


def pack_nvfp4(
    w: np.ndarray, global_scale: np.ndarray | float | None = None, *, mlx_global_scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """[..., out, in] float32, float16 or bfloat16 -> words uint32 [..., in / 8], scales uint8 (e4m3) [..., in / 16].

    Without a further argument, as ``mx.quantize(w, mode="nvfp4")``. The error is at most the group's scale (half the
    step from 4 to 6), for bfloat16 1/64 more because MLX rounds the quotient to the weight's dtype. That holds where
    e4m3 keeps three bits of the scale, for amax from 6 * 2**-6 to 2688; a global scale moves the range.

    Args:
        global_scale: float32 that multiplies every row of the result, broadcastable to [..., out], usually from
            ``nvfp4_global_scale``. The codes are then ModelOpt's (``NVFP4QTensor.quantize``) and not MLX's: scales
            amax / (6 * global) clamped to [2**-9, 448], the quotient w / (scale * global) taken in float32 and
            rounded to even. compressed-tensors stores the reciprocal of this number.
        mlx_global_scale: what ``mx.quantize`` takes as ``global_scale``: the largest magnitude of the tensor. The
            codes are MLX's. Read them with ``global_scale = mlx_global_scale / 2688``.
    """
    assert global_scale is None or mlx_global_scale is None, "either our global scale or MLX's"
    check_groups(w, NV_GROUP)
    words, scales = _outputs(w, NV_GROUP, 4)
    stream, target = words.reshape(-1).view(np.uint8), scales.reshape(-1)
    rows = None if global_scale is None else _per_group(global_scale, scales.shape)
    encode = np.float32(1) if mlx_global_scale is None else NV_LARGEST / np.float32(mlx_global_scale)
    for part, x in parts(w):
        groups = scaled(part, 1, NV_GROUP)
        amax = group_reduce(np.maximum, np.abs(x), NV_GROUP)
        if rows is None:
            target[groups] = _nvfp4_mlx(x, amax, encode, w.dtype)
            codes = _e2m1(x, to_even=False)
        else:
            target[groups] = _nvfp4_modelopt(x, amax, rows[groups])
            codes = _e2m1(x, to_even=True)
        stream[scaled(part, 1, 2)] = codes
    return words, scales


def nvfp4_global_scale(w: np.ndarray) -> np.float32:
    """ModelOpt's ``weight_scale_2`` of one tensor: amax / (6 * 448). A tensor of zeros has 1, which is as good."""
    amax = max((max(x.max(), -x.min()) for _, x in parts(w)), default=np.float32(0))
    return np.float32(amax / NV_LARGEST) if amax > 0 else np.float32(1)


def unpack_mxfp4(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """words uint32 [..., in / 8], scales uint8 (e8m0) [..., in / 32] -> float32 [..., in]."""
    return _unpack(words, np.take(_E8M0, scales), 4)


def unpack_mxfp8(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """words uint32 [..., in / 4], scales uint8 (e8m0) [..., in / 32] -> float32 [..., in]."""
    return _unpack(words, np.take(_E8M0, scales), 8)


def unpack_nvfp4(words: np.ndarray, scales: np.ndarray, global_scale: np.ndarray | float | None = None) -> np.ndarray:
    """words uint32 [..., out, in / 8], scales uint8 (e4m3) [..., out, in / 16] -> float32 [..., out, in].

    ``global_scale`` is float32, broadcastable to [..., out], and multiplies each row. The two scales are multiplied
    first and rounded to float32, as MLX and ModelOpt do.
    """
    groups = np.take(fp8.VALUES, scales)
    if global_scale is not None:
        groups *= np.asarray(global_scale, np.float32)[..., None]
    return _unpack(words, groups, 4)


def _outputs(w: np.ndarray, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    rows, n = w.shape[:-1], w.shape[-1]
    return np.empty((*rows, n * bits // 32), np.uint32), np.empty((*rows, n // group_size), np.uint8)


def _pack_mx(w: np.ndarray, largest: np.float32, bits: int) -> tuple[np.ndarray, np.ndarray]:
    check_groups(w, MX_GROUP)
    words, scales = _outputs(w, MX_GROUP, bits)
    stream, target = words.reshape(-1).view(np.uint8), scales.reshape(-1)
    for part, x in parts(w):
        scale = (group_reduce(np.maximum, np.abs(x), MX_GROUP) / largest).astype(w.dtype).astype(np.float32)
        # The exponent of the next power of two, read off the float; a group of zeros has the scale 1.
        exponent = np.where(scale > 0, (scale.view(np.uint32) + np.uint32(0x7FFFFF)) >> np.uint32(23), np.uint32(127))
        x.reshape(-1, MX_GROUP)[:] *= ((np.uint32(254) - exponent) << np.uint32(23)).view(np.float32)[:, None]
        target[scaled(part, 1, MX_GROUP)] = exponent
        stream[scaled(part, bits, 8)] = fp8.encode(x) if bits == 8 else _e2m1(x, to_even=False)
    return words, scales


def _nvfp4_mlx(x: np.ndarray, amax: np.ndarray, encode: np.float32, dtype: np.dtype) -> np.ndarray:
    """Divide ``x`` by its scales in place and return the scales; the quotient is rounded to ``dtype`` on the way."""
    scales = fp8.encode((amax / np.float32(6)).astype(dtype).astype(np.float32) * encode)
    with np.errstate(over="ignore"):
        x.reshape(-1, NV_GROUP)[:] /= _divisor(np.take(fp8.VALUES, scales))
        x[:] = x.astype(dtype)
    x *= encode
    return scales


def _nvfp4_modelopt(x: np.ndarray, amax: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Divide ``x`` by its scales in place and return them; ``rows`` is the global scale of each group."""
    scale = amax / (np.float32(6) * rows)
    scales = fp8.encode(np.clip(np.where(scale == 0, np.float32(1), scale), np.float32(2**-9), fp8.LARGEST))
    x.reshape(-1, NV_GROUP)[:] /= _divisor(np.take(fp8.VALUES, scales) * rows)
    return scales


def _divisor(scale: np.ndarray) -> np.ndarray:
    """[groups, 1]. What has no scale is too small to be anything but zero."""
    return np.where(scale == 0, np.float32(np.inf), scale)[:, None]


def _per_group(global_scale: np.ndarray | float, shape: tuple[int, ...]) -> np.ndarray:
    """One global scale for each group, flat, from an array that broadcasts to the rows."""
    rows = np.asarray(global_scale, np.float32)
    return np.broadcast_to(rows[..., None], shape).reshape(-1)


def _e2m1(x: np.ndarray, to_even: bool) -> np.ndarray:
    """float32 [n] -> two codes a byte, uint8 [n / 2], the first in the low half; overwrites ``x``."""
    # ModelOpt keeps the sign of what rounds to zero, MLX does not.
    codes = (x < (0 if to_even else -MIDPOINTS[0])).view(np.uint8)
    codes *= np.uint8(8)
    size, above = np.abs(x, out=x), np.empty(x.size, np.bool_)
    for k, middle in enumerate(MIDPOINTS):  # a code counts the midpoints below the value
        compare = np.greater_equal if to_even and k % 2 else np.greater
        codes += compare(size, middle, out=above).view(np.uint8)
    pairs = codes.view(np.uint16)
    pairs |= pairs >> np.uint16(4)
    return pairs.astype(np.uint8)


def _unpack(words: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """Codes times the float32 scale of their group."""
    n = words.shape[-1] * 32 // bits
    group_size = n // max(1, scales.shape[-1])
    assert n == 0 or (scales.shape[:-1] == words.shape[:-1] and group_size in (MX_GROUP, NV_GROUP)), (
        f"words {words.shape} of {bits} bits do not fit scales {scales.shape}"
    )
    w = np.empty((*words.shape[:-1], n), np.float32)
    target, stream, groups = w.reshape(-1), flat(words).view(np.uint8), scales.reshape(-1)
    for part in spans(target.size):
        x, codes = target[part], stream[scaled(part, bits, 8)]
        if bits == 8:
            np.take(fp8.VALUES, codes, out=x, mode="clip")
        else:
            np.take(_PAIRS, codes, out=x.view(np.uint64), mode="clip")
        x.reshape(-1, group_size)[:] *= groups[scaled(part, 1, group_size)][:, None]
    return w
