"""One denoising step as a graph: decode, read the vocabulary, accept, renoise, clamp, freeze, stop.

The rules are those of ``sampling.rules``, for all rows at once and without the host: nothing here waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..backend import CanvasSpec, CanvasView
from ..config import UNSET, ModelConfig
from ..sampling import rules
from .cache import MLXCache
from .network import Layout, Network
from .noise import block_noise
from .vocabulary import Ban, read_canvas

NEVER = 2**30  # a stability threshold that no run reaches: no early stop


@dataclass(frozen=True)
class Block:
    """What a block's steps share. N is the largest step cap among the rows.

    Args:
        draw: float32 [B, N, C].  renoise: int32 [B, N, C], what a rejected position becomes.
        temperature: float32 [B, N].  clamp: int32 [B, C], -1 where free.
        bound, confidence: float32 [B].  stability, cap: int32 [B].  greedy: bool [B].
        steps: N, or 0 when every row was decided before the first step.
    """

    cache: MLXCache
    layout: Layout
    draw: mx.array
    renoise: mx.array
    temperature: mx.array
    clamp: mx.array
    ban: Ban | None
    bound: mx.array
    confidence: mx.array
    stability: mx.array
    cap: mx.array
    greedy: mx.array
    steps: int


@dataclass(frozen=True)
class State:
    """A block after ``at`` steps. Fields are those of ``CanvasView`` on the device, and

    Args:
        soft: [B, C, D] soft embedding for the next step, ``None`` before the first.
        run: int32 [B], how many argmax canvases before the current one equal it.
        packed: int32 [B, 5C + 2], the view in one array.
    """

    block: Block
    at: int
    canvas: mx.array
    argmax: mx.array
    accepted: mx.array
    entropy: mx.array
    confidence: mx.array
    done: mx.array
    steps: mx.array
    run: mx.array
    soft: mx.array | None
    packed: mx.array


def begin(network: Network, config: ModelConfig, cache: MLXCache, specs: Sequence[CanvasSpec]) -> State:
    """Noise, tables and start canvas of a block, submitted."""
    length, vocab, rows = config.canvas_length, config.text.vocab_size, len(specs)
    assert rows == len(cache.lengths), (rows, len(cache.lengths))
    settings, masks = [s.settings for s in specs], [s.masks.checked(length, vocab) for s in specs]
    steps = max(s.max_denoising_steps for s in settings)  # tables of rows with a lower cap repeat, unread
    noise = block_noise(specs, steps=steps, length=length, vocab_size=vocab)
    clamp = _ids([m.clamp for m in masks], length)
    decided = [spec.decided(length) for spec in specs]
    early = [s.stability_threshold is not None and s.confidence_threshold is not None for s in settings]
    block = Block(
        cache=cache,
        layout=network.layout(cache, length),
        draw=noise.draw,
        renoise=_given(_ids([m.renoise_from for m in masks], length)[:, None], noise.renoise),
        temperature=mx.array(np.stack([np.resize(rules.temperatures(s), steps) for s in settings])),
        clamp=clamp,
        ban=_ban(specs, vocab),
        bound=mx.array([s.entropy_bound for s in settings], dtype=mx.float32),
        confidence=mx.array([s.confidence_threshold or 0.0 for s in settings], dtype=mx.float32),
        stability=mx.array([s.stability_threshold if e else NEVER for s, e in zip(settings, early, strict=True)]),
        cap=mx.array([s.max_denoising_steps for s in settings]),
        greedy=mx.array([s.temperature == 0 for s in settings]),
        steps=0 if all(decided) else steps,
    )
    canvas = _given(clamp, _given(_ids([m.init for m in masks], length), noise.start))
    nothing, zero = mx.zeros((rows, length)), mx.zeros((rows,), mx.int32)
    view = (canvas, canvas, nothing > 0, nothing, nothing, mx.array(decided), zero)
    state = State(block, 0, *view, run=zero, soft=None, packed=_pack(*view))
    mx.async_eval(state.packed, block.draw, block.renoise)
    return state


def advance(network: Network, state: State) -> State:
    """The state one step later, submitted. Finished rows are computed along and keep what they had."""
    block, at = state.block, state.at
    if at >= block.steps:
        return state
    hidden, _, _ = network.decode(state.canvas, block.cache, block.layout, state.soft)
    read = read_canvas(network, hidden, block.temperature[:, at], block.draw[:, at], block.ban)
    free = block.clamp == UNSET
    argmax = _given(block.clamp, read.argmax)
    drawn = mx.where(block.greedy[:, None], read.argmax, read.drawn)
    accepted = accept(read.entropy, block.bound, free)
    canvas = _given(block.clamp, mx.where(accepted, drawn, block.renoise[:, at]))
    same = (argmax == state.argmax).all(-1) if at else mx.zeros(state.run.shape, mx.bool_)
    run = mx.where(same, state.run + 1, 0)
    stop = (run >= block.stability) & confident(read.entropy, block.confidence, free)
    done = state.done | stop | (block.cap == at + 1)

    def kept(old: mx.array, new: mx.array) -> mx.array:
        return mx.where(state.done[:, None], old, new)

    view = (
        kept(state.canvas, canvas),
        kept(state.argmax, argmax),
        kept(state.accepted, accepted),
        kept(state.entropy, read.entropy),
        kept(state.confidence, read.confidence),
        done,
        mx.where(state.done, state.steps, at + 1),
    )
    after = State(block, at + 1, *view, run=run, soft=read.soft, packed=_pack(*view))
    mx.async_eval(after.packed, after.run, after.soft)
    return after


def read(state: State) -> CanvasView:
    """The view on the host: waits for the step, one transfer."""
    packed = np.array(state.packed)
    length = state.canvas.shape[1]
    canvas, argmax, accepted, entropy, confidence = np.split(packed[:, : 5 * length], 5, -1)
    done, steps = packed[:, 5 * length].astype(bool), packed[:, 5 * length + 1].copy()
    entropy, confidence = (np.ascontiguousarray(x).view(np.float32) for x in (entropy, confidence))
    return CanvasView(canvas.copy(), argmax.copy(), accepted.astype(bool), entropy, confidence, done, steps)


def accept(entropy: mx.array, bound: mx.array, free: mx.array) -> mx.array:
    """``rules.accept`` for rows [B, C] with ``bound`` [B]; ties keep their order by counting, not by a stable sort."""
    key, place = mx.where(free, entropy, mx.inf), mx.arange(entropy.shape[1])
    mine, other = key[:, :, None], key[:, None, :]
    before = (other < mine) | ((other == mine) & (place[None, :] < place[:, None]))
    rank = before.sum(-1)
    ranked = mx.take_along_axis(mx.where(free, entropy, 0), mx.argsort(rank, -1), -1)
    chosen = mx.cumsum(ranked, -1) - ranked <= bound[:, None]
    return mx.take_along_axis(chosen, rank, -1) & free


def confident(entropy: mx.array, threshold: mx.array, free: mx.array) -> mx.array:
    """``rules.confident`` for rows [B, C]: bool [B]."""
    count = free.sum(-1)
    return (count == 0) | (mx.where(free, entropy, 0).sum(-1) / count < threshold)


def _given(mask: mx.array, otherwise: mx.array) -> mx.array:
    return mx.where(mask == UNSET, otherwise, mask)


def _ids(masks: Sequence[np.ndarray | None], length: int) -> mx.array:
    """int32 [B, C], -1 where a row gives nothing."""
    unset = np.full(length, UNSET, np.int32)
    return mx.array(np.stack([unset if mask is None else np.asarray(mask, np.int32) for mask in masks]))


def _ban(specs: Sequence[CanvasSpec], vocab_size: int) -> Ban | None:
    if not any(spec.masks.banned for spec in specs):
        return None
    ids = np.zeros((len(specs), vocab_size), bool)
    for row, spec in enumerate(specs):
        ids[row, list(spec.masks.banned)] = True
    return Ban(mx.array(ids), mx.array([spec.masks.banned_until for spec in specs]))


def _pack(*view: mx.array) -> mx.array:
    """int32 [B, 5C + 2]; floats keep their bits."""
    columns = [x.view(mx.int32) if x.dtype == mx.float32 else x.astype(mx.int32) for x in view]
    return mx.concatenate([x if x.ndim == 2 else x[:, None] for x in columns], -1)
