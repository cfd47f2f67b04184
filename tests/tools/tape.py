"""What the operations of a traced MLX function read and write, chains of elementwise operations taken as one pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import mlx.core as mx

VIEWS = {"Reshape", "Transpose", "ExpandDims", "Squeeze", "Flatten", "Unflatten", "Slice", "Split", "Broadcast"}
FUSED = {
    "AsType", "Add", "Subtract", "Multiply", "Divide", "Negative", "Tanh", "Exp", "Log", "Maximum", "Minimum",
    "Select", "Equal", "Less", "LessEqual", "Greater", "GreaterEqual", "LogicalAnd", "LogicalOr", "Square",
}  # fmt: skip


def bytes_of(function: Callable[..., Any], *arrays: mx.array, fuse: bool = True) -> int:
    """``function`` takes arrays and returns a list of arrays. ``fuse`` off counts every operation by itself."""
    nodes: list[dict] = []
    results: set[str] = set()

    def note(entry: dict) -> None:
        if entry["type"] == "primitive":
            nodes.append(entry)
        elif entry["type"] == "outputs":
            results.update(name for name, *_ in entry["outputs"])

    mx.export_function(note, function, *arrays)
    source: dict[str, str] = {}  # what a view looks at; a broadcast has the size of what it repeats
    part_of: dict[str, str] = {}  # a slice has a size of its own, but what it is cut from must have been written
    size: dict[str, int] = {}
    level: dict[str, int] = defaultdict(int)
    real = []
    for node in nodes:
        for name, shape, dtype in (*node["inputs"], *node["outputs"]):
            size.setdefault(name, math.prod(shape) * dtype.size)
        inputs = [source.get(name, name) for name, *_ in node["inputs"]]
        outputs = [name for name, *_ in node["outputs"]]
        if node["name"] in VIEWS:
            for name in outputs:
                level[name] = level[inputs[0]]
                (part_of if node["name"] in ("Slice", "Split") else source)[name] = inputs[0]
            continue
        elementwise = fuse and node["name"] in FUSED
        depth = max((level[name] for name in inputs), default=0)
        for name in outputs:
            level[name] = depth if elementwise else depth + 1
        real.append((elementwise, inputs, outputs))
    return _moved(real, {source.get(name, name) for name in results}, size, level, part_of)


def _moved(real: list, results: set[str], size: dict[str, int], level: dict[str, int], part_of: dict[str, str]) -> int:
    """Of operations as (elementwise, inputs, outputs): elementwise ones of one level that touch are one pass."""
    made_by = {name: i for i, (_, _, outputs) in enumerate(real) for name in outputs}
    group = list(range(len(real)))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i, (elementwise, inputs, outputs) in enumerate(real):
        for name in inputs:
            before = made_by.get(name)
            if before is not None and elementwise and real[before][0] and level[name] == level[outputs[0]]:
                group[root(i)] = root(before)
    reads: dict[int, set[str]] = defaultdict(set)
    for i, (_, inputs, _) in enumerate(real):
        reads[root(i)].update(name for name in inputs if name not in made_by or root(made_by[name]) != root(i))
    needed = set().union(*reads.values()) | results
    needed |= {part_of[name] for name in needed & part_of.keys()}
    read = sum(size[name] for names in reads.values() for name in names)
    written = sum(size[name] for _, _, outputs in real for name in outputs if name in needed)
    return read + written
