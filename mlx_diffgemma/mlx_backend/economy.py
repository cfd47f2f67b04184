"""What a step may leave out, decided on the host from what the steps before have shown. Nothing, unless asked for.

``self_conditioning="survivors"``: the soft embedding is gathered from the tokens that matter, but for flat rows. How
many rows were flat tells which share the next step makes densely. A wrong guess costs time, and a flat row that finds
no room is within the bound of ``survivors`` and not dense.

``tail="hold"``: behind the end of the text the canvas is filled with more ends and padding, which nobody sees. Once
such a tail has not changed for ``STILL`` steps, was accepted throughout and is sure of itself, it is left out of the
head: its tokens, entropies and soft embedding stay as they are. The visible part is computed by the same formulas, from
a tail that would hardly have changed. It comes back as soon as the end of the text is no longer seen before it, and in
the last step that a canvas may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..backend import CanvasSpec, CanvasView, given
from ..config import UNSET

STILL = 2  # equal views in a row
SURE = 1e-3  # nats of entropy, at most
QUARTER = 0.25  # of the rows: the share between none and all that is made densely
PARTS = 8  # of a canvas; the head covers some of them, so that few graphs serve all cases


@dataclass(frozen=True)
class Saving:
    """How one step is computed; static in its graph.

    Args:
        rows: the head covers positions below it; ``None`` is all.
        dense: see ``vocabulary.read_canvas``.
    """

    rows: int | None = None
    dense: float | None = None


@dataclass
class Economy:
    """Of one block: what it has seen, and what the next step may leave out.

    Args:
        ends: per row, the ids that end a text.
        clamped: bool [B, C], positions that are given: they cannot move.
        same: int [B, C], for how many views each position was sure, accepted and unchanged.
    """

    length: int
    ends: list[frozenset[int]]
    clamped: np.ndarray
    survivors: bool
    hold: bool
    same: np.ndarray
    at: int = 0
    last: CanvasView | None = None
    flat: int | None = None

    @classmethod
    def of(cls, specs: Sequence[CanvasSpec], length: int, *, survivors: bool, hold: bool) -> Economy:
        ends = [frozenset(spec.settings.eos_token_ids) for spec in specs]
        free = np.full(length, UNSET)
        clamped = np.stack([given(spec.masks.clamp, free) != UNSET for spec in specs])
        return cls(length, ends, clamped, survivors, hold, np.zeros((len(specs), length), int))

    def learn(self, view: CanvasView, flat: int, at: int) -> None:
        """From the view after ``at`` steps; one that is read again teaches nothing."""
        if at <= self.at:
            return
        self.at, self.flat = at, flat
        if self.hold:
            calm = view.accepted & (view.canvas == view.argmax) & (view.entropy <= SURE)
            if self.last is not None:
                calm &= view.argmax == self.last.argmax
            self.same = np.where(calm | self.clamped, self.same + 1, 0)
            self.last = view

    def saving(self) -> Saving:
        return Saving(self._head(), self._dense())

    def _dense(self) -> float | None:
        """The share of rows that go the dense way: at least that of flat rows in the last view."""
        if not self.survivors:
            return None
        if self.flat is None or self.flat > QUARTER * self.length * len(self.ends):
            return 1.0
        return QUARTER if self.flat else 0.0

    def _head(self) -> int | None:
        """Positions that the head must cover, in whole parts of the canvas."""
        if not self.hold or self.last is None:
            return None
        part = -(-self.length // PARTS)
        needed = max(self._needed(row) for row in range(len(self.ends)))
        head = -(-needed // part) * part
        return head if head < self.length else None

    def _needed(self, row: int) -> int:
        """Of one row: up to the end of its text, and as far behind it as something still moves."""
        assert self.last is not None
        if self.last.done[row]:
            return 1
        ended = np.isin(self.last.argmax[row], list(self.ends[row]))
        if not ended.any():
            return self.length
        moving = np.flatnonzero(self.same[row] < STILL)
        return max(int(ended.argmax()), int(moving[-1]) if len(moving) else 0) + 1
