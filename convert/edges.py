"""From the encoding a tensor is stored in to the one it is written in, a range of rows at a time.

Where the new encoding holds the very numbers, the parts are carried over bit for bit. Everywhere else the values are
decoded and encoded again, and what that costs is measured on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mlx_diffgemma.formats.encoding import Encoded, Encoding, encode
from mlx_diffgemma.formats.stored import Stored

Edge = Literal["same", "round", "quantize", "dequantize", "requantize"]
WIDER = {("bfloat16", "float32"), ("float16", "float32")}
SAMPLED = 4
INFINITE = {"bfloat16": 0xFF00, "float16": 0xF800, "float32": 0xFF000000}  # the bits of infinity, shifted by one
SPAN = 1 << 18  # values compared at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Error:
    """Squares of what was lost, and of what was there."""

    lost: float = 0.0
    total: float = 0.0

    def __add__(self, other: Error) -> Error:
        return Error(self.lost + other.lost, self.total + other.total)

    @property
    def relative(self) -> float:
        """Root of the mean square, relative to the values' own."""
        return math.sqrt(self.lost / self.total) if self.total else 0.0


Errors = dict[str, Error]  # by row name, of the rows that were rounded


def edge(stored: Stored, encoding: Encoding, name: str) -> Edge:
    """How ``stored`` becomes ``encoding``; only ``requantize`` rounds what had been rounded to few bits before.

    ``name`` is what the file calls the encoding. Where that is a name of its own, the format holds less than any such
    encoding does (a bias, say), and only its own numbers are sure to be carried over.
    """
    own = name != str(encoding)
    if stored.format == name if own else carries(stored.encoding, encoding):
        return "same"
    if stored.quantized:
        return "requantize" if encoding.quantized else "dequantize"
    return "quantize" if encoding.quantized else "round"


def carries(source: Encoding, target: Encoding) -> bool:
    """Whether ``target`` holds every number of ``source`` exactly, by the same parts or by wider floats."""
    if source.mode == "nvfp4" and target.global_scale:
        source = replace(source, global_scale=True)  # a scale of one
    if source.mode in ("mxfp4", "mxfp8", "nvfp4"):
        source = replace(source, dtype=target.dtype)  # they store no floats
    wider = source.dtype == target.dtype or (source.dtype, target.dtype) in WIDER
    return wider and replace(source, dtype=target.dtype) == target


def convert(encoded: Encoded, target: Encoding) -> tuple[Encoded, Error | None]:
    """A range in its new encoding, and what was lost; None where nothing can be.

    Quantizing dense numbers is measured on every ``SAMPLED``-th piece of a large tensor, which tells it to a thousandth
    and takes a quarter of the time; whatever has been rounded before, or may be exact, is measured throughout.
    """
    if carries(encoded.encoding, target):
        return _carried(encoded, target), None
    values = encoded.decode()
    with np.errstate(over="ignore"):  # beyond the range of a narrower float: the error says so
        found = encode(values, target)
    return found, _error(values, found, SAMPLED if target.quantized and not encoded.encoding.quantized else 1)


def _carried(encoded: Encoded, target: Encoding) -> Encoded:
    wanted, parts = target.parts(encoded.shape), encoded.parts
    found = {name: parts[name].astype(dtype, copy=False) for name, (_, dtype) in wanted.items() if name in parts}
    if "global_scale" not in found and "global_scale" in wanted:
        found["global_scale"] = np.ones(*wanted["global_scale"])
    return Encoded(target, encoded.shape, found)


def _error(values: np.ndarray, found: Encoded, every: int) -> Error:
    """Sums of squares. What was written is decoded again, as a reader would, a few rows at a time.

    Infinite where a value is no number, measured or not.
    """
    error = Error()
    with np.errstate(over="ignore", invalid="ignore"):
        for index, (rows, piece) in enumerate(_pieces(values, found)):
            if index % every:
                error += Error() if finite(rows) else Error(math.inf, math.inf)
            else:
                x, y = rows.astype(np.float32), piece.decode().astype(np.float32, copy=False)
                y = np.subtract(x, y)
                error += Error(_squares(y), _squares(x))
    return error


def finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite: the largest bit pattern, without its sign, is below infinity's."""
    bits = values.reshape(-1).view(f"u{values.itemsize}")
    return not bits.size or int((bits + bits).max()) < INFINITE[values.dtype.name]


def _squares(x: np.ndarray) -> float:
    x *= x
    return float(x.sum())


def _pieces(values: np.ndarray, found: Encoded) -> Iterator[tuple[np.ndarray, Encoded]]:
    """The same rows [n, in] of both, or the whole where rows share their scales."""
    if found.encoding.block or values.ndim < 2:
        yield values, found
        return
    width = values.shape[-1]
    rows, step = values.reshape(-1, width), max(1, SPAN // max(1, width))
    parts = {name: part.reshape(len(rows), *part.shape[values.ndim - 1 :]) for name, part in found.parts.items()}
    for start in range(0, len(rows), step):
        cut = {name: part[start : start + step] for name, part in parts.items()}
        piece = rows[start : start + step]
        yield piece, Encoded(found.encoding, piece.shape, cut)
