"""Buffers that stay where they are: a graph reads keys where they lay when it was captured.

Caches come and go with requests, and every one has buffers of its own. Before a block runs by graphs its cache moves
into a room of its shape: its keys are copied into the room's buffers once, and from then on are these. One cache at a
time lives in a room. When another one comes, whoever is still around takes a copy along; a block in progress keeps its
room, and the newcomer gets one of its own.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor

from .cache import TorchCache

ROOMS = 2  # a batch grows and shrinks, a cache doubles: each time another shape


@dataclass
class Ticket:
    """A block in progress. It is over when nobody holds it, or when the next one has begun on its cache."""

    steps: int = 0


@dataclass
class Room:
    """``cache`` owns the buffers and stands for whoever lives there; ``graphs`` are those that read them."""

    cache: TorchCache
    tenant: weakref.ref[TorchCache]
    graphs: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    ticket: weakref.ref[Ticket] | None = None

    @property
    def busy(self) -> bool:
        return self.ticket is not None and self.ticket() is not None

    def enter(self) -> Ticket:
        ticket = Ticket()
        self.ticket = weakref.ref(ticket)
        return ticket

    def holds(self, ticket: Ticket) -> bool:
        return self.ticket is not None and self.ticket() is ticket

    def houses(self, cache: TorchCache) -> bool:
        """Whether ``cache`` lives here with all that it has; one that has grown has left in part."""
        return all(mine[0] is theirs[0] for mine, theirs in zip(self.cache.layers, cache.layers, strict=True))

    def move_in(self, cache: TorchCache) -> None:
        before = self.tenant()
        if before is not None:
            before.layers = apart(before.layers, {id(k) for k, _ in self.cache.layers})
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            for buffer, values in zip(mine, theirs, strict=True):
                buffer.copy_(values)
        cache.layers = list(self.cache.layers)
        self.tenant = weakref.ref(cache)


def apart(layers: list[tuple[Tensor, Tensor]], taken: set[int]) -> list[tuple[Tensor, Tensor]]:
    """``layers`` with copies of those whose keys are among ``taken``, by identity."""
    return [(k.clone(), v.clone()) if id(k) in taken else (k, v) for k, v in layers]


class Rooms:
    """The rooms of one model; the one that has not been used for longest goes first."""

    def __init__(self) -> None:
        self._rooms: OrderedDict[Any, Room] = OrderedDict()

    def house(self, cache: TorchCache) -> Room:
        """The room that ``cache`` lives in from now on."""
        shape = tuple(k.shape for k, _ in cache.layers)
        key = next(key for key in ((shape, n) for n in count()) if self._open(key, cache))
        room = self._rooms.get(key)
        if room is None:
            taken = {id(k) for other in self._rooms.values() for k, _ in other.cache.layers}
            cache.layers = apart(cache.layers, taken)  # one that has grown still has some of another room
            room = self._rooms[key] = Room(cache.twin(), weakref.ref(cache))
        elif not room.houses(cache):
            room.move_in(cache)
        self._rooms.move_to_end(key)
        while len(self._rooms) > ROOMS:
            self._rooms.popitem(last=False)
        return room

    def _open(self, key: Any, cache: TorchCache) -> bool:
        room = self._rooms.get(key)
        return room is None or not room.busy or room.houses(cache)
