"""One denoising step as a graph: decode, read the vocabulary, accept, renoise, clamp, freeze, stop.

The rules are those of ``sampling.rules``, for all rows at once and without the host: nothing here waits. ``denoise`` is
a function of trees of arrays; on a GPU it is compiled, and the graph of a step is made while the one before runs
(``Denoiser``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..backend import CanvasSpec, CanvasView
from ..config import UNSET, ModelConfig
from ..sampling import rules
from .cache import MLXCache
from .compiled import Compiled
from .economy import Economy, Saving
from .network import Network, Prefix
from .noise import block_noise
from .vocabulary import Bias, Reading, bias_of_bans, read_canvas

NEVER = 2**30  # a stability threshold that no run reaches: no early stop


@dataclass(frozen=True)
class Schedule:
    """What differs from step to step, on the device. N is the largest step cap among the rows.

    Args:
        draw: float32 [B, N, C].  renoise: int32 [B, N, C], what a rejected position becomes.
        temperature: float32 [B, N].
    """

    draw: mx.array
    renoise: mx.array
    temperature: mx.array

    def at(self, step: int) -> Moment:
        return Moment(mx.array(step), self.draw[:, step], self.renoise[:, step], self.temperature[:, step])


@dataclass(frozen=True)
class Moment:
    """One step of a ``Schedule``: its number, int32, and without the axis of steps what it reads there."""

    at: mx.array
    draw: mx.array
    renoise: mx.array
    temperature: mx.array


@dataclass(frozen=True)
class Settings:
    """What a block's steps share, on the device.

    Args:
        clamp: int32 [B, C], -1 where free.  bias: ``None`` where no id is banned.
        bound, confidence: float32 [B].  stability, cap: int32 [B].  greedy: bool [B].
    """

    clamp: mx.array
    bias: Bias | None
    bound: mx.array
    confidence: mx.array
    stability: mx.array
    cap: mx.array
    greedy: mx.array


@dataclass(frozen=True)
class Carried:
    """What one step hands to the next. Fields are those of ``CanvasView`` on the device, and

    Args:
        run: int32 [B], how many argmax canvases before the current one equal it.
        soft: [B, C, D] soft embedding for the next step, ``None`` before the first.
        packed: int32 [B, 5C + 3], the view in one array, and how many rows of the soft embedding are flat.
    """

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


@dataclass(frozen=True)
class Block:
    """A block in progress. ``steps`` is N, or 0 when every row was decided before the first step."""

    prefix: Prefix
    settings: Settings
    schedule: Schedule
    steps: int
    economy: Economy


@dataclass(frozen=True)
class State:
    """A block after ``at`` steps. ``ahead`` holds the state that follows, once its graph is made.

    MLX binds a graph to the stream of the thread that made it, hence the stream beside it, and what the step saves.
    """

    block: Block
    at: int
    carried: Carried
    ahead: list[tuple[Saving, mx.Stream, State]] = field(default_factory=list)


class Denoiser:
    """Steps of one model. ``compiled``: the step is compiled, and its graph made one step ahead."""

    def __init__(self, network: Network, config: ModelConfig, *, compiled: bool, survivors: bool, hold: bool):
        self.network, self.config, self.compiled = network, config, compiled
        self.survivors, self.hold = survivors, hold
        function = functools.partial(denoise, network)
        self.function = Compiled(function) if compiled else function

    def begin(self, cache: MLXCache, specs: Sequence[CanvasSpec]) -> State:
        """Noise, tables and start canvas of a block, submitted."""
        length = self.config.canvas_length
        assert len(specs) == len(cache.lengths), (len(specs), len(cache.lengths))
        checked = [dataclasses.replace(s, masks=s.masks.checked(length, self.config.text.vocab_size)) for s in specs]
        steps = max(s.settings.max_denoising_steps for s in specs)
        settings, schedule, carried = tables(checked, steps, length, self.config.text.vocab_size)
        prefix = self.network.prefix(cache, length, rounded=self.compiled)
        economy = Economy.of(specs, length, survivors=self.survivors, hold=self.hold)
        steps = 0 if all(s.decided(length) for s in specs) else steps
        mx.async_eval(carried.packed, schedule.draw, schedule.renoise)
        return State(Block(prefix, settings, schedule, steps, economy), 0, carried)

    def step(self, state: State) -> State:
        """The state one step later, submitted. Finished rows are computed along and keep what they had."""
        if state.at >= state.block.steps:
            return state
        saving, stream = state.block.economy.saving(), mx.default_stream(mx.default_device())
        last = state.at + 1 == state.block.steps
        saving = dataclasses.replace(saving, rows=None) if last else saving  # what it shows is final
        # The last view may have changed the plan, and the caller the thread.
        made = [after for *key, after in state.ahead if key == [saving, stream]]
        state.ahead.clear()
        after = made[0] if made else self._next(state, saving)
        mx.async_eval(after.carried.packed, after.carried.run, after.carried.soft)
        if self.compiled and after.at < after.block.steps:
            # While the device is at work. It is submitted when the host knows that it is due.
            after.ahead.append((saving, stream, self._next(after, saving)))
        return after

    def _next(self, state: State, saving: Saving) -> State:
        block = state.block
        args = (block.settings, block.prefix, state.carried, block.schedule.at(state.at), saving)
        return State(block, state.at + 1, self.function(*args))

    @staticmethod
    def read(state: State) -> CanvasView:
        """The view on the host: waits for the step, one transfer."""
        packed = np.array(state.carried.packed)
        length = state.carried.canvas.shape[1]
        canvas, argmax, accepted, entropy, confidence = np.split(packed[:, : 5 * length], 5, -1)
        done, steps, flat = (packed[:, 5 * length + i].copy() for i in range(3))
        entropy, confidence = (np.ascontiguousarray(x).view(np.float32) for x in (entropy, confidence))
        view = CanvasView(
            canvas.copy(), argmax.copy(), accepted.astype(bool), entropy, confidence, done.astype(bool), steps
        )
        state.block.economy.learn(view, int(flat.sum()), state.at)
        return view


def tables(specs: Sequence[CanvasSpec], steps: int, length: int, vocab_size: int) -> tuple[Settings, Schedule, Carried]:
    """What the steps of a block need of ``specs``, and the canvas they start from."""
    settings, masks = [s.settings for s in specs], [s.masks for s in specs]
    noise = block_noise(specs, steps=steps, length=length, vocab_size=vocab_size)
    clamp = _ids([m.clamp for m in masks], length)
    early = [s.stability_threshold is not None and s.confidence_threshold is not None for s in settings]
    schedule = Schedule(
        draw=noise.draw,
        renoise=_given(_ids([m.renoise_from for m in masks], length)[:, None], noise.renoise),
        # those of rows with a lower cap repeat, unread
        temperature=mx.array(np.stack([np.resize(rules.temperatures(s), steps) for s in settings])),
    )
    shared = Settings(
        clamp=clamp,
        bias=bias_of_bans([(m.banned, m.banned_until) for m in masks], length, vocab_size),
        bound=mx.array([s.entropy_bound for s in settings], dtype=mx.float32),
        confidence=mx.array([s.confidence_threshold or 0.0 for s in settings], dtype=mx.float32),
        stability=mx.array([s.stability_threshold if e else NEVER for s, e in zip(settings, early, strict=True)]),
        cap=mx.array([s.max_denoising_steps for s in settings]),
        greedy=mx.array([s.temperature == 0 for s in settings]),
    )
    canvas = _given(clamp, _given(_ids([m.init for m in masks], length), noise.start))
    nothing, zero = mx.zeros((len(specs), length)), mx.zeros((len(specs),), mx.int32)
    decided = mx.array([spec.decided(length) for spec in specs])
    view = (canvas, canvas, nothing > 0, nothing, nothing, decided, zero)
    return shared, schedule, Carried(*view, run=zero, soft=None, packed=_pack(*view, zero))


def first(bias: Bias, rows: int, length: int) -> Bias:
    """Of canvases of ``length``, the first ``rows`` positions each."""
    classes = bias.values.shape[-1]
    return Bias(bias.classes, bias.values.reshape(-1, length, classes)[:, :rows].reshape(-1, classes))


def denoise(
    network: Network, block: Settings, prefix: Prefix, before: Carried, moment: Moment, saving: Saving
) -> Carried:
    """One step. What is static about it are the parts of the trees that are no arrays."""
    hidden, at = network.decode(before.canvas, prefix, before.soft), moment.at
    read = _read(network, hidden, moment, block.bias, before, saving)
    free = block.clamp == UNSET
    argmax = _given(block.clamp, read.argmax)
    drawn = mx.where(block.greedy[:, None], read.argmax, read.drawn)
    accepted = accept(read.entropy, block.bound, free)
    canvas = _given(block.clamp, mx.where(accepted, drawn, moment.renoise))
    same = (argmax == before.argmax).all(-1) & (at > 0)
    run = mx.where(same, before.run + 1, 0)
    stop = (run >= block.stability) & confident(read.entropy, block.confidence, free)
    done = before.done | stop | (block.cap == at + 1)

    def kept(old: mx.array, new: mx.array) -> mx.array:
        return mx.where(before.done[:, None], old, new)

    view = (
        kept(before.canvas, canvas),
        kept(before.argmax, argmax),
        kept(before.accepted, accepted),
        kept(before.entropy, read.entropy),
        kept(before.confidence, read.confidence),
        done,
        mx.where(before.done, before.steps, at + 1),
    )
    return Carried(*view, run=run, soft=read.soft, packed=_pack(*view, mx.where(before.done, 0, read.flat)))


def _read(
    network: Network, hidden: mx.array, moment: Moment, bias: Bias | None, before: Carried, saving: Saving
) -> Reading:
    """What the vocabulary says of every position; a tail that is held keeps what it had."""
    head = saving.rows
    if head is None or before.soft is None:
        return read_canvas(network, hidden, moment.temperature, moment.draw, bias, saving.dense)
    read = read_canvas(
        network,
        hidden[:, :head],
        moment.temperature,
        moment.draw[:, :head],
        None if bias is None else first(bias, head, hidden.shape[1]),
        saving.dense,
    )

    def whole(new: mx.array, old: mx.array) -> mx.array:
        return mx.concatenate([new, old[:, head:]], 1)

    return Reading(
        argmax=whole(read.argmax, before.argmax),
        drawn=whole(read.drawn, before.argmax),
        entropy=whole(read.entropy, before.entropy),
        confidence=whole(read.confidence, before.confidence),
        soft=whole(read.soft, before.soft),
        flat=read.flat,
    )


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


def _pack(*view: mx.array) -> mx.array:
    """int32 [B, 5C + 3]; floats keep their bits."""
    columns = [x.view(mx.int32) if x.dtype == mx.float32 else x.astype(mx.int32) for x in view]
    return mx.concatenate([x if x.ndim == 2 else x[:, None] for x in columns], -1)
