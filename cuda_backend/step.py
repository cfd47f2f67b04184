"""One denoising step on the device: decode, look at the vocabulary, accept, renoise, stop. Nothing waits for the host.

``Block`` is what a block's rows are told, made once; ``State`` is where they are. Every table has its first axis over
steps, so that the step's number stays on the device as well and a step can be captured in a graph.
The rules are those of ``mlx_diffgemma.sampling.rules``, which see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlx_diffgemma.backend import CanvasSpec, Masks
from mlx_diffgemma.config import UNSET, GenerationConfig, ModelConfig
from mlx_diffgemma.sampling import rules

from .cache import Prefix
from .network import Network
from .noise import BatchNoise, batch_noise
from .vocabulary import Scratch, look, scratch, slices

Bans = list[tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Block:
    """What is fixed while a block is denoised. N steps, H steps of history."""

    prefix: Prefix
    draw: Tensor  # float32 [N, B, C]
    renoise: Tensor  # int32 [N, B, C], ``renoise_from`` already in it
    temperature: Tensor  # float32 [N, B]
    clamp: Tensor  # int32 [B, C], UNSET where free
    free: Tensor  # bool [B, C]
    greedy: Tensor  # bool [B], takes the argmax where a token would be drawn
    bound: Tensor  # float32 [B, 1]
    depth: Tensor  # bool [H, B], which entries of the history must equal the newest argmax
    confident: Tensor  # float32 [B]; minus infinity where a row never stops early
    cap: Tensor  # int32 [B]
    bans: Bans
    buffers: Scratch


@dataclass(frozen=True)
class State:
    """A batch of canvases in progress. [B, C] unless said otherwise."""

    block: Block
    at: Tensor  # int64 [1], the step to come
    canvas: Tensor  # int32
    argmax: Tensor  # int32
    accepted: Tensor  # bool
    entropy: Tensor  # float32
    confidence: Tensor  # float32
    soft: Tensor  # [B, C, D], model dtype
    history: Tensor  # int32 [H, B, C], newest last
    done: Tensor  # bool [B]
    steps: Tensor  # int32 [B]


def begin(config: ModelConfig, network: Network, prefix: Prefix, specs: Sequence[CanvasSpec]) -> State:
    """The state before the first step. Noise, temperatures and masks of all steps are made here."""
    device = network.weights.embed_tokens.device
    length, vocab = config.canvas_length, config.text.vocab_size
    settings = [spec.settings for spec in specs]
    masks = [spec.masks.checked(length, vocab) for spec in specs]
    steps = max(s.max_denoising_steps for s in settings)
    noise = batch_noise(specs, steps=steps, length=length, vocab_size=vocab, device=device)
    clamp = stacked([m.clamp for m in masks], length, device)
    canvas = given(clamp, given(stacked([m.init for m in masks], length, device), noise.start))
    block = _block(config, prefix, noise, settings, masks, clamp)
    zeros = torch.zeros(canvas.shape, device=device)
    return State(
        block=block,
        at=torch.zeros(1, dtype=torch.int64, device=device),
        canvas=canvas,
        argmax=canvas,
        accepted=torch.zeros_like(block.free),
        entropy=zeros,
        confidence=zeros,
        soft=torch.zeros((*canvas.shape, config.text.hidden_size), dtype=network.dtype, device=device),
        history=canvas.new_full((len(block.depth), *canvas.shape), UNSET),
        done=~block.free.any(-1),
        steps=torch.zeros(len(specs), dtype=torch.int32, device=device),
    )


def _block(
    config: ModelConfig,
    prefix: Prefix,
    noise: BatchNoise,
    settings: Sequence[GenerationConfig],
    masks: Sequence[Masks],
    clamp: Tensor,
) -> Block:
    device, length, vocab = clamp.device, config.canvas_length, config.text.vocab_size
    steps, count = len(noise.draw), len(settings)
    stops = [s.stability_threshold is not None and s.confidence_threshold is not None for s in settings]
    # A row has fewer earlier canvases than steps: a deeper threshold is never met, and needs no longer history.
    wanted = [min(s.stability_threshold or 0, s.max_denoising_steps) for s in settings]
    depths = [depth if stop else 0 for depth, stop in zip(wanted, stops, strict=True)]
    age = np.arange(max(depths), 0, -1)[:, None]  # 1 is the newest
    temperature = np.ones((steps, count), np.float32)
    for row, s in enumerate(settings):
        temperature[: s.max_denoising_steps, row] = rules.temperatures(s)

    def put(values: Sequence[float] | np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device)

    limits = [(s.confidence_threshold or 0.0) if stop else -np.inf for s, stop in zip(settings, stops, strict=True)]
    return Block(
        prefix=prefix,
        draw=noise.draw,
        renoise=given(stacked([m.renoise_from for m in masks], length, device), noise.renoise),
        temperature=put(temperature, torch.float32),
        clamp=clamp,
        free=clamp == UNSET,
        greedy=put([s.temperature == 0 for s in settings], torch.bool),
        bound=put([s.entropy_bound for s in settings], torch.float32)[:, None],
        depth=put(age <= np.array(depths), torch.bool),
        confident=put(limits, torch.float32),
        cap=put([s.max_denoising_steps for s in settings], torch.int32),
        bans=banned_by_slice(masks, length, vocab, device),
        buffers=scratch(count * length, vocab, device),
    )


def stacked(masks: Sequence[np.ndarray | None], length: int, device: torch.device) -> Tensor:
    """int32 [B, C] of one kind of mask, UNSET throughout where a row has none."""
    unset = np.full(length, UNSET, np.int32)
    return torch.from_numpy(np.stack([unset if m is None else np.asarray(m, np.int32) for m in masks])).to(device)


def given(mask: Tensor, otherwise: Tensor) -> Tensor:
    """The mask's ids where it has any, ``otherwise`` elsewhere."""
    return torch.where(mask == UNSET, otherwise, mask)


def banned_by_slice(masks: Sequence[Masks], length: int, vocab_size: int, device: torch.device) -> Bans:
    """Per slice of the vocabulary pass, (row in the slice, id) of all that is banned there; None where nothing is."""
    pairs = [
        (np.repeat(np.arange(m.banned_until) + row * length, len(m.banned)), np.tile(m.banned, m.banned_until))
        for row, m in enumerate(masks)
    ]
    table = np.concatenate([np.stack(pair, -1) for pair in pairs]).astype(np.int64)
    found: Bans = []
    for rows in slices(len(masks) * length, vocab_size):
        inside = table[(table[:, 0] >= rows.start) & (table[:, 0] < rows.stop)] - (rows.start, 0)
        index = torch.from_numpy(inside).to(device)
        found.append((index[:, 0], index[:, 1]) if len(inside) else None)
    return found


def step(config: ModelConfig, network: Network, state: State) -> State:
    """One denoising step of every row; a finished row keeps what it has."""
    block = state.block
    shape = state.canvas.shape
    hidden = network.decode(state.canvas, state.soft, block.prefix)
    at = state.at.clamp_max(len(block.draw) - 1)
    seen = look(
        hidden.flatten(0, 1),
        network.weights.embed_tokens,
        config.text,
        scale=network.scale,
        temperature=block.temperature.index_select(0, at)[0].repeat_interleave(shape[1]),
        uniform=block.draw.index_select(0, at).flatten(),
        bans=block.bans,
        buffers=block.buffers,
    )
    best = seen.argmax.view(shape).int()
    drawn = torch.where(block.greedy[:, None], best, seen.drawn.view(shape).int())
    entropy = seen.entropy.view(shape)
    argmax = given(block.clamp, best)
    accepted = accept(entropy, block.bound, block.free)
    canvas = given(block.clamp, torch.where(accepted, drawn, block.renoise.index_select(0, at)[0]))
    steps = state.steps + (~state.done).int()
    stop = stable(state.history, argmax, block.depth) & (mean(entropy, block.free) < block.confident)

    def thaw(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(state.done.view(-1, *[1] * (new.ndim - 1)), old, new)

    return State(
        block=block,
        at=state.at + 1,
        canvas=thaw(canvas, state.canvas),
        argmax=thaw(argmax, state.argmax),
        accepted=thaw(accepted, state.accepted),
        entropy=thaw(entropy, state.entropy),
        confidence=thaw(seen.confidence.view(shape), state.confidence),
        soft=thaw(seen.soft.view_as(state.soft), state.soft),
        history=torch.cat([state.history, argmax[None]])[1:],
        done=state.done | stop | (steps >= block.cap),
        steps=steps,
    )


def accept(entropy: Tensor, bound: Tensor, free: Tensor) -> Tensor:
    """bool [B, C]: taken in order of entropy while all earlier ones together stay within ``bound`` [B, 1] nats."""
    order = torch.where(free, entropy, torch.inf).sort(dim=-1, stable=True).indices
    ranked = (entropy * free).gather(1, order)
    chosen = ranked.cumsum(-1) - ranked <= bound
    return torch.zeros_like(free).scatter_(1, order, chosen) & free


def stable(history: Tensor, argmax: Tensor, depth: Tensor) -> Tensor:
    """bool [B]: every entry of history [H, B, C] that ``depth`` [H, B] asks for equals ``argmax`` [B, C]."""
    return ((history == argmax).all(-1) | ~depth).all(0)


def mean(entropy: Tensor, free: Tensor) -> Tensor:
    """float32 [B]: the mean over free positions, 0 where there are none."""
    return (entropy * free).sum(-1) / free.sum(-1).clamp_min(1)
