"""One GGUF file, streaming: rows of the tensor table in GGUF's types, a range at a time.

Every size is known from the plan: the header is written first, then threads convert ranges of rows and write them at
their offsets, under a temporary name. Norms, scales and the router are float32, as llama.cpp keeps them; 8-bit affine
codes become Q8_0 and mxfp4 becomes MXFP4, bit for bit where the source holds the same numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.formats.encoding import Encoded, Encoding, dense, grouped
from mlx_diffgemma.formats.gguf_blocks import GROUP, mxfp4_blocks, q8_0_blocks, quantize_q8_0
from mlx_diffgemma.formats.gguf_file import FLOATS
from mlx_diffgemma.formats.gguf_names import PATCHES, POSITIONS, gguf_name
from mlx_diffgemma.formats.numbers.chunks import parts, scaled
from mlx_diffgemma.tensors import Tensor

from .container import Progress
from .edges import Error, convert
from .gguf_header import Info, layout
from .output import OutputError, sync
from .plan import Item
from .writer import PART, Errors, ranges

KINDS = {str(dtype): kind for kind, dtype in FLOATS.items()}
WIDE = (PATCHES, POSITIONS)  # matrices that llama.cpp wants in float32


def kind_of(row: Tensor, encoding: Encoding) -> str:
    """The type in which a row is written."""
    if encoding.mode == "mxfp4":
        return "MXFP4"
    if encoding.quantized:
        return "Q8_0"
    wide = len(row.shape) == 1 or row.role in ("norm", "router", "scalar") or row.name in WIDE
    return "F32" if wide else KINDS[encoding.dtype]


def info_of(row: Tensor, encoding: Encoding) -> Info:
    shape, kind = row.shape, kind_of(row, encoding)
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
                _put(file.fileno(), np.frombuffer(where.header, np.uint8), 0)
                for name, array in extra.items():
                    _put(file.fileno(), array, where.places[name])
                errors = _convert(items, file.fileno(), where.places, progress)
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


def _convert(items: Sequence[Item], file: int, places: Mapping[str, int], progress: Progress) -> Errors:
    """All rows, in threads. An error, or an interrupt, drops the chunks that have not begun and waits for the rest."""
    jobs: list[tuple[Item, Future[Error | None]]] = []
    with ThreadPoolExecutor(os.cpu_count() or 1, "gguf") as pool:
        try:
            for item in items:
                at = places[gguf_name(item.row.name)]
                for start, stop in ranges(item):
                    jobs.append((item, pool.submit(_chunk, item, start, stop, file, at, progress)))
            done, _ = wait([job for _, job in jobs], return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    errors: Errors = {}
    for item, job in jobs:
        error = job.result()
        if error is not None:
            errors[item.row.name] = errors.get(item.row.name, Error()) + error
    return errors


def _chunk(item: Item, start: int, stop: int, file: int, at: int, progress: Progress) -> Error | None:
    info = info_of(item.row, item.encoding)
    encoded = item.stored.read(start, stop)
    array, error = as_written(item.row, encoded, info.kind)
    if error is not None and not math.isfinite(error.lost + error.total):
        part = item.stored.parts[0]
        raise CheckpointError(
            f"{part.path}: {item.row.name} holds NaN, infinity or numbers beyond {info.kind}; is the file damaged?"
        )
    _put(file, array, at + start * (info.nbytes // info.shape[0]))
    progress.advance(item.stored.nbytes * (stop - start) // item.row.shape[0])
    return error


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


def _put(file: int, array: np.ndarray, at: int) -> None:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    while data.size:
        done = os.pwrite(file, data.data, at)
        data, at = data[done:], at + done
