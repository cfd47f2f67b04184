"""One denoising step on the device: decode, look at the vocabulary, accept, renoise, stop. Nothing waits for the host.

``Block`` is what a block's rows are told, made once; ``State`` is where they are. Every table has its first axis over
steps, so that the step's number stays on the device as well and a step can be captured in a graph.

A step begins with what the one before it left: the soft embedding of the self-conditioning is made from its hidden
states, a second pass over the vocabulary that a row's last step so never makes. The rules are those of
``mlx_diffgemma.sampling.rules``, which see.
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

from .cache import Chunk, Prefix, TorchCache
from .kernels.head import Bias, Seen, bias_of_bans
from .network import Network
from .noise import BatchNoise, batch_noise
from .view import pack


@dataclass(frozen=True)
class Commit:
    """Finished canvases that the first step reads into the cache, in one forward with its own."""

    tokens: Tensor  # int64 [B, T]
    cache: TorchCache
    chunk: Chunk


@dataclass(frozen=True)
class Block:
    """What is fixed while a block is denoised. N steps, H steps of history."""

    prefix: Prefix
    commit: Commit | None
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
    bias: Bias | None


@dataclass(frozen=True)
class Last:
    """What the next step needs of the one before to condition itself: N = B C rows."""

    hidden: Tensor  # [N, D], model dtype
    temperature: Tensor  # float32 [N]
    seen: Seen


@dataclass(frozen=True)
class State:
    """A batch of canvases in progress. [B, C] unless said otherwise."""

    block: Block
    last: Last | None  # None before the first step
    at: Tensor  # int64 [1], the step to come
    canvas: Tensor  # int32
    argmax: Tensor  # int32
    accepted: Tensor  # bool
    entropy: Tensor  # float32
    confidence: Tensor  # float32
    history: Tensor  # int32 [H, B, C], newest last
    done: Tensor  # bool [B]
    steps: Tensor  # int32 [B]

    @property
    def owing(self) -> TorchCache | None:
        """The cache that a commit is to be read into by the step to come."""
        return self.block.commit.cache if self.block.commit and self.last is None else None

    def view(self) -> Tensor:
        """All that ``CanvasView`` shows, in one tensor."""
        return pack(self.canvas, self.argmax, self.accepted, self.entropy, self.confidence, self.done, self.steps)


def begin(
    config: ModelConfig, network: Network, prefix: Prefix, specs: Sequence[CanvasSpec], commit: Commit | None
) -> State:
    """The state before the first step, of checked masks. Noise, temperatures and masks of all steps are made here."""
    device = network.weights.embed_tokens.device
    length, vocab = config.canvas_length, config.text.vocab_size
    settings = [spec.settings for spec in specs]
    masks = [spec.masks for spec in specs]
    steps = max(s.max_denoising_steps for s in settings)
    noise = batch_noise(specs, steps=steps, length=length, vocab_size=vocab, device=device)
    clamp = stacked([m.clamp for m in masks], length, device)
    canvas = given(clamp, given(stacked([m.init for m in masks], length, device), noise.start))
    block = _block(config, prefix, commit, noise, settings, masks, clamp)
    zeros = torch.zeros(canvas.shape, device=device)
    return State(
        block=block,
        last=None,
        at=torch.zeros(1, dtype=torch.int64, device=device),
        canvas=canvas,
        argmax=canvas,
        accepted=torch.zeros_like(block.free),
        entropy=zeros,
        confidence=zeros,
        history=canvas.new_full((len(block.depth), *canvas.shape), UNSET),
        done=~block.free.any(-1),
        steps=torch.zeros(len(specs), dtype=torch.int32, device=device),
    )


def _block(
    config: ModelConfig,
    prefix: Prefix,
    commit: Commit | None,
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
        commit=commit,
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
        bias=bias_of_bans([(m.banned, m.banned_until) for m in masks], length, vocab, device),
    )


def stacked(masks: Sequence[np.ndarray | None], length: int, device: torch.device) -> Tensor:
    """int32 [B, C] of one kind of mask, UNSET throughout where a row has none."""
    unset = np.full(length, UNSET, np.int32)
    return torch.from_numpy(np.stack([unset if m is None else np.asarray(m, np.int32) for m in masks])).to(device)


def given(mask: Tensor, otherwise: Tensor) -> Tensor:
    """The mask's ids where it has any, ``otherwise`` elsewhere."""
    return torch.where(mask == UNSET, otherwise, mask)


def step(config: ModelConfig, network: Network, state: State) -> State:
    """One denoising step of every row; a finished row keeps what it has."""
    block, shape, table = state.block, state.canvas.shape, network.weights.embed_tokens
    hidden = _hidden(config, network, state)
    at = state.at.clamp_max(len(block.draw) - 1)
    temperature = block.temperature.index_select(0, at)[0].repeat_interleave(shape[1])
    seen = network.ops.look(
        hidden,
        table,
        config.text.final_logit_softcapping,
        temperature=temperature,
        uniform=block.draw.index_select(0, at).flatten(),
        bias=block.bias,
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
        return torch.where(state.done[:, None], old, new)

    return State(
        block=block,
        last=Last(hidden, temperature, seen),
        at=state.at + 1,
        canvas=thaw(canvas, state.canvas),
        argmax=thaw(argmax, state.argmax),
        accepted=thaw(accepted, state.accepted),
        entropy=thaw(entropy, state.entropy),
        confidence=thaw(seen.confidence.view(shape), state.confidence),
        history=torch.cat([state.history, argmax[None]])[1:],
        done=state.done | stop | (steps >= block.cap),
        steps=steps,
    )


def _hidden(config: ModelConfig, network: Network, state: State) -> Tensor:
    """Hidden states [B C, D] of the canvas that the state holds; of a block's first step, the commit with them."""
    block, last = state.block, state.last
    if last is not None:
        soft = network.ops.soft(
            last.hidden,
            network.weights.embed_tokens,
            config.text.final_logit_softcapping,
            scale=network.scale,
            temperature=last.temperature,
            bias=block.bias,
            seen=last.seen,
        )
        return network.denoise(state.canvas, soft, block.prefix)
    if block.commit is None:
        return network.denoise(state.canvas, None, block.prefix)
    commit = block.commit
    return network.commit_and_denoise(commit.tokens, commit.cache, commit.chunk, state.canvas, block.prefix)


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
