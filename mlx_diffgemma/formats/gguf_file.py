"""One GGUF file, opened lazily: the header is read and checked, tensors are views of a memory map.

Own code and not the gguf package's reader, which trusts every count and offset in the file and takes seconds and a
gigabyte for a vocabulary of 262,144. Here the header is walked in place: damaged files end in one line, and what is
never asked for (tokens, merges) is stepped over. Names are the file's own; shapes are NumPy's, the reverse of GGUF's.
Format: ggml/docs/gguf.md (magic, version, counts, key-value pairs, tensor infos, padding, data).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError

TYPES = {  # number in the file -> name, values in a block, bytes of a block (ggml.c, type_traits)
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by value type
STRING, ARRAY = 8, 9
MOST_AXES, MOST_ITEMS, LONGEST_NAME, LONGEST_TEXT = 4, 10_000_000, 1_000, 1 << 24  # far above any real file's
KEPT = 4096  # longer arrays are stepped over


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file, as ``stored.Part``: of floats, or of blocks as bytes.

    Args:
        logical: the shape of its values.
        kind: a name in ``TYPES``.
        start: its first byte in the file.
    """

    path: Path
    name: str
    logical: tuple[int, ...]
    kind: str
    start: int
    row: int  # bytes of the last axis

    @property
    def dtype(self) -> np.dtype:
        return FLOATS.get(self.kind, np.dtype(np.uint8))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what ``read`` gives: the last axis of blocks is bytes."""
        return self.logical if self.kind in FLOATS else (*self.logical[:-1], self.row)

    @property
    def nbytes(self) -> int:
        return math.prod(self.logical[:-1]) * self.row

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A read-only view of rows ``start:stop`` of the first axis; pages are loaded when touched."""
        rows = self.shape[0]
        shape = (len(range(rows)[start:stop]), *self.shape[1:])
        if 0 in shape:
            return np.zeros(shape, self.dtype)
        each = self.nbytes // rows
        data = np.memmap(self.path, np.uint8, "r", self.start + start * each, (shape[0] * each,))
        return data.view(self.dtype).reshape(shape)


@dataclass(frozen=True)
class GGUFFile:
    """``fields`` holds the key-value pairs but for long arrays and arrays of strings."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", ""))


def open_gguf(path: Path) -> GGUFFile:
    """Read and check the header.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not GGUF, cut short, or a header that does not describe the bytes after it exactly.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        _check_magic(path, head, size)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            count, pairs = cursor.scalar("Q"), cursor.scalar("Q")
            fields = _fields(cursor, pairs)
            alignment = fields.get("general.alignment", ALIGNMENT)
            if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
                raise cursor.damaged(f"general.alignment is {alignment!r:.80}, not a power of two")
            infos = _infos(cursor, count)
            base = -(-cursor.at // alignment) * alignment
    tensors = {tensor.name: tensor for tensor in infos}
    _check_layout(path, infos, base, alignment, size)
    return GGUFFile(path, fields, {n: _moved(tensor, base) for n, tensor in tensors.items()})


def _check_magic(path: Path, head: bytes, size: int) -> None:
    if head[:4] != MAGIC or size < 24:
        what = "is truncated" if MAGIC.startswith(head[:4]) else "is not a GGUF file"
        raise CheckpointError(f"{path} {what}; download it again")
    version = int.from_bytes(head[4:8], "little")
    if version not in VERSIONS:
        if int.from_bytes(head[4:8], "big") in VERSIONS:
            raise CheckpointError(f"{path} is big-endian, which this library does not read")
        raise CheckpointError(f"{path} has GGUF version {version}; this library reads versions 2 and 3")


class _Cursor:
    """A place in the header, which never leaves the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at, self.size = path, data, 8, len(data)

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; the file is damaged, download it again")

    def skip(self, count: int) -> int:
        """Step over ``count`` bytes; where they begin."""
        start = self.at
        if count > self.size - start:
            raise CheckpointError(f"{self.path} is truncated or its header is damaged; download it again")
        self.at = start + count
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}")))[0]

    def text(self, longest: int) -> str:
        length = self.scalar("Q")
        if length > longest:
            raise self.damaged(f"a text in the header claims {length:,} bytes")
        start = self.skip(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text in the header is not UTF-8 ({error.reason})") from error

    def name(self, what: str) -> str:
        found = self.text(LONGEST_NAME)
        if not found or not found.isprintable():
            raise self.damaged(f"{what} is called {found!r:.80}")
        return found

    def value(self, kind: int) -> Any:
        """A value of the pairs; None for what is not kept."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.text(LONGEST_TEXT)
        if kind != ARRAY:
            raise self.damaged(f"the header has a value of type {kind}")
        inner, length = self.scalar("I"), self.scalar("Q")
        if length > MOST_ITEMS:
            raise self.damaged(f"the header has an array of {length:,}")
        if inner in SCALARS:
            code = f"<{length}{SCALARS[inner]}"
            start = self.skip(struct.calcsize(code))
            return struct.unpack_from(code, self.data, start) if length <= KEPT else None
        if inner != STRING:
            raise self.damaged(f"the header has an array of type {inner}")
        self._skip_texts(length)
        return None

    def _skip_texts(self, count: int) -> None:
        at, size, read = self.at, self.size, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size:
                break
            at += 8 + read(self.data, at)[0]
        self.skip(at - self.at if at <= size else size + 1)


def _fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if count > MOST_ITEMS:
        raise cursor.damaged(f"the header claims {count:,} key-value pairs")
    for _ in range(count):
        key = cursor.name("a key")
        if key in found:
            raise cursor.damaged(f"{key} is stored twice")
        found[key] = cursor.value(cursor.scalar("I"))
    return {key: value for key, value in found.items() if value is not None}


def _infos(cursor: _Cursor, count: int) -> list[GGUFTensor]:
    """The tensors, ``start`` counted from the end of the header."""
    if count > MOST_ITEMS:
        raise cursor.damaged(f"the header claims {count:,} tensors")
    found, names = [], set()
    for _ in range(count):
        name = cursor.name("a tensor")
        if name in names:
            raise cursor.damaged(f"{name} is stored twice")
        names.add(name)
        axes = cursor.scalar("I")
        if not 1 <= axes <= MOST_AXES:
            raise cursor.damaged(f"{name} has {axes} axes")
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(axes)]))
        kind, start = cursor.scalar("I"), cursor.scalar("Q")
        if kind not in TYPES:
            raise CheckpointError(f"{cursor.path}: {name} has type {kind}, which this library does not read")
        kind, block, size = TYPES[kind]
        if 0 in shape or math.prod(shape) >= 1 << 62 or start >= 1 << 62 or shape[-1] % block:
            raise cursor.damaged(f"{name} is {kind} of shape {shape}")
        found.append(GGUFTensor(cursor.path, name, shape, kind, start, shape[-1] // block * size))
    return found


def _moved(tensor: GGUFTensor, base: int) -> GGUFTensor:
    return GGUFTensor(tensor.path, tensor.name, tensor.logical, tensor.kind, base + tensor.start, tensor.row)


def _check_layout(path: Path, infos: list[GGUFTensor], base: int, alignment: int, size: int) -> None:
    """llama.cpp's own rule: the tensors cover the data, without overlap or rest and with no gap but the padding."""
    end, before = 0, "the header"
    for tensor in sorted(infos, key=lambda tensor: tensor.start):
        wanted = -(-end // alignment) * alignment
        if tensor.start != wanted:
            fault = "overlaps" if tensor.start < wanted else "leaves a gap after"
            raise CheckpointError(f"{path}: {tensor.name} {fault} {before}; the file is damaged, download it again")
        end, before = tensor.start + tensor.nbytes, tensor.name
    if base + end > size and infos:
        raise CheckpointError(f"{path} is truncated: {size:,} of {base + end:,} bytes; download it again")
    if size - base - end >= alignment:
        raise CheckpointError(f"{path} has {size - base - end:,} bytes after its last tensor; download it again")
