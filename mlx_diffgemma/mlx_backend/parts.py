"""How long the parts of a step take: each operation alone, on what a real step gave it, one after another in rounds.

A step is run once with operations and matrices that note what they were called with; then every distinct call is timed
by itself. Nothing is compiled, nothing overlaps, every operation is waited for: the sum is no step's time, but it tells
where that goes. The GeGLU of the self-conditioning counts with those of the dense MLPs, which are like it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..backend import CanvasSpec
from ..config import GenerationConfig
from .kernels.ops import Ops
from .linear import Linear
from .model import MLXModel
from .network import Network
from .step import State
from .vocabulary import read_canvas

STEPS = GenerationConfig(max_denoising_steps=2, confidence_threshold=None)
REPEATS = 8  # calls under one wait on a GPU, so that the wait itself counts for little
VOCABULARY = "head product, vocabulary passes, soft embedding"
OPERATIONS = {
    "heads": "q, k norm and RoPE",
    "canvas_attention": "canvas attention",
    "after_attention": "norms and residuals",
    "after_experts": "norms and residuals",
    "route": "router",
    "gather_sum": "un-sort, weigh, sum",
}
MATRICES = {
    ".self_attn.": "q, k, v, o products",
    ".mlp.": "dense MLP",
    ".router.": "router",
    ".experts.": "experts",
    ".self_conditioning.": "embedding, conditioning",
}
Key = tuple[Any, ...]


@dataclass
class Notes:
    """Distinct calls by part, function and shapes: how to repeat one, and how often it was made."""

    calls: dict[Key, Callable[[], Any]] = field(default_factory=dict)
    count: dict[Key, int] = field(default_factory=dict)

    def forget(self) -> None:
        self.calls.clear()
        self.count.clear()

    def noting(self, part: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            key = (part, name, *(tuple(x.shape) if isinstance(x, mx.array) else None for x in args))
            self.calls.setdefault(key, lambda: function(*args, **named))
            self.count[key] = self.count.get(key, 0) + 1
            return function(*args, **named)

        return call


@dataclass(frozen=True)
class Noted:
    """A matrix that notes its products."""

    matrix: Linear
    part: str
    notes: Notes

    @property
    def dtype(self) -> mx.Dtype:
        return self.matrix.dtype

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.matrix.arrays

    def apply(self, x: mx.array) -> mx.array:
        return self.notes.noting(self.part, f"apply {self._shape}", self.matrix.apply)(x)

    def combine(self, x: mx.array) -> mx.array:
        return self.matrix.combine(x)

    def rows(self, ids: mx.array) -> mx.array:
        return self.matrix.rows(ids)

    def gather(self, x: mx.array, expert: mx.array) -> mx.array:
        return self.notes.noting(self.part, f"gather {self._shape}", self.matrix.gather)(x, expert)

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self.matrix.arrays[0].shape)


def timed(model: MLXModel, prompt: int, rounds: int) -> dict[str, dict[str, float]]:
    """By part: ``milliseconds`` of a step (median of ``rounds``), ``min``, ``max``, and the ``calls`` that it makes.

    ``prompt``: tokens behind which the canvas stands.
    """
    notes, network, config = Notes(), model.network, model.config
    matrices = {name: noted(name, matrix, notes) for name, matrix in network.matrices.items()}
    watched = MLXModel(
        config,
        replace(network, matrices=matrices, ops=noted_ops(network.ops, notes)),
        model.weights,
        survivors=model.denoiser.survivors,
    )
    tokens = np.random.default_rng(0).integers(0, config.text.vocab_size, (1, prompt))
    state = watched.begin(watched.encode(tokens), [CanvasSpec(STEPS, seed=0)])
    state = watched.step(state)
    watched.read(state)
    notes.forget()  # of reading the prompt, and of a step without self-conditioning
    state = watched.step(state)
    watched.read(state)
    note_vocabulary(notes, network, state)
    return summed(notes, measure(notes, rounds))


def note_vocabulary(notes: Notes, network: Network, state: State) -> None:
    """What the step after ``state`` does with the vocabulary, its soft embeddings made as that step makes them."""
    block, carried = state.block, state.carried
    dense, moment = block.economy.saving().dense, block.schedule.at(state.at - 1)
    hidden = network.decode(carried.canvas, block.prefix, carried.soft)
    mx.eval(hidden, moment.temperature, moment.draw)
    key = (vocabulary_part(dense),)
    notes.calls[key] = lambda: read_canvas(network, hidden, moment.temperature, moment.draw, dense=dense)
    notes.count[key] = 1


def vocabulary_part(dense: float | None) -> str:
    return VOCABULARY if dense is None else f"{VOCABULARY} (survivors, {dense:.0%} of rows dense)"


def noted(name: str, matrix: Linear, notes: Notes) -> Linear:
    """The table is left as it is: what is done with it is timed as a whole."""
    part = next((part for place, part in MATRICES.items() if place in name), None)
    return matrix if part is None else Noted(matrix, part, notes)


def noted_ops(ops: Ops, notes: Notes) -> Ops:
    changed = {name: notes.noting(part, name, getattr(ops, name)) for name, part in OPERATIONS.items()}

    def geglu(gate: mx.array, up: mx.array | None = None) -> mx.array:
        return notes.noting("experts" if up is None else "dense MLP", "geglu", ops.geglu)(gate, up)

    return replace(ops, geglu=geglu, **changed)


def measure(notes: Notes, rounds: int) -> dict[Key, list[float]]:
    """Seconds of every distinct call, once per round; a round before them warms up."""
    found: dict[Key, list[float]] = {key: [] for key in notes.calls}
    for turn in range(rounds + 1):
        for key, call in notes.calls.items():
            repeats = 1 if len(key) == 1 or not mx.metal.is_available() else REPEATS
            start = time.perf_counter()
            mx.eval([leaves(call()) for _ in range(repeats)])
            if turn:
                found[key].append((time.perf_counter() - start) / repeats)
    return found


def leaves(result: Any) -> list[mx.array]:
    if isinstance(result, mx.array):
        return [result]
    if result is None or isinstance(result, int | float | bool):
        return []
    if isinstance(result, tuple | list):
        return [leaf for item in result for leaf in leaves(item)]
    return [leaf for f in fields(result) for leaf in leaves(getattr(result, f.name))]


def summed(notes: Notes, seconds: dict[Key, list[float]]) -> dict[str, dict[str, float]]:
    parts: dict[str, list[Key]] = {}
    for key in seconds:
        parts.setdefault(key[0], []).append(key)
    found = {}
    for part, keys in parts.items():
        rounds = [
            1000 * sum(notes.count[key] * took for key, took in zip(keys, turn, strict=True))
            for turn in zip(*(seconds[key] for key in keys), strict=True)
        ]
        found[part] = {
            "milliseconds": statistics.median(rounds),
            "min": min(rounds),
            "max": max(rounds),
            "calls": sum(notes.count[key] for key in keys),
        }
    return found
