"""Safetensors files, streaming: every shape is known from the plan, so each chunk goes straight to its place.

The header is written first; ``chunks`` fills the file. It has a temporary name until it is whole and on the disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mlx_diffgemma.formats.safetensors import DTYPES

from .chunks import fill, put
from .container import Progress
from .edges import Error, Errors, convert
from .plan import Item, Plan, Shard, size

INDEX = "model.safetensors.index.json"
PART = ".part"
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}


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
        put(file.fileno(), np.frombuffer(where.header, np.uint8), 0)

        def write(item: Item, start: int, stop: int) -> Error | None:
            encoded, error = convert(item.stored.read(start, stop), item.encoding)
            for name, first, array in plan.target.emit(item.row, start, encoded):
                at, row = where.places[name]
                put(file.fileno(), array, at + first * row)
            return error

        return fill(shard.items, write, progress, threads)


def index(plan: Plan) -> dict[str, Any]:
    """``model.safetensors.index.json``; always written, for it says how large the model is."""
    places = {output.name: shard.name for shard in plan.shards for item in shard.items for output in item.outputs}
    total = {"total_size": plan.nbytes, "total_parameters": plan.values}
    return {"metadata": total, "weight_map": dict(sorted(places.items()))}


assert NAMES[np.dtype(ml_dtypes.bfloat16)] == "BF16"
