"""The graph of a step, as MLX exports it: what reads the prefix, and that nothing copies it.

Tracing needs no device, so this is the graph with Metal kernels that a Mac runs, and the plain one beside it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.backend import CanvasSpec
from mlx_diffgemma.mlx_backend.compiled import join, split
from mlx_diffgemma.mlx_backend.economy import Saving
from mlx_diffgemma.mlx_backend.kernels.ops import FUSED, KERNELS, PLAIN
from mlx_diffgemma.mlx_backend.model import MLXModel
from mlx_diffgemma.mlx_backend.network import Network
from mlx_diffgemma.mlx_backend.step import denoise
from tests import tiny
from tests.backends.test_mlx_step import SETTINGS, draw_ids
from tests.conftest import load_model

WHOLE = Saving()
VIEWS = {"Slice", "Transpose", "Reshape", "ExpandDims", "Squeeze", "AsStrided", "Flatten", "Unflatten", "Broadcast"}
READERS = {"Matmul", "AddMM", "CustomKernel"}


@dataclass
class Graph:
    """Primitives in order: name, inputs, outputs; ``inputs`` are the leaves of the traced call."""

    inputs: list[str]
    nodes: list[dict]

    def names(self) -> list[str]:
        return [node["name"] for node in self.nodes]

    def readers(self, array: str) -> set[str]:
        """Names of the primitives that read ``array`` through views of it."""
        users = defaultdict(list)
        for node in self.nodes:
            for name, *_ in node["inputs"]:
                users[name].append(node)
        found, waiting = set(), [array]
        while waiting:
            for node in users[waiting.pop()]:
                if node["name"] in VIEWS:
                    waiting += [name for name, *_ in node["outputs"]]
                else:
                    found.add(node["name"])
        return found


def traced(ops, *, rows: int = 1, saving: Saving = WHOLE, rounded: bool = True) -> tuple:
    """The graph of a step behind ragged rows, and the names of the prefix's buffers in it."""
    plain = load_model(tiny.checkpoint(), "mlx", "float32")
    model = MLXModel(plain.config, plain.network, plain.weights)
    lengths = np.array([70, 33])[:rows]
    cache = model.encode(draw_ids(0, rows, 70), lengths=lengths)
    state = model.step(model.begin(cache, [CanvasSpec(SETTINGS, seed=1)] * rows))
    network = Network(plain.config.text, plain.weights.matrices, plain.weights.arrays, mx.float32, ops)
    prefix = network.prefix(cache, model.config.canvas_length, rounded=rounded)
    leaves: list[mx.array] = []
    skeleton = split((state.block.settings, prefix, state.carried, state.block.schedule.at(state.at)), leaves)
    nodes, inputs = [], []

    def note(node: dict) -> None:
        if node["type"] == "inputs":
            inputs.extend(name for name, *_ in node["inputs"])
        elif node["type"] == "primitive":
            nodes.append(node)

    def function(*arrays: mx.array) -> list[mx.array]:
        out: list[mx.array] = []
        split(denoise(network, *join(skeleton, iter(arrays)), saving), out)
        return out

    mx.export_function(note, function, *leaves)
    at = {id(leaf): name for leaf, name in zip(leaves, inputs, strict=True)}
    return Graph(inputs, nodes), [at[id(x)] for x in (*prefix.keys, *prefix.values)]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("ops", [PLAIN, FUSED], ids=["ops", "fused"])
def test_the_prefix_is_read_where_it_lies(ops, rounded, rows):
    """Every buffer is multiplied with, as it is or through a view; with kernels, by kernels only."""
    graph, buffers = traced(ops, rows=rows, rounded=rounded)
    assert len(buffers) == 12
    for buffer in buffers:
        readers = graph.readers(buffer)
        assert readers, "the prefix is not read"
        assert readers <= ({"CustomKernel"} if ops is FUSED else READERS - {"CustomKernel"}), readers


def test_a_copy_would_be_seen():
    """The check above, on a graph that concatenates."""

    def function(prefix: mx.array, own: mx.array) -> list[mx.array]:
        return [mx.concatenate([prefix[:, 1:], own], 1)]

    nodes, inputs = [], []

    def note(node: dict) -> None:
        if node["type"] == "inputs":
            inputs.extend(name for name, *_ in node["inputs"])
        elif node["type"] == "primitive":
            nodes.append(node)

    mx.export_function(note, function, mx.zeros((2, 8)), mx.zeros((2, 3)))
    assert Graph(inputs, nodes).readers(inputs[0]) == {"Concatenate"}


def kernels_of(graph: Graph) -> dict[str, int]:
    """How often each kernel is launched, by the name that MLX gave it."""
    counts: dict[str, int] = defaultdict(int)
    for node in graph.nodes:
        if node["name"] == "CustomKernel":
            counts[node["arguments"][0].removeprefix("custom_kernel_").split("__")[0]] += 1
    return dict(counts)


def test_what_a_fused_step_launches():
    """Per layer one kernel for each operation; the vocabulary is passed twice. Plain operations launch none."""
    graph, _ = traced(FUSED)
    counts = kernels_of(graph)
    layers = 6
    assert counts.pop("geglu") == 2 * layers + 1  # the MLP, the experts, and the self-conditioning
    assert {name: count for name, count in counts.items() if count == layers} == dict.fromkeys(
        ("after_attention", "after_experts", "heads", "route", "gather_sum", "canvas_attention"), layers
    )
    assert counts["look"] == counts["odds"] == 1
    assert kernels_of(traced(PLAIN)[0]) == {}
    survivors = kernels_of(traced(FUSED, saving=Saving(dense=0.0))[0])
    assert survivors["survivors"] == 1 and "odds" not in survivors
    assert survivors["look_and_list"] == 1  # look, with the survivors' ids
    assert {*counts, *survivors, "geglu"} - {"look_and_list"} == {*KERNELS}


def test_a_fused_step_has_fewer_operations():
    assert len(traced(FUSED)[0].nodes) < 0.5 * len(traced(PLAIN)[0].nodes)


def test_a_held_tail_is_not_multiplied_with_the_table():
    table = (512, 64)

    def rows_of_logits(saving: Saving) -> set[int]:
        graph, _ = traced(PLAIN, saving=saving)
        shapes = [shape for node in graph.nodes for _, shape, _ in node["outputs"] if node["name"] == "Matmul"]
        return {shape[0] for shape in shapes if shape[-1] == table[0]}

    assert rows_of_logits(Saving()) == {16} and rows_of_logits(Saving(rows=4)) == {4}
