"""A frame at the end of the terminal, redrawn in place, above which settled text is left behind.

A frame is written over the one before, row by row and in one write, never erased first, so nothing flickers. It is
cropped to its last rows that fit. Terminals rewrap what they show when they get narrower; the way back to the top of
the frame counts that in.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

WRAP, CUT = "\x1b[?7h", "\x1b[?7l"  # rows of a frame are cut, not wrapped: a misjudged width does no harm
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor
BEGIN, END = "\x1b[?2026h" + HIDE + CUT, WRAP + "\x1b[?2026l"  # a synchronised update
TO_END_OF_LINE, TO_END_OF_SCREEN = "\x1b[K", "\x1b[J"


class Painter:
    """Draws on ``console``, which must be a terminal. The cursor must stand at the start of a line at first."""

    def __init__(self, console: Console):
        self.console = console
        self._rows: list[str] = []
        self._cells: list[int] = []
        self._width = console.width

    def draw(self, rows: Sequence[Text], settled: Text | None = None) -> None:
        """Show ``rows`` where the frame before was; ``settled`` is left behind above them, for good."""
        width, height = self.console.size
        shown = [row.copy() for row in rows[-max(height - 1, 1) :]]
        for row in shown:
            row.truncate(width)
        if shown:
            shown[-1].truncate(max(width - 1, 1))  # what erases below must not stand on the last column
        out = BEGIN + self._top(width, height)
        before = self._rows if width == self._width else []
        if settled is not None:
            out += TO_END_OF_SCREEN + WRAP + self._render(settled) + "\r\n" + CUT
            before = []
        fresh, cells = [self._render(row) for row in shown], [row.cell_len for row in shown]
        for i, line in enumerate(fresh):
            if i >= len(before) or before[i] != line or i == len(fresh) - 1:
                out += line + (TO_END_OF_LINE if cells[i] < width else "")
            out += "\r\n" if i < len(fresh) - 1 else ""
        if len(fresh) < len(self._rows) or width != self._width:
            out += TO_END_OF_SCREEN
        self._rows, self._cells, self._width = fresh, cells, width
        self._write(out + END)

    def close(self, settled: Text | None = None) -> None:
        """Remove the frame, leave ``settled`` behind, and give the cursor back."""
        self.draw([], settled)
        self._write(SHOW)

    def _top(self, width: int, height: int) -> str:
        """From the end of the frame to its start."""
        rows = len(self._cells)
        if width != self._width:
            rows = sum(max(1, -(-cells // width)) for cells in self._cells)
        up = min(rows, height) - 1
        return "\r" + (f"\x1b[{up}A" if up > 0 else "")

    def _render(self, text: Text) -> str:
        with self.console.capture() as capture:
            self.console.print(text, soft_wrap=True, end="", highlight=False)
        return capture.get().replace("\n", "\r\n")

    def _write(self, out: str) -> None:
        self.console.file.write(out)
        self.console.file.flush()
