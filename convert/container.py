"""How a plan becomes files: what the command asks of a writer, and what a writer may ask of the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .edges import Errors
from .plan import Plan


@dataclass(frozen=True)
class Done:
    """What a conversion came to."""

    paths: tuple[Path, ...]  # the folder, or the files
    plan: Plan
    errors: Errors
    seconds: float
    absent: tuple[str, ...] = ()  # sidecars that were nowhere


class Progress(Protocol):
    def advance(self, read: int) -> None:
        """``read`` more bytes of the source are done; may be called from any thread."""
        ...


class Container(Protocol):
    """Writes a format that is not made of safetensors files, whole, to one path."""

    def write(self, plan: Plan, path: Path, progress: Progress) -> Done: ...
