"""One answer on a terminal: the draft of the current canvas in place, everything finished above it as plain text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..config import GenerationConfig
from ..events import Block, Draft, Event, Finished
from ..prompts.processor import Processor
from . import shade
from .painter import Painter
from .text import Run, fold, harmless

FAINT, BAR = Style(dim=True), Style(color="#948cd6")
BAR_CELLS = 10


class View(Protocol):
    """Shows the events of one row."""

    def wait(self, message: str) -> None:
        """Say what is being waited for."""
        ...

    def show(self, event: Event) -> None: ...

    def close(self) -> None:
        """Leave exactly what is settled. Also right after an interruption."""
        ...


def live_console(file: TextIO) -> Console | None:
    """A console where drafts can be drawn in place; ``None`` where they cannot."""
    console = Console(file=file, highlight=False)
    return None if not console.is_terminal or console.is_dumb_terminal or console.legacy_windows else console


def rest(finished: Finished, told: str) -> str:
    """What the answer has beyond its blocks' texts: an end that was held back because a stop text might follow."""
    return finished.text[len(told) :] if finished.text.startswith(told) else ""


class StreamView:
    """Writes each block's text as it finishes, and nothing else. Made harmless only where a terminal reads it."""

    def __init__(self, file: TextIO):
        self.file = file
        self.text = ""

    def wait(self, message: str) -> None:
        pass

    def show(self, event: Event) -> None:
        if isinstance(event, Block):
            self._write(event.text)
        elif isinstance(event, Finished):
            self._write(rest(event, self.text))

    def close(self) -> None:
        if self.text and not self.text.endswith("\n"):
            self._write("\n")

    def _write(self, text: str) -> None:
        self.file.write(harmless(text) if self.file.isatty() else text)
        self.file.flush()
        self.text += text


class SilentView:
    """Shows nothing."""

    def wait(self, message: str) -> None:
        pass

    def show(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


class LiveView:
    """Draws every draft in place. While it runs only whole lines are left behind: the draft goes on after the last."""

    def __init__(
        self,
        processor: Processor,
        settings: GenerationConfig,
        console: Console,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.painter, self.console, self.settings, self.clock = Painter(console), console, settings, clock
        self.speller, self.shades = shade.Speller(processor), shade.ladder()
        self.channel = shade.Channel()
        self.text, self.tokens = "", 0
        self._open: list[Run] = []  # the unfinished last line of what is settled
        self._status = Text()
        self._start = clock()

    def wait(self, message: str) -> None:
        self._start, self._status = self.clock(), Text(message, FAINT)
        self.painter.draw([self._status])

    def show(self, event: Event) -> None:
        if isinstance(event, Draft):
            self._draft(event)
        elif isinstance(event, Block):
            pieces, self.channel = self.speller.pieces(event.tokens, self.channel)
            self.tokens += len(event.tokens)
            self._settle([piece for piece in pieces if piece.thought], event.text)
        elif more := rest(event, self.text):
            self._settle([], more)

    def close(self) -> None:
        text = _text(self._open)
        self._open = []
        self.painter.close(text if text.plain else None)

    def _draft(self, draft: Draft) -> None:
        ids = draft.argmax.tolist()
        ids = ids[: min(self.speller.visible(ids), max(self.settings.max_tokens - self.tokens, 0))]
        pieces, _ = self.speller.pieces(ids, self.channel, draft)
        drawn = "".join(piece.text for piece in pieces if not piece.thought)
        wanted = draft.text[len(self.text) :] if draft.text.startswith(self.text) else drawn
        if drawn.startswith(wanted):
            pieces = shade.cut(pieces, len(wanted))  # a stop text ends the answer
        elif wanted.endswith(drawn):
            pieces = [shade.Piece(wanted.removesuffix(drawn)), *pieces]  # what the block before held back
        width = self.console.width
        rows = fold([*self._open, *shade.runs(pieces, self.shades)], width)
        self._status = self._figures(draft, len(ids), width)
        self.painter.draw([*rows, self._status])

    def _settle(self, thoughts: list[shade.Piece], text: str) -> None:
        self.text += text
        runs = [*self._open, *shade.runs(thoughts, self.shades)]
        if text:
            between = "\n" if runs and runs[-1][1] == shade.THOUGHT and not runs[-1][0].endswith("\n") else ""
            runs.append((between + harmless(text), shade.PLAIN))
        lines, self._open = _split(runs)
        waiting = fold(self._open, self.console.width) if self._open else []
        self.painter.draw([*waiting, self._status], _text(lines) if lines else None)

    def _figures(self, draft: Draft, tokens: int, width: int) -> Text:
        """As many of the figures as fit, the most telling first."""
        share = float(draft.accepted.mean())
        filled = round(share * BAR_CELLS)
        status = Text().append("▰" * filled, BAR).append("▱" * (BAR_CELLS - filled), FAINT)
        figures = (
            f"{share:4.0%} settled",
            f"block {draft.block + 1}",
            f"step {draft.step}/{self.settings.max_denoising_steps}",
            f"{self.tokens + tokens} tokens",
            f"{self.clock() - self._start:.1f} s",
        )
        for i, figure in enumerate(figures):
            figure = (" " if i == 0 else " · ") + figure
            if status.cell_len + len(figure) >= width:
                break
            status.append(figure, FAINT)
        return status


def _split(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """The whole lines of ``runs``, without the last line's end, and what comes after them."""
    for i in range(len(runs) - 1, -1, -1):
        text, style = runs[i]
        if "\n" in text:
            head, _, tail = text.rpartition("\n")
            return [*runs[:i], (head, style)], [*([(tail, style)] if tail else []), *runs[i + 1 :]]
    return [], runs


def _text(runs: list[Run]) -> Text:
    text = Text()
    for part, style in runs:
        text.append(part, style)
    return text
