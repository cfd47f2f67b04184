"""What a generation reports while it runs, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Stats:
    """What a row cost. Seconds are wall time since the call; a batch's rows share their forwards' time.

    Args:
        forwards: denoising steps of this row, over all blocks; ``steps_per_block`` lists them.
        tokens_per_forward: tokens that are not padding, the end token and what is cut off included, by ``forwards``;
            as transformers counts them.
        milliseconds_per_step: wall time of the denoising loops by the steps they took.
        peak_memory: bytes, as the backend counts them; 0 where it does not.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    time_to_first_draft: float = 0.0
    time_to_first_block: float = 0.0
    blocks: int = 0
    forwards: int = 0
    steps_per_block: tuple[int, ...] = ()
    milliseconds_per_step: float = 0.0
    tokens_per_forward: float = 0.0
    peak_memory: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Draft:
    """One denoising step of one row. Arrays are [C]; see ``CanvasView``. ``text`` is the draft, decoded."""

    row: int
    block: int
    step: int
    canvas: np.ndarray
    argmax: np.ndarray
    accepted: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray
    text: str = ""


@dataclass(frozen=True)
class Block:
    """A finished canvas: ``canvas`` all its ids [C], ``tokens`` the visible ones, ``text`` what is now sure to
    follow in the answer."""

    row: int
    block: int
    steps: int
    canvas: np.ndarray
    tokens: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Finished:
    """The end of one row.

    Args:
        text: the answer; ``thinking`` is what the model wrote in its thought channel before it.
        tokens: visible ids, without end or padding; ``canvases`` keeps every block's ids uncut.
        finish_reason: ``stop`` (an end token or a stop text) or ``length``.
    """

    row: int
    tokens: tuple[int, ...]
    canvases: tuple[tuple[int, ...], ...]
    finish_reason: str
    stats: Stats = field(default_factory=Stats)
    text: str = ""
    thinking: str = ""


Event = Draft | Block | Finished
