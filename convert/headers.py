"""A checkpoint on the hub, known from its headers: enough to show it and to plan with, a few hundred kilobytes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from mlx_diffgemma import hub
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.formats import Checkpoint, open_checkpoint
from mlx_diffgemma.formats.assemble import assemble
from mlx_diffgemma.formats.checkpoint import build
from mlx_diffgemma.formats.detect import detect
from mlx_diffgemma.formats.safetensors import DTYPES, Entry, SafetensorsFile
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.tensors import tensor_table

from .writer import INDEX

SMALL = ("generation_config.json", "hf_quant_config.json")  # what a format may say of itself beside config.json


class _Enough(Exception):
    """Config and index have arrived; the weights are next."""


def is_remote(name: str) -> bool:
    return name != "demo" and hub.HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def open_headers(name: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint ``name``, from the cache where it is there, else without its weights: they cannot be read.

    Raises:
        FileNotFoundError, UserError: as ``hub.resolve`` and ``open_checkpoint``.
    """
    import huggingface_hub
    from huggingface_hub import errors

    def stop(config: ModelConfig, size: int) -> None:
        raise _Enough

    cached = _cached(name, revision)
    if cached:
        return cached
    with suppress(_Enough):
        hub.resolve(name, stop, revision)
    try:
        config = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
        known = set(huggingface_hub.HfApi().list_repo_files(name, revision=revision))
        for file in known.intersection(SMALL):
            huggingface_hub.hf_hub_download(name, file, revision=revision)
        folder = Path(config).parent
        return _opened(folder, [_header(name, revision, folder, file) for file in _names(folder, known)])
    except (errors.HTTPError, errors.SafetensorsParsingError, OSError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(f"the headers of {name!r} could not be read ({first}); try again") from error


def _cached(name: str, revision: str | None) -> Checkpoint | None:
    """The whole checkpoint, where an earlier download left it."""
    import huggingface_hub
    from huggingface_hub import errors

    with suppress(errors.HFValidationError, FileNotFoundError):  # LocalEntryNotFoundError is one
        return open_checkpoint(Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)))
    return None


def _names(folder: Path, known: set[str]) -> list[str]:
    if INDEX in known:
        return sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    return sorted(file for file in known if file.endswith(".safetensors") and "/" not in file)


def _header(name: str, revision: str | None, folder: Path, file: str) -> SafetensorsFile:
    import huggingface_hub

    found = huggingface_hub.HfApi().parse_safetensors_file_metadata(name, file, revision=revision)
    entries = {}
    for tensor, row in found.tensors.items():
        if row.dtype not in DTYPES:
            raise CheckpointError(
                f"{name}/{file}: {tensor} has dtype {row.dtype!r:.80}, which this library does not read"
            )
        start, stop = row.data_offsets
        entries[tensor] = Entry(np.dtype(DTYPES[row.dtype]), tuple(row.shape), start, stop)
    return SafetensorsFile(folder / file, entries)


def _opened(folder: Path, files: list[SafetensorsFile]) -> Checkpoint:
    data = read_json(folder / "config.json")
    config = ModelConfig.from_dict(data)
    parts = [file.tensor(name) for file in files for name in file.entries]
    dialect = detect(folder, data, [part.name for part in parts])
    return build(folder, config, dialect, assemble(parts, tensor_table(config), dialect), [file.path for file in files])
