"""Safetensors files, streaming: every shape is known from the plan, so each chunk goes straight to its place.

The header is written first, then threads convert ranges of rows and write them at their offsets. Nothing but the
chunks in flight is in memory, and the bytes do not depend on which thread was first. A file has a temporary name until
it is whole and on the disk.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.formats.safetensors import DTYPES

from .container import Progress
from .edges import Error, convert
from .plan import Item, Plan, Shard, size
from .target import Target

INDEX = "model.safetensors.index.json"
PART = ".part"
CHUNK = 1 << 22  # values: 16 MB as float32, one expert of the 26B model
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
Errors = dict[str, Error]  # by row name, of the rows that were rounded


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one file lie. ``places``: name -> first byte in the file, bytes per row."""

    header: bytes
    places: dict[str, tuple[int, int]]
    nbytes: int


def layout(shard: Shard, metadata: dict[str, str]) -> Layout:
    """Tensors with wide items first, so that each is aligned in a memory map; else in the order of the plan."""
    outputs = [output for item in shard.items for output in item.outputs]
    outputs.sort(key=lambda output: -output.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at, offsets = 0, {}
    for output in outputs:
        assert output.name not in header, f"{output.name} is written twice"
        end = at + size(output)
        header[output.name] = {
            "dtype": NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [at, end],
        }
        row = size(output) // max(1, output.shape[0] if output.shape else 1)
        offsets[output.name], at = (at, row), end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    base = 8 + len(raw)
    places = {name: (base + start, row) for name, (start, row) in offsets.items()}
    return Layout(len(raw).to_bytes(8, "little") + raw, places, base + at)


def write_shard(plan: Plan, shard: Shard, folder: Path, progress: Progress, threads: int | None = None) -> Errors:
    """One file, complete but not synced, under its temporary name.

    Raises:
        OSError: the disk is full, or will not be written to.
        CheckpointError: the source holds numbers that are none.
    """
    where = layout(shard, dict(plan.target.metadata))
    with (folder / (shard.name + PART)).open("wb", buffering=0) as file:
        file.truncate(where.nbytes)
        os.pwrite(file.fileno(), where.header, 0)
        return _convert(plan.target, shard, file.fileno(), where, progress, threads)


def _convert(target: Target, shard: Shard, file: int, where: Layout, progress: Progress, threads: int | None) -> Errors:
    """All chunks of a shard. An error, or an interrupt, drops the chunks that have not begun and waits for the rest."""
    jobs: list[tuple[Item, Future[Error | None]]] = []
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, "convert") as pool:
        try:
            for item in shard.items:
                for start, stop in ranges(item):
                    jobs.append((item, pool.submit(_chunk, target, item, start, stop, file, where, progress)))
            done, _ = wait([job for _, job in jobs], return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    errors: Errors = {}
    for item, job in jobs:  # in the order of the rows, so that sums are the same every time
        error = job.result()
        if error is not None:
            errors[item.row.name] = errors.get(item.row.name, Error()) + error
    return errors


def ranges(item: Item) -> Iterator[tuple[int, int]]:
    """Ranges of the first axis that can be converted on their own: whole experts, or whole blocks of a matrix."""
    source, target, matrix = item.stored.encoding, item.encoding, len(item.row.shape) == 2
    if matrix and target.global_scale and item.edge != "same":
        return iter([(0, item.row.shape[0])])  # one scale for the matrix: it must be seen whole
    align = math.lcm(source.block or 1, target.block or 1) if matrix else 1
    return item.stored.chunks(CHUNK, align)


def _chunk(
    target: Target, item: Item, start: int, stop: int, file: int, where: Layout, progress: Progress
) -> Error | None:
    encoded, error = convert(item.stored.read(start, stop), item.encoding)
    if error is not None and not math.isfinite(error.lost + error.total):
        part = item.stored.parts[0]
        raise CheckpointError(
            f"{part.path}: {item.row.name} holds NaN, infinity or numbers beyond {item.encoding}; is the file damaged?"
        )
    for name, first, array in target.emit(item.row, start, encoded):
        at, row = where.places[name]
        _put(file, np.ascontiguousarray(array), at + first * row)
    progress.advance(item.stored.nbytes * (stop - start) // item.row.shape[0])
    return error


def _put(file: int, array: np.ndarray, at: int) -> None:
    data = array.reshape(-1).view(np.uint8)
    while data.size:
        done = os.pwrite(file, data.data, at)
        data, at = data[done:], at + done


def index(plan: Plan) -> dict[str, Any]:
    """``model.safetensors.index.json``; always written, for it says how large the model is."""
    places = {output.name: shard.name for shard in plan.shards for item in shard.items for output in item.outputs}
    total = {"total_size": plan.nbytes, "total_parameters": plan.values}
    return {"metadata": total, "weight_map": dict(sorted(places.items()))}


assert NAMES[np.dtype(ml_dtypes.bfloat16)] == "BF16"
