"""The beginning of a GGUF file, version 3: key-value pairs and tensor infos as bytes, and where the data will lie."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_diffgemma.formats.gguf_file import ALIGNMENT, MAGIC, TYPES

NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # types of values
CODES = {UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?"}


@dataclass(frozen=True)
class Info:
    """One tensor: ``shape`` of its values in NumPy's order, ``kind`` a name in ``TYPES``."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def row(self) -> int:
        """Bytes of the last axis."""
        _, block, size = TYPES[NUMBERS[self.kind]]
        assert self.shape[-1] % block == 0, f"{self.name}: rows of {self.shape[-1]} are not whole blocks of {self.kind}"
        return self.shape[-1] // block * size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row


@dataclass(frozen=True)
class Layout:
    """``places``: name -> first byte in the file. The bytes between tensors stay zero."""

    header: bytes
    places: Mapping[str, int]
    nbytes: int


def layout(pairs: Mapping[str, Any], infos: Sequence[Info]) -> Layout:
    """All of a file but its data, in the order of ``infos``."""
    raw = bytearray(MAGIC + struct.pack("<IQQ", 3, len(infos), len(pairs)))
    for key, value in pairs.items():
        raw += _text(key) + _value(value)
    at, offsets = 0, {}
    for info in infos:
        assert info.name not in offsets, f"{info.name} is written twice"
        raw += _text(info.name) + struct.pack("<I", len(info.shape))
        raw += struct.pack(f"<{len(info.shape)}Q", *reversed(info.shape))
        raw += struct.pack("<IQ", NUMBERS[info.kind], at)
        offsets[info.name], at = at, at + padded(info.nbytes)
    raw += bytes(padded(len(raw)) - len(raw))
    return Layout(bytes(raw), {name: len(raw) + offset for name, offset in offsets.items()}, len(raw) + at)


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """Type and value; whole numbers are uint32, in arrays int32, as llama.cpp's writer has them."""
    if not isinstance(value, list):
        return struct.pack("<I", _kind(value, UINT32)) + _bare([value], _kind(value, UINT32))
    kind = _kind(value[0], INT32)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + _bare(value, kind)


def _kind(value: Any, whole: int) -> int:
    if isinstance(value, str):
        return STRING
    return BOOL if isinstance(value, bool) else FLOAT32 if isinstance(value, float) else whole


def _bare(values: Iterable[Any], kind: int) -> bytes:
    values = list(values)
    if kind == STRING:
        return b"".join(map(_text, values))
    return struct.pack(f"<{len(values)}{CODES[kind]}", *values)
