"""One safetensors file, opened lazily: the header is read and checked, tensors are views of a memory map.

Own code and not the safetensors package because a damaged file must be told apart (truncated, overlapping, foreign
dtype) before anything is loaded, and because the views keep bfloat16 as it lies on disk.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON, data).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

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

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor; pages are loaded when touched."""
        entry = self.entries[name]
        if entry.start == entry.stop:
            return np.zeros(entry.shape, entry.dtype)
        data = np.memmap(self.path, np.uint8, "r", entry.start, (entry.stop - entry.start,))
        return data.view(entry.dtype).reshape(entry.shape)


def open_file(path: Path) -> SafetensorsFile:
    """Read and check the header.

    Raises:
        CheckpointError: not safetensors, cut short, or a tensor whose bytes do not match its shape.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise CheckpointError(f"{path} is truncated or not a safetensors file; download it again")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error}); download it again") from error
    metadata = header.pop("__metadata__", {})
    entries = {name: _entry(path, name, row, 8 + length) for name, row in header.items()}
    needed = max((entry.stop for entry in entries.values()), default=8 + length)
    if needed > size:
        raise CheckpointError(f"{path} is truncated: {size:,} of {needed:,} bytes; download it again")
    return SafetensorsFile(path, entries, metadata)


def _entry(path: Path, name: str, row: dict, base: int) -> Entry:
    if row.get("dtype") not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {row.get('dtype')!r}, which this library does not read")
    dtype, shape = np.dtype(DTYPES[row["dtype"]]), tuple(row["shape"])
    start, stop = row["data_offsets"]
    if stop - start != dtype.itemsize * math.prod(shape):
        raise CheckpointError(f"{path}: {name} has {stop - start} bytes for shape {shape} of {dtype}")
    return Entry(dtype, shape, base + start, base + stop)
