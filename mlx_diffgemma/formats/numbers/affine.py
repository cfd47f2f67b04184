"""MLX's affine format: w = code * scale + bias, one scale and bias for each group of 32, 64 or 128 along the input.

Equal to ``mx.quantize(w, group_size, bits, mode="affine")`` of mlx 0.32.4 on the CPU, bit for bit, for finite weights.
That kernel works in float32 whatever the weight's dtype, codes with the unrounded scale, and rounds scale and bias to
the weight's dtype last. The end of the group's range that is larger in magnitude is kept exactly: it is the bias, and
the scale counts from there, so the scale is negative where the largest value is the positive one.
"""

from __future__ import annotations

import numpy as np

from . import bits as streams
from .chunks import check_groups, flat, group_reduce, parts, scaled, spans

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
SMALLEST_SCALE = np.float32(1e-7)


def pack(w: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize float32, float16 or bfloat16 [..., out, in].

    Returns:
        words uint32 [..., out, in * bits / 32]; scales and biases [..., out, in / group_size] in the dtype of ``w``.
        The error is at most one step, (max - min) / (2**bits - 1) or 1e-7, and mostly half of one: MLX adjusts the
        step so that zero falls on a code, which may put the far end of the range out of reach. The rounding of scale
        and bias to the dtype comes on top.
    """
    assert bits in BITS and group_size in GROUP_SIZES, (
        f"MLX has no affine format of {bits} bits, groups of {group_size}"
    )
    check_groups(w, group_size)
    rows, n = w.shape[:-1], w.shape[-1]
    words = np.empty((*rows, n * bits // 32), np.uint32)
    scales, biases = (np.empty((*rows, n // group_size), w.dtype) for _ in range(2))
    stream, one, other = words.reshape(-1).view(np.uint8), scales.reshape(-1), biases.reshape(-1)
    with np.errstate(all="ignore"):  # a range beyond float32 gives an infinite scale, in MLX too
        for part, x in parts(w):
            groups = scaled(part, 1, group_size)
            scale, bias = _range(x, 2**bits - 1, group_size)
            one[groups], other[groups] = scale, bias
            streams.squeeze(_codes(x, scale, bias, 2**bits - 1, group_size), bits, stream[scaled(part, bits, 8)])
    return words, scales, biases


def unpack(words: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """code * scale + bias in float32, from the stored scales and biases of any float dtype -> [..., out, in]."""
    n = words.shape[-1] * 32 // bits
    assert scales.shape == biases.shape == (*words.shape[:-1], n // group_size), (
        f"words {words.shape} of {bits} bits in groups of {group_size} do not fit scales {scales.shape}"
    )
    w = np.empty((*words.shape[:-1], n), np.float32)
    target, stream, one, other = w.reshape(-1), flat(words).view(np.uint8), flat(scales), flat(biases)
    for part in spans(target.size):
        groups, x = scaled(part, 1, group_size), target[part].reshape(-1, group_size)
        x[:] = streams.spread(stream[scaled(part, bits, 8)], bits).reshape(x.shape)
        x *= one[groups].astype(np.float32)[:, None]
        x += other[groups].astype(np.float32)[:, None]
    return w


def _range(x: np.ndarray, last: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of each group, float32 [groups]; ``last`` is the largest code."""
    high, low = (group_reduce(operation, x, group_size) for operation in (np.maximum, np.minimum))
    scale = np.maximum((high - low) / np.float32(last), SMALLEST_SCALE)
    from_low = np.abs(low) > np.abs(high)
    scale, edge = np.where(from_low, scale, -scale), np.where(from_low, low, high)
    zero = np.rint(edge / scale)  # the code of zero: the scale is adjusted so that it is a whole number
    return np.where(zero != 0, edge / zero, scale), np.where(zero != 0, edge, np.float32(0))


def _codes(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, last: int, group_size: int) -> np.ndarray:
    """The codes, uint8 [n]; overwrites ``x``."""
    steps = x.reshape(-1, group_size)
    steps -= bias[:, None]
    steps /= scale[:, None]
    np.rint(steps, out=steps)
    np.clip(steps, 0, last, out=steps)
    return steps.astype(np.uint8).reshape(-1)
