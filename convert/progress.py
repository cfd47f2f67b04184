"""How far a conversion is, on stderr: a bar on a terminal, a line every few seconds elsewhere, or nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from .container import Progress
from .text import clock, readable

EVERY = 5.0  # seconds between lines


class Silent:
    def advance(self, read: int) -> None:
        pass


class Lines:
    """For logs: no line is ever overwritten."""

    def __init__(self, total: int, stream: TextIO, every: float = EVERY):
        self.total, self.stream, self.every = total, stream, every
        self.done, self.lock = 0, threading.Lock()
        self.started = self.last = time.monotonic()

    def advance(self, read: int) -> None:
        with self.lock:
            self.done += read
            now = time.monotonic()
            if now - self.last >= self.every:
                self.last = now
                rate = self.done / (now - self.started)
                left = clock((self.total - self.done) / rate)
                print(
                    f"{100 * self.done // self.total:3} %  {readable(self.done)} of {readable(self.total)}  "
                    f"{readable(rate)}/s  {left} left",
                    file=self.stream,
                    flush=True,
                )


class Bar:
    """For terminals. The thread of the bar draws; converting threads only add."""

    def __init__(self, progress, task):
        self.progress, self.task = progress, task

    def advance(self, read: int) -> None:
        self.progress.advance(self.task, read)


@contextmanager
def shown(total: int, quiet: bool, stream: TextIO | None = None) -> Iterator[Progress]:
    """The progress of ``total`` bytes to read. The bar is gone when it is over."""
    stream = stream or sys.stderr
    if quiet:
        yield Silent()
    elif not stream.isatty():
        yield Lines(max(total, 1), stream)
    else:
        from rich import progress as rich
        from rich.console import Console

        columns = (
            rich.TextColumn("{task.percentage:>3.0f} %"),
            rich.BarColumn(),
            rich.DownloadColumn(),
            rich.TransferSpeedColumn(),
            rich.TimeRemainingColumn(),
        )
        with rich.Progress(*columns, console=Console(file=stream), transient=True) as bar:
            yield Bar(bar, bar.add_task("", total=total))
