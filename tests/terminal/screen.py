"""A command on a pseudo-terminal, and what a person would see there: pyte plays the terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyte

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds after which a command counts as stuck
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLORTERM": "truecolor", "OMP_NUM_THREADS": "1"}


def environment() -> dict[str, str]:
    hiding = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "COLORFGBG", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    return {k: v for k, v in os.environ.items() if k not in hiding} | ENVIRONMENT


def new_screen(columns: int, rows: int) -> pyte.HistoryScreen:
    return pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)


def visible(screen: pyte.Screen) -> list[str]:
    """The rows on screen, without the blank ones at the end."""
    rows = [line.rstrip() for line in screen.display]
    while rows and not rows[-1]:
        rows.pop()
    return rows


def everything(screen: pyte.HistoryScreen) -> list[str]:
    """The rows that scrolled out, then those on screen."""
    gone = ["".join(line[i].data for i in range(screen.columns)).rstrip() for line in screen.history.top]
    return [*gone, *visible(screen)]


@dataclass
class Session:
    """What came out of a command: the raw bytes, the final screen, each distinct screen on the way, the status."""

    screen: pyte.HistoryScreen
    raw: bytes = b""
    frames: list[list[str]] = field(default_factory=list)
    status: int | None = None
    seconds_after_signal: float = 0.0


def run(
    arguments: list[str],
    columns: int = 80,
    rows: int = 24,
    interrupt: Callable[[pyte.HistoryScreen], bool] | None = None,
) -> Session:
    """Run python with ``arguments``; SIGINT is sent as soon as ``interrupt(screen)`` is true."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    ends = {"stdin": slave, "stdout": slave, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), start_new_session=True, **ends
    )
    os.close(slave)
    session = Session(new_screen(columns, rows))
    stream, deadline, sent = pyte.ByteStream(session.screen), time.monotonic() + PATIENCE, 0.0
    while time.monotonic() < deadline:
        if not select.select([master], [], [], 0.1)[0]:
            continue
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux reports EIO when the last writer is gone
            break
        if not chunk:
            break
        session.raw += chunk
        stream.feed(chunk)
        if not session.frames or session.frames[-1] != visible(session.screen):
            session.frames.append(visible(session.screen))
        if interrupt and not sent and interrupt(session.screen):
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
    os.close(master)
    if process.poll() is None and time.monotonic() >= deadline:
        process.kill()
    session.status = process.wait()
    session.seconds_after_signal = time.monotonic() - sent if sent else 0.0
    return session
