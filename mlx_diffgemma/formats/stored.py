"""A canonical tensor where it lies in the files: what it is, how large, and how to read a range of it.

Every reader ends here. Files cut tensors up in their own ways (one matrix per expert, gate apart from up); ``joined``
and ``stacked`` put them together again without reading them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import CheckpointError
from .encoding import Encoded, Encoding


class Part(Protocol):
    """An array in a file: one tensor of a safetensors file, or something that unpacks a foreign one."""

    @property
    def path(self) -> Path: ...

    @property
    def name(self) -> str: ...  # as the file has it

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def nbytes(self) -> int: ...  # on disk

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``start:stop`` of the first axis."""
        ...


Read = Callable[[int, int], Encoded]


@dataclass(frozen=True)
class Stored:
    """One tensor of the table.

    Args:
        encoding: what ``read`` gives.
        shape: of the logical tensor.
        parts: where it comes from, for sizes, manifests and messages.
        load: reads rows ``start:stop`` of the first axis.
        label: the file's own format, where ``read`` gives another: ``Q4_K`` is read as float32.
        quantized: whether the file holds fewer bits than the weights had; true of a dense array from a Q4_K block.
    """

    encoding: Encoding
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    load: Read
    label: str = ""
    quantized: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for part in self.parts)

    @property
    def format(self) -> str:
        return self.label or str(self.encoding)

    def read(self, start: int = 0, stop: int | None = None) -> Encoded:
        """Rows ``start:stop`` of the first axis, all by default.

        Views of the file where it holds the parts as they are; only the touched pages are then in memory.
        """
        return self.load(start, self.shape[0] if stop is None else stop)

    def chunks(self, most: int, align: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of the first axis with at most ``most`` values each, in multiples of ``align`` rows, at least one."""
        row = int(np.prod(self.shape[1:], dtype=np.int64))
        step = max(1, most // max(1, row * align)) * align
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])


def plain(encoding: Encoding, shape: tuple[int, ...], parts: dict[str, Part], label: str = "") -> Stored:
    """A tensor whose parts lie in the file exactly as the encoding has them.

    Raises:
        CheckpointError: a part of another shape or dtype; ``shape`` is what config.json calls for.
    """
    for name, (size, dtype) in encoding.parts(shape).items():
        part = parts[name]
        if part.shape != size:
            raise CheckpointError(
                f"{part.path}: {part.name} has shape {part.shape}, config.json calls for {size}; are they of one model?"
            )
        if part.dtype != dtype:
            raise CheckpointError(f"{part.path}: {part.name} is {part.dtype}, expected {dtype} in {encoding}")

    edge = encoding.block if len(shape) == 2 else 0

    def load(start: int, stop: int) -> Encoded:
        arrays = {name: part.read(start, stop) for name, part in parts.items() if not (edge and name == "scales")}
        if edge:  # one row of scales for ``edge`` rows of weights
            assert start % edge == 0, f"rows must start at a whole block: {start}"
            arrays["scales"] = parts["scales"].read(start // edge, -(-stop // edge))
        return Encoded(encoding, (stop - start, *shape[1:]), arrays)

    return Stored(encoding, shape, tuple(parts.values()), load, label, encoding.quantized)


def joined(pieces: Sequence[Stored], axis: int) -> Stored:
    """Pieces of one tensor, one behind the other along ``axis``: gate rows, then up rows.

    Raises:
        CheckpointError: pieces in different formats.
    """
    first, sizes = pieces[0], [piece.shape[axis] for piece in pieces]
    _alike(pieces)
    edge = first.encoding.block
    if edge and any(size % edge for size in sizes[:-1]):
        raise CheckpointError(
            f"{first.parts[0].path}: {first.parts[0].name} ends inside a block of {edge} rows, which this library "
            "cannot join to the next; convert from the bfloat16 checkpoint instead"
        )
    shape = (*first.shape[:axis], sum(sizes), *first.shape[axis + 1 :])

    def load(start: int, stop: int) -> Encoded:
        if axis:
            return _concatenated([piece.read(start, stop) for piece in pieces], axis)
        found, offset = [], 0
        for piece, size in zip(pieces, sizes, strict=True):
            low, high = max(start - offset, 0), min(stop - offset, size)
            if low < high:
                found.append(piece.read(low, high))
            offset += size
        return _concatenated(found, 0)

    return _compound(pieces, shape, load)


def stacked(pieces: Sequence[Stored]) -> Stored:
    """One tensor per expert, as the bank [E, ...].

    Raises:
        CheckpointError: pieces in different formats.
    """
    _alike(pieces)
    first = pieces[0]

    def load(start: int, stop: int) -> Encoded:
        shape = (stop - start, *first.shape)
        arrays = {name: np.empty(size, dtype) for name, (size, dtype) in first.encoding.parts(shape).items()}
        # One expert at a time: every view is a map of its own, and macOS lets a process have 256 of them.
        for at, piece in enumerate(pieces[start:stop]):
            for name, array in piece.read().parts.items():
                arrays[name][at] = array
        return Encoded(first.encoding, shape, arrays)

    return _compound(pieces, (len(pieces), *pieces[0].shape), load)


def _alike(pieces: Sequence[Stored]) -> None:
    first = pieces[0]
    for piece in pieces:
        if (piece.encoding, piece.label, piece.shape[1:]) != (first.encoding, first.label, first.shape[1:]):
            raise CheckpointError(
                f"{piece.parts[0].path}: {piece.parts[0].name} is {piece.format}, {first.parts[0].name} is "
                f"{first.format}; parts of one tensor must be alike"
            )


def _compound(pieces: Sequence[Stored], shape: tuple[int, ...], load: Read) -> Stored:
    first, parts = pieces[0], tuple(part for piece in pieces for part in piece.parts)
    return Stored(first.encoding, shape, parts, load, first.label, first.quantized)


def _concatenated(pieces: Sequence[Encoded], axis: int) -> Encoded:
    first = pieces[0]
    if len(pieces) == 1:
        return first
    arrays = {name: np.concatenate([piece.parts[name] for piece in pieces], axis) for name in first.parts}
    size = sum(piece.shape[axis] for piece in pieces)
    return Encoded(first.encoding, (*first.shape[:axis], size, *first.shape[axis + 1 :]), arrays)
