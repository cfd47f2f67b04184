"""How a plan becomes files: what the command asks of a writer, and what a writer may ask of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mlx_diffgemma.formats import Checkpoint

from .plan import Plan


class Progress(Protocol):
    def advance(self, read: int) -> None:
        """``read`` more bytes of the source are done; may be called from any thread."""
        ...


class Container(Protocol):
    """Writes a format that is not made of safetensors files, whole, to one path."""

    def write(self, checkpoint: Checkpoint, plan: Plan, path: Path, progress: Progress) -> None: ...
