"""The loop: canvases of many rows, denoised in lockstep, committed one after another. There is no second loop.

It knows token ids and models, not text. ``run`` asks ``arrivals`` for new rows between blocks, so a fixed batch and a
server's queue are the same loop. A row that ends leaves before the next block; a row that stops early within a block
is frozen by the model. The last canvas of a row is never read back.

    encode new prompts -> begin (commits the canvases before) -> step, read, step, read ... -> blocks -> again

A step is submitted only when the one before is known not to have been the last: forwards = steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..backend import CanvasSpec, CanvasView, Masks, Model
from ..config import GenerationConfig
from ..events import Block, Draft, Event, Finished, Stats
from . import rules

FREE = Masks()


@dataclass(frozen=True)
class Request:
    """One row to generate.

    Args:
        row: the caller's number for it; every event carries it.
        tokens: prompt ids.
        masks: what is given, per block; blocks beyond the last are free.
        ended: called with the visible ids after each block; true ends the row (stop texts live in the caller).
    """

    row: int
    tokens: tuple[int, ...]
    settings: GenerationConfig
    seed: int
    masks: tuple[Masks, ...] = ()
    ended: Callable[[tuple[int, ...]], bool] | None = None


@dataclass
class Progress:
    """What a row has so far."""

    request: Request
    arrived: float
    canvases: list[np.ndarray] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    denoising: float = 0.0  # seconds of this row's steps, the commit before the first of a block included
    first_draft: float = 0.0
    first_block: float = 0.0

    def spec(self) -> CanvasSpec:
        block, masks = len(self.canvases), self.request.masks
        given = masks[block] if block < len(masks) else FREE
        return CanvasSpec(self.request.settings, self.request.seed, block=block, masks=given)


Arrivals = Callable[[int], Sequence[Request] | None]


def fixed(requests: Sequence[Request]) -> Arrivals:
    """Arrivals of a batch that is known from the start."""
    waiting = [list(requests)]
    return lambda running: waiting.pop() if waiting else None


def run(model: Model, arrivals: Arrivals) -> Iterator[Event]:
    """Generate until no row is left and none will come.

    ``arrivals(running)`` is called before each block with the number of rows under way; it returns the requests that
    join, or ``None`` when there will never be another. It may wait when ``running`` is 0. Closing the iterator cancels
    within one step.
    """
    rows: list[Progress] = []
    cache: Any = None
    more = True
    while more or rows:
        joined = arrivals(len(rows)) if more else None
        more = joined is not None
        commit = _commit(rows, len(joined or ()))
        if joined:
            arrived = time.perf_counter()
            fresh = _encode(model, joined)
            rows += [Progress(request, arrived) for request in joined]
            cache = fresh if cache is None else cache.concat(fresh)
        if not rows:
            continue
        view = yield from _block(model, cache, rows, commit)
        staying = []
        for i, row in enumerate(rows):
            block, finished = _settle(model, row, view.argmax[i], int(view.steps[i]))
            yield block
            if finished is None:
                staying.append(i)
            else:
                yield finished
        if len(staying) < len(rows):
            cache = cache.select(staying) if staying else None
            rows = [rows[i] for i in staying]


def _encode(model: Model, requests: Sequence[Request]) -> Any:
    lengths = np.array([len(request.tokens) for request in requests], np.int64)
    tokens = np.zeros((len(requests), int(lengths.max())), np.int32)
    for i, request in enumerate(requests):
        tokens[i, : lengths[i]] = request.tokens
    return model.encode(tokens, lengths=lengths)


def _commit(rows: list[Progress], newcomers: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The canvases that the running rows finished last, with length 0 for rows that join now."""
    if not rows:
        return None
    length = len(rows[0].canvases[-1])
    last = [row.canvases[-1] for row in rows] + [np.zeros(length, np.int32)] * newcomers
    return np.stack(last), np.array([length] * len(rows) + [0] * newcomers, np.int64)


def _block(
    model: Model, cache: Any, rows: list[Progress], commit: tuple[np.ndarray, np.ndarray] | None
) -> Generator[Event, None, CanvasView]:
    """One block of all rows; yields a draft per row and step, returns the last view."""
    length = model.config.canvas_length
    specs = [row.spec() for row in rows]
    before = time.perf_counter()
    state = model.begin(cache, specs, commit=commit)
    done = np.array([spec.decided(length) for spec in specs])
    view = model.read(state) if done.all() else None
    while view is None or not done.all():
        state = model.step(state)
        view = model.read(state)
        now = time.perf_counter()
        for i, row in enumerate(rows):
            if not done[i]:
                row.first_draft = row.first_draft or now - row.arrived
                row.denoising += now - before
                yield _draft(row, i, view)
        before, done = time.perf_counter(), view.done
    return view


def _draft(row: Progress, i: int, view: CanvasView) -> Draft:
    return Draft(
        row=row.request.row,
        block=len(row.canvases),
        step=int(view.steps[i]),
        canvas=view.canvas[i],
        argmax=view.argmax[i],
        accepted=view.accepted[i],
        entropy=view.entropy[i],
        confidence=view.confidence[i],
    )


def _settle(model: Model, row: Progress, argmax: np.ndarray, steps: int) -> tuple[Block, Finished | None]:
    """Take a finished canvas into the row; decide whether the row goes on."""
    settings = row.request.settings
    canvas, end = rules.finish(argmax, settings.eos_token_ids, settings.pad_token_id)
    room = settings.max_tokens - len(row.visible)
    new = canvas[:end].tolist()[:room]
    block = Block(row.request.row, len(row.canvases), steps, canvas, tuple(new))
    row.canvases.append(canvas)
    row.visible += new
    row.steps.append(steps)
    row.first_block = row.first_block or time.perf_counter() - row.arrived
    stopped = end is not None and end <= room
    stopped = stopped or bool(row.request.ended and row.request.ended(tuple(row.visible)))
    if not stopped and len(row.visible) < settings.max_tokens:
        return block, None
    return block, Finished(
        row=row.request.row,
        tokens=tuple(row.visible),
        canvases=tuple(tuple(c.tolist()) for c in row.canvases),
        finish_reason="stop" if stopped else "length",
        stats=_stats(model, row),
    )


def _stats(model: Model, row: Progress) -> Stats:
    forwards, pad = sum(row.steps), row.request.settings.pad_token_id
    written = sum(int((canvas != pad).sum()) if pad is not None else canvas.size for canvas in row.canvases)
    return Stats(
        prompt_tokens=len(row.request.tokens),
        tokens=len(row.visible),
        seconds=time.perf_counter() - row.arrived,
        time_to_first_draft=row.first_draft,
        time_to_first_block=row.first_block,
        blocks=len(row.canvases),
        forwards=forwards,
        steps_per_block=tuple(row.steps),
        milliseconds_per_step=1000 * row.denoising / forwards if forwards else 0.0,
        tokens_per_forward=written / forwards if forwards else 0.0,
        peak_memory=model.peak_memory(),
        seed=row.request.seed,
    )
