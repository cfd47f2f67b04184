"""One GGUF file, streaming: rows of the tensor table in GGUF's types, a range at a time.

Every size is known from the plan: the header is written first, then ``chunks`` fills the file, under a temporary name.
8-bit affine codes become Q8_0 and mxfp4 becomes MXFP4, bit for bit where the source holds the same numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffgemma.formats.encoding import Encoded, Encoding, dense, grouped
from mlx_diffgemma.formats.gguf_blocks import GROUP, mxfp4_blocks, q8_0_blocks, quantize_q8_0
from mlx_diffgemma.formats.gguf_file import FLOATS
from mlx_diffgemma.formats.gguf_names import PATCHES, gguf_name
from mlx_diffgemma.formats.numbers.chunks import parts, scaled
from mlx_diffgemma.tensors import Tensor

from .chunks import fill, put
from .container import Progress
from .edges import Error, Errors, convert
from .gguf_header import Info, layout
from .output import OutputError, sync
from .plan import Item
from .writer import PART

KINDS = {str(dtype): kind for kind, dtype in FLOATS.items()}


def kind_of(encoding: Encoding) -> str:
    """The type in which an encoding is written."""
    return {"mxfp4": "MXFP4", "affine": "Q8_0"}.get(encoding.mode) or KINDS[encoding.dtype]


def info_of(row: Tensor, encoding: Encoding) -> Info:
    shape, kind = row.shape, kind_of(encoding)
    if row.name == PATCHES:  # the weights of a convolution
        edge = math.isqrt(shape[1] // 3)
        shape = (shape[0], 3, edge, edge)
    return Info(gguf_name(row.name), shape, kind)


def write_file(
    path: Path, pairs: Mapping[str, Any], items: Sequence[Item], extra: Mapping[str, np.ndarray], progress: Progress
) -> Errors:
    """One file, whole and on the disk, or nothing. ``extra`` are float32 tensors that no item is.

    Raises:
        OutputError: it cannot be written.
        CheckpointError: the source holds numbers that are none.
    """
    infos = [info_of(item.row, item.encoding) for item in items]
    infos += [Info(name, array.shape, "F32") for name, array in extra.items()]
    where, part = layout(pairs, infos), path.with_name(path.name + PART)
    with one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb", buffering=0) as file:
                file.truncate(where.nbytes)
                put(file.fileno(), np.frombuffer(where.header, np.uint8), 0)
                for name, array in extra.items():
                    put(file.fileno(), array, where.places[name])
                errors = _fill(items, file.fileno(), where.places, progress)
                os.fsync(file.fileno())
            part.replace(path)
            sync(path.parent)
        finally:
            part.unlink(missing_ok=True)
    return errors


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OutputError(f"{error.filename or path}: {error.strerror or error}") from error


def _fill(items: Sequence[Item], file: int, places: Mapping[str, int], progress: Progress) -> Errors:
    def write(item: Item, start: int, stop: int) -> Error | None:
        info = info_of(item.row, item.encoding)
        array, error = as_written(item.row, item.stored.read(start, stop), info.kind)
        put(file, array, places[info.name] + start * (info.nbytes // info.shape[0]))
        return error

    return fill(items, write, progress)


def as_written(row: Tensor, encoded: Encoded, kind: str) -> tuple[np.ndarray, Error | None]:
    """A range of a row in its type, and what was lost; None where nothing can be."""
    if kind == "Q8_0":
        return _q8_0(encoded)
    if kind == "MXFP4":
        found, error = convert(encoded, grouped("mxfp4"))
        return mxfp4_blocks(dict(found.parts)), error
    found, error = convert(encoded, dense(str(FLOATS[kind])))
    array = found.parts["weight"]
    if row.name == PATCHES:
        edge = math.isqrt(row.shape[1] // 3)
        array = array.reshape(-1, edge, edge, 3).transpose(0, 3, 1, 2)
    return array, error


def _q8_0(encoded: Encoded) -> tuple[np.ndarray, Error | None]:
    source = encoded.encoding
    if source.mode == "affine" and (source.bits, source.group_size) == (8, GROUP):
        blocks = q8_0_blocks(dict(encoded.parts))
        if blocks is not None:
            return blocks, None
    values = encoded.decode()
    blocks = quantize_q8_0(values)
    return blocks, _lost(values, blocks)


def _lost(values: np.ndarray, blocks: np.ndarray) -> Error:
    """What Q8_0 lost, a piece at a time."""
    error, rows = Error(), blocks.reshape(-1, 34)
    with np.errstate(all="ignore"):  # what is not finite shows in the sums
        for part, x in parts(values):
            d, codes = np.split(rows[scaled(part, 1, GROUP)], [2], 1)
            total = float(np.vdot(x, x))
            x.reshape(-1, GROUP)[:] -= np.ascontiguousarray(d).view(np.float16).astype(np.float32) * codes.view(np.int8)
            error += Error(float(np.vdot(x, x)), total)
    return error
