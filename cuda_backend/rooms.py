"""Buffers that stay where they are: a graph reads keys where they lay when it was captured.

Caches come and go with requests, and every one has buffers of its own. Before a block runs by graphs its cache moves
into a room of its shape: its keys are copied into the room's buffers once, and from then on are these. One cache at a
time lives in a room; should another one come while the first is in use, the first takes a copy along.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from .cache import TorchCache

ROOMS = 2  # of so many shapes: a batch grows and shrinks, a cache doubles


@dataclass
class Room:
    """``cache`` owns the buffers and stands for whoever lives there; ``graphs`` are those that read them."""

    cache: TorchCache
    tenant: weakref.ref[TorchCache]
    graphs: OrderedDict[Any, Any] = field(default_factory=OrderedDict)

    def houses(self, cache: TorchCache | None) -> bool:
        """Whether ``cache`` lives here with all that it has; one that has grown has left in part."""
        return cache is not None and all(
            mine[0] is theirs[0] for mine, theirs in zip(self.cache.layers, cache.layers, strict=True)
        )

    def move_in(self, cache: TorchCache) -> None:
        before = self.tenant()
        if self.houses(before):
            assert before is not None
            before.layers = before.copied()
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            for buffer, values in zip(mine, theirs, strict=True):
                buffer.copy_(values)
        cache.layers = list(self.cache.layers)
        self.tenant = weakref.ref(cache)


class Rooms:
    """The rooms of one model; the one that has not been used for longest goes first."""

    def __init__(self) -> None:
        self._rooms: OrderedDict[Any, Room] = OrderedDict()

    def house(self, cache: TorchCache) -> Room:
        """The room that ``cache`` lives in from now on."""
        shape = tuple(k.shape for k, _ in cache.layers)
        room = self._rooms.get(shape)
        if room is None:  # with buffers of its own: a cache that has grown still has some of another room
            cache.layers = cache.copied()
            room = self._rooms[shape] = Room(cache.twin(), weakref.ref(cache))
        elif not room.houses(cache):
            room.move_in(cache)
        self._rooms.move_to_end(shape)
        while len(self._rooms) > ROOMS:
            self._rooms.popitem(last=False)
        return room
