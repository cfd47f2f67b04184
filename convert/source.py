"""From what the user names to an opened checkpoint: a folder, a hub name, ``demo``, or a .gguf file."""

from __future__ import annotations

from pathlib import Path

from mlx_diffgemma import hub
from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.formats import Checkpoint, open_checkpoint

from .headers import is_remote, open_headers
from .options import expanded


def open_source(
    name: str, revision: str | None = None, sidecars: Path | None = None, *, headers: bool = False
) -> Checkpoint:
    """Download it if need be, and check it. No weight is read, and it need not fit into memory.

    Args:
        name: as the user gives it.
        revision: of a hub repository.
        sidecars: the folder of config.json and tokenizer of a .gguf file, where they are not beside it.
        headers: whether they are enough: a model on the hub is then not downloaded.

    Raises:
        FileNotFoundError: there is no such thing.
        UserError: it is not a checkpoint that this library reads.
    """
    if revision and (name == "demo" or expanded(name).exists()):
        raise OptionError(f"--revision is of a repository on the hub; {name!r} is here")
    if name.lower().endswith(".gguf"):
        return open_checkpoint(expanded(name), sidecars)
    if headers and is_remote(name):
        return open_headers(name, revision)
    return open_checkpoint(hub.resolve(name, lambda config, size: None, revision))
