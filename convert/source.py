"""From what the user names to an opened checkpoint: a folder, a hub name, ``demo``, or a .gguf file."""

from __future__ import annotations

from pathlib import Path

from mlx_diffgemma import hub
from mlx_diffgemma.formats import Checkpoint, open_checkpoint


def open_source(name: str) -> Checkpoint:
    """Download it if need be, and check it. No weight is read, and it need not fit into memory.

    Raises:
        FileNotFoundError: there is no such thing.
        UserError: it is not a checkpoint that this library reads.
    """
    path = Path(name).expanduser() if not name.startswith("~") or "/" in name else Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return open_checkpoint(path)
    return open_checkpoint(hub.resolve(name, lambda config, size: None))
