"""A model cut down to one layer of each kind, on its own weights, to try operations on before they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..backend import CanvasSpec
from ..config import GenerationConfig, ModelConfig, TextConfig
from ..tensors import layer_name
from .economy import Saving
from .kernels.ops import Ops
from .model import MLXModel
from .network import Network
from .step import denoise
from .weights import DTYPES, Weights

CANVAS = 32  # positions, at most: plain operations make float32 arrays as wide as the vocabulary of each
T = TypeVar("T")


def trial(config: ModelConfig, weights: Weights, *, survivors: bool) -> Callable[[Ops], None]:
    """A function that reads a prompt and takes two steps of a block with the operations it is given.

    With ``survivors`` half of the rows go the dense way, so that no operation is left out.
    """
    layers, canvas = one_of_each(config.text), min(CANVAS, config.canvas_length)
    config = dataclasses.replace(config, text=only(config.text, layers), canvas_length=canvas)
    matrices, arrays = renamed(weights.matrices, layers), renamed(weights.arrays, layers)
    saving = Saving(dense=0.5 if survivors else None)

    def run(ops: Ops) -> None:
        network = Network(config.text, matrices, arrays, DTYPES[weights.dtype], ops)
        model = MLXModel(config, network, weights)
        tokens = np.random.default_rng(1).integers(0, config.text.vocab_size, (1, canvas))
        state = model.begin(model.encode(tokens), [CanvasSpec(GenerationConfig(), seed=1)])
        block, carried = state.block, state.carried
        for at in range(2):
            carried = denoise(network, block.settings, block.prefix, carried, block.schedule.at(at), saving)
            mx.eval(carried.packed, carried.soft)

    return run


def one_of_each(text: TextConfig) -> list[int]:
    """The first sliding and the first full layer."""
    first: dict[bool, int] = {}
    for i in range(text.num_hidden_layers):
        first.setdefault(text.full(i), i)
    return sorted(first.values())


def only(text: TextConfig, layers: list[int]) -> TextConfig:
    """The config with these layers alone."""
    per_layer = ("layer_types", "head_dims", "num_key_value_heads", "ropes")
    kept: dict[str, Any] = {name: tuple(getattr(text, name)[i] for i in layers) for name in per_layer}
    return dataclasses.replace(text, num_hidden_layers=len(layers), **kept)


def renamed(tensors: Mapping[str, T], layers: list[int]) -> dict[str, T]:
    """Those of ``layers``, under the numbers that they have in the smaller model; all others as they are."""
    found = dict(tensors)
    for new, old in enumerate(layers):
        before, after = f"{layer_name(old)}.", f"{layer_name(new)}."
        found |= {after + name.removeprefix(before): x for name, x in tensors.items() if name.startswith(before)}
    return found
