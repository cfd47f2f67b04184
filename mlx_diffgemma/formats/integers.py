"""compressed-tensors' integers as MLX's affine format, exactly; nothing is read until asked for.

A code q with zero point z stands for (q - z) * scale. Stored is q + half, half = 2^(bits - 1), in 32-bit words with the
first code in the lowest bits: MLX's words already. So scale stays, and the bias is -(z + half) * scale. Without zero
points that is a power of two times the scale and keeps its dtype; with them both become float32, which holds it.
Values are then exact for scales of 16 bits; where the file's own are float32, two roundings of float32 come in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .encoding import Encoded, grouped
from .mlx import SIZES, PerRow
from .numbers import bits as streams
from .schemes import FLOATS, I8, I32, U8, U32, expect, refuse, viewed, whole_groups
from .stored import Part, Stored


def integers(shape: tuple[int, ...], weight: Part, scale: Part, zeros: Part | None, bits: int) -> Stored:
    """A tensor of codes of ``bits`` bits. Groups that MLX has not are cut into 64 or 32 with the same scale.

    Args:
        weight: int32 words [..., out, in * bits / 32], or int8 codes [..., out, in]; checked by the caller.
        scale: a float, [1], [..., out, 1] or [..., out, groups].
        zeros: int8 [out, groups], or packed along ``out`` into int32 words as the weight is.

    Raises:
        CheckpointError: groups that are no multiple of 32, or parts that do not fit.
    """
    if scale.shape in ((), (1,)):
        scale = PerRow(scale, (*shape[:-1], 1))
    groups = scale.shape[-1]
    expect(scale, (*shape[:-1], groups), *FLOATS)
    size = shape[-1] // max(groups, 1)
    edge = size if size in SIZES else next((edge for edge in (64, 32) if size % edge == 0), 0)
    if not edge or size * groups != shape[-1]:
        refuse(scale, f"cuts rows of {shape[-1]} into {groups} groups, which are no multiples of 32")
    zero = None if zeros is None else Zeros(zeros, (*shape[:-1], groups), bits)
    encoding = grouped("affine", bits=bits, group_size=edge, dtype="float32" if zero else str(scale.dtype))
    whole_groups(weight, encoding, shape)
    half = 2 ** (bits - 1)

    def load(start: int, stop: int) -> Encoded:
        scales, biases = _affine(scale.read(start, stop), zero.read(start, stop) if zero else None, half)
        parts = {
            "weight": _words(weight.read(start, stop)),
            "scales": np.repeat(scales, size // edge, -1),
            "biases": np.repeat(biases, size // edge, -1),
        }
        return Encoded(encoding, (stop - start, *shape[1:]), parts)

    parts = (weight, scale, zeros) if zeros else (weight, scale)
    return Stored(encoding, shape, parts, load, f"int{bits} {f'g{size}' if groups > 1 else 'per channel'}", True)


def _words(array: np.ndarray) -> np.ndarray:
    """Words as they are; int8 codes with half their range added."""
    return viewed(array, U32) if array.dtype == I32 else (array.view(U8) ^ np.uint8(128)).view(U32)


def _affine(scales: np.ndarray, zeros: np.ndarray | None, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases [..., groups] of stored codes."""
    if zeros is None:
        return scales, scales * scales.dtype.type(-half)
    exact = scales.astype(np.float32)
    return exact, -(zeros.astype(np.float32) + np.float32(half)) * exact


@dataclass(frozen=True)
class Zeros:
    """Zero points [out, groups] in rows, as int8: from int8 as they are, or from words along ``out``."""

    part: Part
    shape: tuple[int, ...]
    bits: int

    def __post_init__(self) -> None:
        rows = self.shape[0]
        if self.part.dtype == I32:
            if self.bits not in (2, 4, 8) or len(self.shape) != 2:
                refuse(self.part, f"packs zero points of {self.bits} bits for {self.shape}, which is not read")
            rows = -(-rows * self.bits // 32)
        expect(self.part, (rows, *self.shape[1:]), I8, I32)

    @property
    def path(self) -> Path:
        return self.part.path

    def read(self, start: int, stop: int) -> np.ndarray:
        if self.part.dtype == I8:
            return self.part.read(start, stop)
        per = 32 // self.bits
        first = start // per
        words = np.ascontiguousarray(self.part.read(first, -(-stop // per)).T).view(U32)
        codes = streams.unpack(words, self.bits).T[start - first * per : stop - first * per]
        return (codes - np.uint8(2 ** (self.bits - 1))).view(I8)
