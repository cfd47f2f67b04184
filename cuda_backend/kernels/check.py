"""A self-check: before kernels are used, a few layers of the model run on them, each beside its plain version.

A prompt and two steps of a block, on the model's own weights: so every kernel meets what it will meet, and nothing is
compiled that is not needed anyway. It finds a compiler, a driver or a card that goes wrong on a kernel; for subtle
mistakes there are the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlx_diffgemma.backend import CanvasSpec
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import BackendError

from ..graphs import Capture
from ..linear import Quantized, Stack, Weight
from ..model import TorchModel
from ..weights import Layer, Weights
from .choice import Choice
from .ops import Operation, Ops
from .quantize import Fp8Rows
from .vocabulary import Seen

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # root mean square of the difference over that of the result
WORST = 8.0  # times as much: the largest difference over the largest value
AGREED = 0.9  # of whole numbers, where a tie may be broken either way
TWO_STEPS = GenerationConfig(max_denoising_steps=2, confidence_threshold=None)


def self_check(choice: Choice, fused: Ops, plain: Ops, config: ModelConfig, weights: Weights) -> None:
    """Compare every kernel of ``choice`` with plain torch on one layer of each kind.

    Raises:
        BackendError: a kernel differs; names it.
    """
    seen: set[str] = set()
    layers = one_of_each(config, weights)
    config, weights = only(config, weights, layers)
    table = weights.embed_tokens
    fields = [f.name for f in dataclasses.fields(Ops)]
    both = {name: beside(name, getattr(fused, name), getattr(plain, name), choice, seen, table) for name in fields}
    model = TorchModel(config, weights, table.device, table.dtype, Ops(**both), whole=True)
    cache = model.encode(tokens_of(config))
    state = model.begin(cache, [CanvasSpec(TWO_STEPS, seed=1)])
    for _ in range(TWO_STEPS.max_denoising_steps):
        state = model.step(state)
    missed = {*choice.fused} - seen - {"graph"}
    assert not missed, f"never called: {missed}"


def tokens_of(config: ModelConfig) -> np.ndarray:
    """A prompt of a canvas's length, [1, C]."""
    return np.random.default_rng(1).integers(0, config.text.vocab_size, (1, config.canvas_length))


# ---- a model of few layers


def one_of_each(config: ModelConfig, weights: Weights) -> list[int]:
    """The first layer of each kind: sliding or full, and how its weights are stored."""
    first: dict[Any, int] = {}
    for i, layer in enumerate(weights.layers):
        first.setdefault((config.text.full(i), *map(stored_as, matrices_of(layer))), i)
    return list(first.values())


def matrices_of(layer: Layer) -> list[Weight]:
    attention, mlp, experts = layer.self_attn, layer.mlp, layer.experts
    pairs = [(x.gate_up_proj, x.down_proj) for x in (mlp, experts)]
    return [attention.qkv_proj, attention.o_proj, layer.router.proj, *pairs[0], *pairs[1]]


def stored_as(weight: Weight) -> Any:
    if isinstance(weight, Stack):
        return tuple(map(stored_as, weight.pieces))
    return (weight.encoding, weight.fp8_activations) if isinstance(weight, Quantized) else "dense"


def only(config: ModelConfig, weights: Weights, layers: list[int]) -> tuple[ModelConfig, Weights]:
    """The model with these layers alone."""
    text = config.text
    per_layer = ("layer_types", "head_dims", "num_key_value_heads", "ropes")
    kept: dict[str, Any] = {name: tuple(getattr(text, name)[i] for i in layers) for name in per_layer}
    text = dataclasses.replace(text, num_hidden_layers=len(layers), **kept)
    chosen = tuple(weights.layers[i] for i in layers)
    return dataclasses.replace(config, text=text), dataclasses.replace(weights, layers=chosen)


# ---- beside each other


def beside(name: str, fused: Operation, plain: Operation, choice: Choice, seen: set[str], table: Tensor) -> Operation:
    """An operation that runs both, compares, and gives the plain result."""

    def run(*args: Any, **named: Any) -> Any:
        kernel = kernel_of(name, args)
        if not choice.on(kernel):
            return plain(*args, **named)
        seen.add(kernel)
        found = outputs(name, args, fused(*args, **named))
        truth = plain(*args, **named)
        good = same(found, outputs(name, args, truth), table.dtype)
        if good and isinstance(truth, Seen):
            good = as_likely(args[0], table, found, truth)
        if not good:
            place = choice.gpu and choice.gpu.name
            raise BackendError(
                f"kernel {kernel!r} does not give what plain torch gives on {place}: load with kernels='ops', and "
                "please report it"
            )
        return truth

    return run


def kernel_of(name: str, args: tuple[Any, ...]) -> str:
    """The kernel behind an operation; a product's depends on its sides."""
    if name != "linear":
        return name
    pieces = args[1].pieces if isinstance(args[1], Stack) else (args[1],)
    packed = any(isinstance(piece, Quantized) for piece in pieces)
    return "fp8_linear" if isinstance(args[0], Fp8Rows) else "packed_linear" if packed else "dense"


def outputs(name: str, args: tuple[Any, ...], result: Any) -> Any:
    """All that an operation leaves: keys and values of ``heads`` go to buffers, its last two arguments."""
    if name != "heads":
        return result
    length = args[0].shape[1]
    return (result, *(buffer[:, :, :length].clone() for buffer in args[-2:]))


def same(found: Any, truth: Any, dtype: torch.dtype) -> bool:
    return all(close(*pair, dtype) for pair in zip(tensors(found), tensors(truth), strict=True))


def tensors(result: Any) -> Iterator[Tensor]:
    """Of ``Seen``, the ids are left out: they are compared by what they stand for."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Fp8Rows):
        yield result.dense(torch.float32)
    elif isinstance(result, Seen):
        yield from (result.entropy, result.confidence, result.greatest, result.total)
    elif dataclasses.is_dataclass(result):
        yield from tensors([getattr(result, f.name) for f in dataclasses.fields(result)])
    elif result is not None:
        for item in result:
            yield from tensors(item)


def close(found: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    """False where a number is none."""
    if found.shape != truth.shape or found.dtype != truth.dtype:
        return False
    if not truth.dtype.is_floating_point:
        return share(found == truth) >= AGREED
    difference, truth, bound = found.double() - truth.double(), truth.double(), BOUNDS[dtype]
    mean = difference.square().mean().sqrt() <= bound * truth.square().mean().sqrt()
    most = difference.abs().max() <= WORST * bound * truth.abs().max()
    return bool(mean & most)


def as_likely(hidden: Tensor, table: Tensor, found: Seen, truth: Seen) -> bool:
    """Whether the ids of the greatest logits have logits as great, but for rounding, and draws lie close by."""
    ids = [seen.argmax.clamp(0, len(table) - 1) for seen in (found, truth)]
    one, other = ((hidden * table[row]).float().sum(-1) for row in ids)
    near = (found.drawn - truth.drawn).abs() <= len(table) // 64
    return min(share(one >= other - BOUNDS[table.dtype] * other.abs()), share(near)) >= AGREED


def share(true: Tensor) -> float:
    return true.double().mean().item()


# ---- a captured step


def check_graph(model: TorchModel, capture: Capture) -> None:
    """Blocks by graphs that were captured for others, with a commit and without: bit for bit what they are without.

    Raises:
        BackendError: they differ.
    """
    same = model.config, model.network.weights, model.device, model.dtype, model.network.ops
    graphed, plain = (two_steps(one) for one in (TorchModel(*same, capture), TorchModel(*same, whole=True)))
    if not all(np.array_equal(*pair) for pair in zip(graphed, plain, strict=True)):
        raise BackendError("a step as a CUDA graph differs from the step: load with kernels='ops', and report it")


def two_steps(model: TorchModel) -> list[np.ndarray]:
    """All that is shown of four blocks behind one prompt, of which the last two commit canvases."""
    cache, shown = model.encode(tokens_of(model.config)), list[np.ndarray]()
    canvas = tokens_of(model.config), np.array([model.config.canvas_length])
    for seed, commit in ((1, None), (2, None), (3, canvas), (4, canvas)):
        settings = TWO_STEPS.replace(temperature=0.25 * seed)
        state = model.begin(cache, [CanvasSpec(settings, seed=seed)], commit=commit)
        for _ in range(TWO_STEPS.max_denoising_steps):
            state = model.step(state)
            shown += vars(model.read(state)).values()
    return shown
