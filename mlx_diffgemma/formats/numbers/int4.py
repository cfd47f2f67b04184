"""compressed-tensors' integers, and their exact form in MLX's affine format.

``pack-quantized`` stores int4 with 8 added, eight codes in an int32, the first in the lowest bits. That is MLX's 4-bit
word already, so only the bias has to be made: code - 8 = stored, w = stored * scale - 8 * scale, and 8 * scale is exact
in any float format. Groups run along the input; the scales are [..., out, in / group].
"""

from __future__ import annotations

import numpy as np

from . import bits as streams

ZERO = 8  # the stored code of zero


def pack(codes: np.ndarray) -> np.ndarray:
    """int8 in [-8, 7], [..., out, in] -> int32 [..., out, ceil(in / 8)], the last word filled up with zero bits."""
    n = codes.shape[-1]
    stored = np.zeros((*codes.shape[:-1], -(-n // 8) * 8), np.uint8)
    stored[..., :n] = codes.astype(np.int8, copy=False).view(np.uint8) + np.uint8(ZERO)
    return streams.pack(stored, 4).view(np.int32)


def unpack(packed: np.ndarray, in_features: int) -> np.ndarray:
    """int32 [..., out, ceil(in / 8)] -> int8 in [-8, 7], [..., out, in]."""
    _check(packed)
    assert packed.shape[-1] == -(-in_features // 8), f"{packed.shape} does not hold rows of {in_features} codes"
    stored = streams.unpack(np.ascontiguousarray(packed).view(np.uint32), 4)[..., :in_features]
    return (stored - np.uint8(ZERO)).view(np.int8)


def unpack_zero_points(packed: np.ndarray, out_features: int) -> np.ndarray:
    """int32 [..., ceil(out / 8), groups], packed along the output -> int8 [..., out, groups]."""
    return np.swapaxes(unpack(np.swapaxes(packed, -1, -2), out_features), -1, -2)


def to_affine(
    packed: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same weight for MLX: words uint32 [..., out, in / 8], scales and biases [..., out, groups].

    Without zero points (symmetric) both keep the dtype of ``scales``. With zero points, int8 [..., out, groups] in
    [-8, 7], w = (code - zero) * scale and the bias needs four bits more than the scale: both are float32, which holds
    it exactly.
    """
    _check(packed)
    words = np.ascontiguousarray(packed).view(np.uint32)
    if zero_points is None:
        return words, scales, scales * scales.dtype.type(-ZERO)
    exact = scales.astype(np.float32)
    return words, exact, -(zero_points.astype(np.float32) + np.float32(ZERO)) * exact


def int8_to_affine(
    codes: np.ndarray, row_scales: np.ndarray, group_size: int = 64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int8 [..., out, in] with one scale a row [..., out, 1] -> MLX's 8-bit words, scales and biases, exactly.

    The words are code + 128; each group repeats the row's scale, and the bias -128 * scale is exact.
    """
    rows, n = codes.shape[:-1], codes.shape[-1]
    assert codes.dtype == np.int8 and row_scales.shape == (*rows, 1), (
        f"int8 {codes.shape} and scales {row_scales.shape}"
    )
    assert n % group_size == 0, f"rows of {n} do not divide by groups of {group_size}"
    words = (np.ascontiguousarray(codes).view(np.uint8) ^ np.uint8(128)).view(np.uint32)
    scales = np.repeat(row_scales, n // group_size, axis=-1)
    return words, scales, scales * scales.dtype.type(-128)


def _check(packed: np.ndarray) -> None:
    assert packed.dtype == np.int32, f"packed int4 is int32, not {packed.dtype}"
