"""A checkpoint folder: config, coverage, and its tensors by canonical name. Strict: exactly the table, or an error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import GenerationConfig, ModelConfig
from ..errors import CheckpointError
from ..json_file import read_json
from ..tensors import Tensor, tensor_table
from .hf import canonical_names
from .safetensors import SafetensorsFile, open_file

FLOATS = {"bfloat16", "float32"}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. ``stored`` maps canonical names to (file, name in the file)."""

    folder: Path
    config: ModelConfig
    generation: GenerationConfig
    table: dict[str, Tensor]
    stored: dict[str, tuple[SafetensorsFile, str]]

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored (bfloat16 or float), a read-only view of the file."""
        file, stored = self.stored[name]
        return file.read(stored)

    @property
    def dtype(self) -> str:
        """The dtype most of the weights are stored in."""
        return str(self.read("model.decoder.embed_tokens.weight").dtype)

    @property
    def nbytes(self) -> int:
        return sum(e.stop - e.start for e in (f.entries[n] for f, n in self.stored.values()))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder of safetensors files and check it against the tensor table. No weight is read.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        CheckpointError: a missing, unknown, doubled or misshapen tensor, or a damaged file; lists the names.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a checkpoint folder, a hub name, or 'demo'")
    config = ModelConfig.from_folder(folder)
    table = tensor_table(config)
    stored = canonical_names(_files(folder), table)
    _check(folder, stored, table)
    return Checkpoint(folder, config, GenerationConfig.from_folder(folder, config), table, stored)


def _files(folder: Path) -> list[SafetensorsFile]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _shards(index)
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{folder} lacks {len(absent)} of {len(names)} shards: {_some(absent)}; download it again"
            )
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(f"{folder} holds no .safetensors file; download it again")
    return [open_file(folder / name) for name in names]


def _shards(index: Path) -> list[str]:
    """The files that an index names, each in the index's own folder."""
    places = read_json(index).get("weight_map")
    names: set[str] = set()
    for name in places.values() if isinstance(places, dict) else [places]:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map names {name!r:.80}, not a .safetensors file; download it again")
        names.add(name)
    return sorted(names)


def _check(folder: Path, stored: dict[str, tuple[SafetensorsFile, str]], table: dict[str, Tensor]) -> None:
    missing, unknown = sorted(set(table) - set(stored)), sorted(set(stored) - set(table))
    if missing:
        raise CheckpointError(f"{folder} lacks {_tensors(missing)}; download it again")
    if unknown:
        raise CheckpointError(
            f"{folder} has {_tensors(unknown)} beyond what its config.json calls for; are they of one model?"
        )
    for name, (file, inside) in stored.items():
        entry, shape = file.entries[inside], table[name].shape
        if entry.shape != shape:
            raise CheckpointError(
                f"{file.path}: {name} has shape {entry.shape}, config.json calls for {shape}; are they of one model?"
            )
        if str(entry.dtype) not in FLOATS:
            raise CheckpointError(f"{file.path}: {name} is {entry.dtype}; only bfloat16 and float32 are read so far")


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {_some(names)}"


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
