"""A step as one graph: captured once, replayed for every step of every block of the same shapes.

A graph freezes whatever the host decided while it was captured: addresses, shapes, numbers. So all that may change
lives in tensors whose addresses do not, the *fixed* states below: beginning a block copies its state there, a replay
reads them and leaves its result there. The step's number, temperatures, lengths, masks and noise are among them.
``tests/backends/test_graphs.py`` changes every one of them after a capture.

A block's first step is another graph than the rest: it has no soft embedding, and it may read a finished canvas. The
cache is not copied for every block; it lives where the graphs look for it (``rooms.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import TorchCache
from .rooms import Room, Ticket
from .step import State

KEPT = 4  # pairs of graphs in a room: with and without a commit, with other numbers of steps or of banned classes
WARM_UP = 2  # runs before a capture, in which libraries and kernels are loaded

Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]  # of a function of fixed tensors, to what repeats it


@dataclass(frozen=True)
class Captured:
    """The graphs of one set of shapes. Every replay leaves its result in ``later`` and ``view``."""

    first: State
    later: State
    view: Tensor  # int32 [B, 5 C + 2], see ``view.py``
    begin: Replay
    go_on: Replay


@dataclass(frozen=True)
class GraphState:
    """Where a block is that runs by graphs. It stands for fixed tensors: only the newest one of a block holds."""

    room: Room
    ticket: Ticket
    captured: Captured
    steps: int
    owing: TorchCache | None  # see ``State.owing``

    def view(self) -> Tensor:
        self.check()
        return self.captured.view if self.steps else self.captured.first.view()

    def check(self) -> None:
        assert self.room.holds(self.ticket), "this block is over: another one has begun on its cache"
        assert self.ticket.steps == self.steps, "this state is past: a step has been taken from it"


class Graphs:
    """The captured steps of one model. ``step`` is ``step.step`` of its network."""

    def __init__(self, step: Callable[[State], State], capture: Capture):
        self._step, self._capture = step, capture

    def begin(self, state: State, room: Room) -> GraphState:
        """A block's state put where the graphs of its shapes look for it; they are captured when there are none.

        The state's cache lives in ``room``.
        """
        key = shapes(state)
        if key not in room.graphs:
            room.graphs[key] = self._captured(bound(state, room.cache))
        room.graphs.move_to_end(key)
        while len(room.graphs) > KEPT:
            room.graphs.popitem(last=False)
        captured = room.graphs[key]
        copy(state, captured.first)
        return GraphState(room, room.enter(), captured, 0, state.owing)

    def step(self, state: GraphState) -> GraphState:
        state.check()
        (state.captured.go_on if state.steps else state.captured.begin)()
        state.ticket.steps += 1
        return dataclasses.replace(state, steps=state.steps + 1, owing=None)

    def _captured(self, state: State) -> Captured:
        first = fixed(state)
        later = fixed(dataclasses.replace(self._step(first), block=first.block), own=False)
        view = later.view()

        def run(before: State) -> Replay:
            def advance() -> None:
                after = self._step(before)
                copy(dataclasses.replace(after, block=first.block), later)
                view.copy_(after.view())

            return advance

        return Captured(first, later, view, self._capture(run(first)), self._capture(run(later)))


def leaves(state: Any) -> Iterator[tuple[Tensor, bool]]:
    """Every tensor in a state, and whether it is shared, that is, read where it lies instead of copied."""
    if isinstance(state, Tensor):
        yield state, False
    elif isinstance(state, (list, tuple, dict)):
        for item in state.values() if isinstance(state, dict) else state:
            yield from leaves(item)
    elif dataclasses.is_dataclass(state):
        for f in dataclasses.fields(state):
            kept = bool(f.metadata.get("shared"))
            yield from ((tensor, shared or kept) for tensor, shared in leaves(getattr(state, f.name)))


def shapes(state: State) -> tuple[Any, ...]:
    """What a graph depends on, beside where the cache lies."""
    return (
        *((tensor.shape, tensor.dtype) for tensor, _ in leaves(state)),
        state.block.commit is None,
        state.block.bias is None,
    )


def bound(state: State, cache: TorchCache) -> State:
    """The same state with ``cache`` to write a commit to: graphs must not keep alive the caches that they serve."""
    if state.block.commit is None:
        return state
    commit = dataclasses.replace(state.block.commit, cache=cache)
    return dataclasses.replace(state, block=dataclasses.replace(state.block, commit=commit))


def fixed(state: Any, *, own: bool = True) -> Any:
    """The same structure with tensors of its own; shared ones stay, and so does a block if not ``own``.

    They hold what a step can run on without harm: whole numbers are 0, so that no row has a prefix and what is
    committed goes to the canvas's slots; fractions are 1, for some are divided by.
    """
    if isinstance(state, Tensor):
        return torch.full_like(state, state.dtype.is_floating_point)
    if isinstance(state, dict):
        return type(state)((key, fixed(item, own=own)) for key, item in state.items())
    if isinstance(state, (list, tuple)):
        return type(state)(fixed(item, own=own) for item in state)
    if not dataclasses.is_dataclass(state) or isinstance(state, type):
        return state
    changed = {
        f.name: fixed(getattr(state, f.name), own=own)
        for f in dataclasses.fields(state)
        if not f.metadata.get("shared") and (own or f.name != "block")
    }
    return dataclasses.replace(state, **changed)


def copy(source: Any, target: Any) -> None:
    """All tensors that are not shared, from one state to another of the same structure."""
    pairs = zip(leaves(source), leaves(target), strict=True)
    for (new, shared), (old, _) in pairs:
        if not shared and new is not old:
            old.copy_(new)


def cuda_capture() -> Capture:
    """Capturing CUDA graphs that share one pool of memory, for no replay needs what an earlier one left there."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Replay) -> Replay:
        stream = torch.cuda.Stream()  # a warm-up may not be on the default stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay

    return capture
