"""One safetensors file, opened lazily: the header is read and checked, tensors are views of a memory map.

Own code and not the safetensors package because a damaged file must be told apart (truncated, overlapping, foreign
dtype) before anything is loaded, and because the views keep bfloat16 as it lies on disk.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON, data).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from ..errors import CheckpointError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "U32": np.uint32,
    "I16": np.int16,
    "U16": np.uint16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
LONGEST_NAME = 256  # far above any real one


@dataclass(frozen=True)
class Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafetensorsFile:
    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A read-only view of rows ``start:stop`` of one tensor; pages are loaded when touched."""
        entry = self.entries[name]
        shape, row = entry.shape, entry.stop - entry.start
        if shape:
            row = row // shape[0] if shape[0] else 0
            shape = (len(range(shape[0])[start:stop]), *shape[1:])
        size = row * (shape[0] if shape else 1)
        if size == 0:
            return np.zeros(shape, entry.dtype)
        data = np.memmap(self.path, np.uint8, "r", entry.start + start * row, (size,))
        return data.view(entry.dtype).reshape(shape)

    def tensor(self, name: str) -> FileTensor:
        return FileTensor(self, name)


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file, as ``stored.Part``."""

    file: SafetensorsFile
    name: str

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> np.dtype:
        return self.entry.dtype

    @property
    def nbytes(self) -> int:
        return self.entry.stop - self.entry.start

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.file.read(self.name, start, stop)


def open_file(path: Path) -> SafetensorsFile:
    """Read and check the header.

    Raises:
        CheckpointError: not safetensors, cut short, or a header that does not describe the bytes after it exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise CheckpointError(f"{path} is truncated or not a safetensors file; download it again")
        raw = file.read(length)
    header = _header(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} has a damaged header (__metadata__ is {metadata!r:.80}); download it again")
    base = 8 + length
    entries = {name: _entry(path, name, row, base) for name, row in header.items()}
    _check_layout(path, entries, base, size)
    return SafetensorsFile(path, entries, metadata)


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise CheckpointError(f"{path}: {twice!r:.80} is stored twice; download it again")
        return found

    try:
        header = json.loads(raw, object_pairs_hook=once)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, a number of 5,000 digits
        raise CheckpointError(f"{path} has a damaged header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header (a JSON {type(header).__name__}); download it again")
    return header


def _entry(path: Path, name: str, row: Any, base: int) -> Entry:
    if not name.isprintable() or len(name) > LONGEST_NAME or not isinstance(row, dict):
        raise CheckpointError(f"{path} has a damaged header ({name!r:.80}: {row!r:.80}); download it again")
    kind, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {kind!r:.80}, which this library does not read")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{path}: {name} has shape {shape!r:.80} and data_offsets {offsets!r:.80}; download it again"
        )
    dtype, (start, stop) = np.dtype(DTYPES[kind]), offsets
    if stop - start != dtype.itemsize * math.prod(shape):
        raise CheckpointError(
            f"{path}: {name} has {stop - start} bytes for shape {tuple(shape)!s:.80} of {dtype}; download it again"
        )
    return Entry(dtype, tuple(shape), base + start, base + stop)


def _sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of whole numbers that a file can have."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(path: Path, entries: dict[str, Entry], base: int, size: int) -> None:
    """The format's own rule: the tensors cover the data exactly, without overlap, gap or rest."""
    end, before = base, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            fault = "overlaps" if entry.start < end else "leaves a gap after"
            raise CheckpointError(f"{path}: {name} {fault} {before}; download it again")
        end, before = entry.stop, name
    if end > size:
        raise CheckpointError(f"{path} is truncated: {size:,} of {end:,} bytes; download it again")
    if end < size:
        raise CheckpointError(f"{path} has {size - end:,} bytes after its last tensor; download it again")
