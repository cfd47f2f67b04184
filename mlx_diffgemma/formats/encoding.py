"""How the numbers of one tensor are stored: an ``Encoding`` and, once read, its parts in an ``Encoded``.

Whatever a file calls them and however it cuts them up, readers hand out these encodings, backends run them and
converters write them. Groups run along the last axis; shapes are those of the logical tensor, [..., out, in].

=========  =======================================================================  ==============================
mode       parts                                                                    value
=========  =======================================================================  ==============================
dense      weight: dtype [..., in]                                                  weight
affine     weight: uint32 [..., in * bits / 32]; scales, biases: dtype [..., in/g]  scale * code + bias
mxfp4      weight: uint32 [..., in / 8];  scales: uint8 [..., in / 32]              e2m1 * 2^(scale - 127)
mxfp8      weight: uint32 [..., in / 4];  scales: uint8 [..., in / 32]              e4m3 * 2^(scale - 127)
nvfp4      weight: uint32 [..., in / 8];  scales: uint8 [..., in / 16]; optional    e2m1 * e4m3(scale)
           global_scale: float32 [..., out], one per row                            * global_scale
fp8        weight: e4m3 [..., out, in]; scales: dtype [..., out, 1], or             e4m3 * scale
           [..., ceil(out / b), ceil(in / b)] for blocks of b x b
=========  =======================================================================  ==============================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from .numbers import affine, fp8, microscaling

Mode = Literal["dense", "affine", "mxfp4", "mxfp8", "nvfp4", "fp8"]
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}
GROUPS = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
WIDTHS = {"mxfp4": 4, "mxfp8": 8, "nvfp4": 4}


@dataclass(frozen=True)
class Encoding:
    """A number format.

    Args:
        mode: see the table above.
        dtype: of dense weights, of affine scales and biases, of FP8 scales; a key of ``DTYPES``.
        bits, group_size: of affine codes; mxfp4, mxfp8 and nvfp4 have one of each (``grouped`` knows them).
        block: edge of FP8's square blocks, 0 for one scale per row.
        global_scale: whether nvfp4 has one per row.
    """

    mode: Mode = "dense"
    dtype: str = "bfloat16"
    bits: int = 0
    group_size: int = 0
    block: int = 0
    global_scale: bool = False

    def __str__(self) -> str:
        if self.mode == "dense":
            return self.dtype
        if self.mode == "affine":
            return f"affine {self.bits}-bit g{self.group_size}"
        if self.mode == "fp8":
            return f"fp8 block {self.block}" if self.block else "fp8 per channel"
        return self.mode + (" with global scale" if self.global_scale else "")

    @property
    def quantized(self) -> bool:
        return self.mode != "dense"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be stored so."""
        if self.mode == "dense":
            return True
        return len(shape) >= 2 and (self.mode == "fp8" or shape[-1] % self.group_size == 0)

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every part, in the order in which they are written."""
        *rows, width = shape if shape else (1,)
        if self.mode == "dense":
            return {"weight": (shape, DTYPES[self.dtype])}
        if self.mode == "fp8":
            edge, out = self.block, rows[-1]
            scales = (*rows[:-1], -(-out // edge), -(-width // edge)) if edge else (*rows, 1)
            return {"weight": (shape, np.dtype(ml_dtypes.float8_e4m3fn)), "scales": (scales, DTYPES[self.dtype])}
        grouped, words = (*rows, width // self.group_size), (*rows, width * self.bits // 32)
        found: dict[str, tuple[tuple[int, ...], np.dtype]] = {"weight": (words, np.dtype(np.uint32))}
        if self.mode == "affine":
            return found | {name: (grouped, DTYPES[self.dtype]) for name in ("scales", "biases")}
        found["scales"] = (grouped, np.dtype(np.uint8))
        if self.global_scale:
            found["global_scale"] = (tuple(rows), np.dtype(np.float32))
        return found

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(math.prod(size) * dtype.itemsize for size, dtype in self.parts(shape).values())


def dense(dtype: str = "bfloat16") -> Encoding:
    return Encoding(dtype=dtype)


def grouped(mode: Mode, *, bits: int = 0, group_size: int = 0, dtype: str = "bfloat16") -> Encoding:
    """An encoding of MLX's. ``bits`` and ``group_size`` are affine's; the other modes have one of each."""
    if mode == "affine":
        return Encoding(mode, dtype, bits, group_size)
    return Encoding(mode, dtype, WIDTHS[mode], GROUPS[mode])


@dataclass(frozen=True)
class Encoded:
    """One tensor, or a range of its first axis, in memory."""

    encoding: Encoding
    shape: tuple[int, ...]
    parts: Mapping[str, np.ndarray]

    def decode(self) -> np.ndarray:
        """float32 values, or the array itself when it is dense."""
        p, e = self.parts, self.encoding
        if e.mode == "dense":
            return p["weight"]
        if e.mode == "affine":
            return affine.unpack(p["weight"], p["scales"], p["biases"], e.bits, e.group_size)
        if e.mode == "fp8":
            return fp8.unpack(p["weight"], p["scales"], (e.block, e.block) if e.block else None)
        if e.mode == "nvfp4":
            return microscaling.unpack_nvfp4(p["weight"], p["scales"], p.get("global_scale"))
        unpack = {"mxfp4": microscaling.unpack_mxfp4, "mxfp8": microscaling.unpack_mxfp8}[e.mode]
        return unpack(p["weight"], p["scales"])


def encode(values: np.ndarray, encoding: Encoding) -> Encoded:
    """``values`` (float32, bfloat16 or float16, [..., out, in]) in ``encoding``; exact for dtypes that hold them.

    A range of the first axis gives the same codes as the whole would, with two exceptions: an nvfp4 global scale is
    one per matrix [out, in], and FP8 blocks start at the range's first row, so ranges of a matrix must be whole blocks.
    """
    if encoding.mode == "dense":
        return Encoded(encoding, values.shape, {"weight": values.astype(DTYPES[encoding.dtype], copy=False)})
    if encoding.mode == "nvfp4":
        return _encode_nvfp4(values, encoding)
    if encoding.mode == "affine":
        work = values.astype(DTYPES[encoding.dtype], copy=False)
        arrays: tuple[np.ndarray, ...] = affine.pack(work, encoding.bits, encoding.group_size)
    elif encoding.mode == "fp8":
        block = (encoding.block, encoding.block) if encoding.block else None
        arrays = fp8.pack(values, block, DTYPES[encoding.dtype])
    else:
        arrays = {"mxfp4": microscaling.pack_mxfp4, "mxfp8": microscaling.pack_mxfp8}[encoding.mode](values)
    return Encoded(encoding, values.shape, dict(zip(encoding.parts(values.shape), arrays, strict=True)))


def _encode_nvfp4(values: np.ndarray, encoding: Encoding) -> Encoded:
    if not encoding.global_scale:
        words, scales = microscaling.pack_nvfp4(values)
        return Encoded(encoding, values.shape, {"weight": words, "scales": scales})
    rows = np.empty(values.shape[:-1], np.float32)
    flat = values.reshape(-1, *values.shape[-2:])
    for at, matrix in zip(rows.reshape(len(flat), -1), flat, strict=True):
        at[:] = microscaling.nvfp4_global_scale(matrix)
    words, scales = microscaling.pack_nvfp4(values, rows)
    return Encoded(encoding, values.shape, {"weight": words, "scales": scales, "global_scale": rows})
