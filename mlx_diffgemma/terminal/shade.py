"""How a draft looks: which token is written how, by whether it was accepted and how sure the model is of it.

An accepted token has the colour of ordinary text. A token that returned to noise is italic in a pale violet that grows
stronger with the model's confidence in its present guess. Thoughts are dim.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich.style import Style

from ..events import Draft
from ..prompts.parse import CLOSE, OPEN
from ..prompts.processor import Processor
from .text import Run, harmless

PLAIN = Style()
UNSURE = Style(dim=True)
THOUGHT = Style(dim=True, italic=True)
LADDER = ("#56526a", "#6a6590", "#7f78b4", "#948cd6", "#aaa2f5")
ON_LIGHT = ("#c9c6d8", "#b0aacb", "#968ebd", "#7c72af", "#6257a1")
SURE = 0.5  # confidence below which even an accepted token is drawn dim
LABEL = "thought\n"  # the channel's name, which is not part of the thought
LONGEST = 4  # bytes of a character, each perhaps a token of its own


@dataclass(frozen=True)
class Piece:
    """A token's text in a draft; a character spelled by several tokens is one piece."""

    text: str
    thought: bool = False
    accepted: bool = True
    confidence: float = 1.0


@dataclass(frozen=True)
class Channel:
    """Where a reader of the answer stands: within a thought or not, and what is left of the thought's label."""

    thought: bool = False
    label: str = ""


class Speller:
    """Writes ids out token by token, with the text that the answer will show."""

    def __init__(self, processor: Processor):
        self.tokenizer = processor.tokenizer
        self.ends = frozenset(processor.generation.eos_token_ids)
        self.open, self.close = (self.tokenizer.id_of(token) for token in (OPEN, CLOSE))
        self._known: dict[int, str] = {}

    def visible(self, ids: Sequence[int]) -> int:
        """How many ids come before the first end token."""
        return next((i for i, id in enumerate(ids) if id in self.ends), len(ids))

    def spell(self, ids: Sequence[int]) -> list[tuple[str, int]]:
        """Texts, each with the number of ids that make it. Bytes join to characters where they can."""
        parts, i = [], 0
        while i < len(ids):
            text, count = self._one(ids[i]), 1
            if "\ufffd" in text:
                for length in range(2, min(LONGEST, len(ids) - i) + 1):
                    joined = self.tokenizer.decode(ids[i : i + length])
                    if joined and "\ufffd" not in joined:
                        text, count = joined, length
                        break
            parts.append((text, count))
            i += count
        return parts

    def _one(self, id: int) -> str:
        if id not in self._known:
            self._known[id] = self.tokenizer.decode([id])
        return self._known[id]

    def pieces(
        self, ids: Sequence[int], channel: Channel = Channel(), draft: Draft | None = None
    ) -> tuple[list[Piece], Channel]:
        """The pieces of visible ids, and where they leave the reader. ``draft`` tells how sure each one is."""
        pieces, i = [], 0
        for text, count in self.spell(ids):
            span, id = slice(i, i + count), ids[i]
            i += count
            if id == self.open and id is not None:
                channel = Channel(True, LABEL)
                continue
            if id == self.close and id is not None:
                channel = Channel()
                continue
            if channel.label:
                text, channel = _without_label(text, channel)
            sure = (bool(draft.accepted[span].all()), float(draft.confidence[span].min())) if draft else (True, 1.0)
            if text:
                pieces.append(Piece(text, channel.thought, *sure))
        return pieces, channel


def _without_label(text: str, channel: Channel) -> tuple[str, Channel]:
    """``text`` less what it shares with the rest of the label."""
    shared = 0
    while shared < min(len(text), len(channel.label)) and text[shared] == channel.label[shared]:
        shared += 1
    rest = channel.label[shared:] if shared == len(text) else ""
    return text[shared:], Channel(channel.thought, rest)


def style(piece: Piece, ladder: Sequence[str] = LADDER) -> Style:
    if piece.thought:
        return THOUGHT
    if piece.accepted:
        return PLAIN if piece.confidence >= SURE else UNSURE
    level = min(int(max(piece.confidence, 0.0) * len(ladder)), len(ladder) - 1)
    return Style(color=ladder[level], italic=True)


def ladder() -> Sequence[str]:
    """The shades for this terminal's background, where COLORFGBG tells it; most are dark."""
    return ON_LIGHT if os.environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15") else LADDER


def runs(pieces: Sequence[Piece], shades: Sequence[str]) -> list[Run]:
    """Pieces as styled text; neighbours of one style are joined."""
    joined: list[Run] = []
    for piece in pieces:
        text, look = harmless(piece.text), style(piece, shades)
        if joined and joined[-1][1] == look:
            joined[-1] = (joined[-1][0] + text, look)
        else:
            joined.append((text, look))
    return joined


def cut(pieces: Sequence[Piece], length: int) -> list[Piece]:
    """``pieces`` with the answer's text cut to ``length`` characters."""
    kept: list[Piece] = []
    for piece in pieces:
        if piece.thought:
            kept.append(piece)
        elif length > 0:
            kept.append(Piece(piece.text[:length], False, piece.accepted, piece.confidence))
            length -= len(piece.text)
    return kept
