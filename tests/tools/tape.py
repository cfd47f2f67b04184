"""What the operations of a traced MLX function read and write, elementwise ones fused as ``mx.compile`` fuses them.

Three rules: an elementwise result stays inside a pass if everything that reads it is in that pass, else it is
written; a view moves nothing, but a reshape of what does not lie in order copies it; a gather reads of its
source as much as it takes. Copies that an operation makes for itself are unseen.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.mlx_backend.kernels import elementary

VIEWS = {
    "Reshape", "Transpose", "ExpandDims", "Squeeze", "Flatten", "Unflatten", "Slice", "Split", "Broadcast", "View",
    "Depends",
}  # fmt: skip
RESHAPES = {"Reshape", "Flatten", "Unflatten"}
GATHERS = {"Gather", "GatherAxis"}
FUSED = {
    "AsType", "Add", "Subtract", "Multiply", "Divide", "Negative", "Tanh", "Exp", "Log", "Maximum", "Minimum",
    "Select", "Equal", "NotEqual", "Less", "LessEqual", "Greater", "GreaterEqual", "LogicalAnd", "LogicalOr", "Square",
    "BitwiseBinary", "FloorDivide",
}  # fmt: skip
DEEPEST = 11  # operations behind each other in one pass
BITWISE = ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift")  # as a compiled pass names them
NAMES = re.compile("|".join(sorted({*FUSED, *BITWISE, "Broadcast"}, key=len, reverse=True)))


@dataclass
class Node:
    """An operation; ``inputs`` are those behind broadcasts, which are part of what reads them."""

    name: str
    inputs: list[str]
    outputs: list[str]


@dataclass
class Graph:
    """``size`` in bytes; ``base``: what a view looks at; ``results``: what must be written in any case."""

    nodes: list[Node]
    size: dict[str, int]
    base: dict[str, str]
    results: set[str]

    def written(self, name: str) -> str:
        while name in self.base:
            name = self.base[name]
        return name


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There exp is exp, and a norm is one operation; on a CPU it would be ten.

    It reads its input in the dtype of its result and writes that. In its place a product, for tracing merges calls that
    are the same, and these differ by their weights.
    """

    def stand_in(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        if weight is None:
            return mx.sort(x, -1)
        square = (*x.shape[:-2], weight.size, weight.size)
        return x.astype(mx.float32) @ mx.broadcast_to(weight[:, None], square)

    monkeypatch.setattr(mx.fast, "rms_norm", stand_in)
    monkeypatch.setattr(elementary, "on_cpu", lambda: False)


def bytes_of(function: Callable[..., Any], *arrays: mx.array, fuse: bool = True) -> int:
    """``function`` takes arrays and returns a list of arrays. ``fuse`` off counts every operation by itself."""
    graph = traced(function, *arrays)
    return moved(graph, groups(graph) if fuse else list(range(len(graph.nodes))))


def traced(function: Callable[..., Any], *arrays: mx.array) -> Graph:
    nodes: list[Node] = []
    graph = Graph(nodes, {}, {}, set())
    lies: dict[str, np.ndarray] = {}  # only its strides matter
    spread: dict[str, str] = {}  # what a broadcast repeats

    def note(entry: dict[str, Any]) -> None:
        if entry["type"] == "outputs":
            graph.results.update(name for name, *_ in entry["outputs"])
        if entry["type"] != "primitive":
            return
        name, made = entry["name"], [(n, tuple(s), dtype.size) for n, s, dtype in entry["outputs"]]
        for source, shape, dtype in entry["inputs"]:
            graph.size.setdefault(source, math.prod(shape) * dtype.size)
            lies.setdefault(source, np.empty(tuple(shape), np.int8))
        inputs = [spread.get(source, source) for source, *_ in entry["inputs"]]
        for output, shape, width in made:
            graph.size[output] = math.prod(shape) * width
        if name == "Broadcast" or (name in VIEWS and entry["inputs"][0][0] in spread):
            spread.update((output, inputs[0]) for output, *_ in made)
            return
        if name in VIEWS and not _copies(name, lies[inputs[0]], made[0][1]):
            for i, (output, shape, _) in enumerate(made):
                graph.base[output] = inputs[0]
                lies[output] = _view(name, lies[inputs[0]], shape, entry["arguments"], i)
            return
        for output, shape, _ in made:
            lies[output] = np.empty(shape, np.int8)
        nodes.append(Node(name, inputs, [output for output, *_ in made]))

    mx.export_function(note, function, *arrays)
    return graph


def _copies(name: str, source: np.ndarray, shape: tuple[int, ...]) -> bool:
    return name in RESHAPES and source.size > 0 and not np.shares_memory(source, source.reshape(shape))


def _view(name: str, source: np.ndarray, shape: tuple[int, ...], arguments: list[Any], which: int) -> np.ndarray:
    if name == "Transpose":
        return source.transpose(arguments[0])
    if name == "Slice":
        return source[tuple(slice(*at) for at in zip(*arguments, strict=True))]
    if name == "Split":
        indices, axis = arguments
        return np.split(source, indices, axis)[which]
    return source.reshape(shape)


def groups(graph: Graph) -> list[int]:
    """For every operation the pass that it is in, named by its last one."""
    readers: dict[str, list[int]] = defaultdict(list)
    for i, node in enumerate(graph.nodes):
        for name in node.inputs:
            readers[name].append(i)
    seen = {graph.written(name) for name in graph.base} | graph.results
    found, depth = list(range(len(graph.nodes))), [0] * len(graph.nodes)
    for i in reversed(range(len(graph.nodes))):
        node = graph.nodes[i]
        (output, *more) = node.outputs
        after = readers[output]
        if node.name not in FUSED or more or output in seen or not after:
            continue
        passes = {found[j] for j in after}
        deep = 1 + max(depth[j] for j in after)
        fits = all(graph.nodes[j].name in FUSED for j in after)
        if fits and len(passes) == 1 and deep < DEEPEST:
            (found[i],), depth[i] = passes, deep
    return found


def moved(graph: Graph, found: list[int]) -> int:
    """Bytes read and written when the operations of one pass keep to themselves what only they read."""
    made = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs}
    reads: dict[int, dict[str, int]] = defaultdict(dict)
    for i, node in enumerate(graph.nodes):
        for j, name in enumerate(node.inputs):
            if name in made and found[made[name]] == found[i] and made[name] != i:
                continue
            gathered = node.name in GATHERS and j == 0
            reads[found[i]][name] = graph.size[node.outputs[0]] if gathered else graph.size[name]
    needed = {graph.written(name) for names in reads.values() for name in names}
    needed |= {graph.written(name) for name in graph.results}
    return sum(sum(names.values()) for names in reads.values()) + sum(graph.size[n] for n in needed if n in made)


# ---- MLX's own word on what is fused


def passes_of(function: Callable[..., Any], *arrays: mx.array) -> Counter[str]:
    """The passes of two operations and more, by what is in them."""
    graph = traced(function, *arrays)
    inside: dict[int, list[str]] = defaultdict(list)
    for i, at in enumerate(groups(graph)):
        inside[at].append(graph.nodes[i].name)
    return Counter(" ".join(sorted(names)) for names in inside.values() if len(names) > 1)


def compiled_passes(function: Callable[..., Any], *arrays: mx.array) -> Counter[str]:
    """The same of the graph that ``mx.compile`` makes; broadcasts are left out of both."""
    file = io.StringIO()
    mx.export_to_dot(file, *mx.compile(function)(*arrays))
    found: Counter[str] = Counter()
    for label in re.findall(r'label ="Compiled(\w+)"', file.getvalue()):
        names = ["BitwiseBinary" if name in BITWISE else name for name in re.findall(NAMES, label)]
        kept = [name for name in names if name != "Broadcast"]
        if len(kept) > 1:
            found[" ".join(sorted(kept))] += 1
    return found
