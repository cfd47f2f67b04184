"""A checkpoint: config, coverage, and its tensors by canonical name. Strict: exactly the table, or an error."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import GenerationConfig, ModelConfig
from ..errors import CheckpointError
from ..json_file import read_json
from ..tensors import DECODER, VISION, Tensor, tensor_table
from . import gguf_model
from .assemble import Assembled, Dialect, assemble
from .detect import detect
from .encoding import Encoded
from .safetensors import SafetensorsFile, open_file
from .stored import Stored

INDEX = "model.safetensors.index.json"
SIDECAR = "optiq/"  # where OptiQ keeps the vision tower of its text models, for its own loader
EMBEDDING = f"{DECODER}.embed_tokens.weight"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; no weight has been read.

    Args:
        folder: where its config and tokenizer are.
        format: the name of its dialect.
        table: the rows that the model has; without vision when the checkpoint is text only.
        tensors: each row, where it lies.
        files: those that hold the weights.
        notes: what is odd about it, for people.
    """

    folder: Path
    format: str
    config: ModelConfig
    generation: GenerationConfig
    table: dict[str, Tensor]
    tensors: dict[str, Stored]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def encoded(self, name: str) -> Encoded:
        """A tensor as it is stored, whole."""
        return self.tensors[name].read()

    def read(self, name: str) -> np.ndarray:
        """A tensor's values: a read-only view of the file where it is dense, else float32."""
        return self.encoded(name).decode()

    @property
    def dtype(self) -> str:
        """What to compute in: float32 when the embedding is stored so, else bfloat16.

        float16 has too small a range for the activations of this model, so float16 weights are used as bfloat16, or,
        where that is asked for, exactly in float32.
        """
        encoding = self.tensors[EMBEDDING].encoding
        floats = encoding.mode in ("dense", "affine") and not self.tensors[EMBEDDING].quantized
        return "float32" if floats and encoding.dtype == "float32" else "bfloat16"

    @property
    def quantized(self) -> bool:
        return any(stored.quantized for stored in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(stored.nbytes for stored in self.tensors.values())


def open_checkpoint(folder: Path, sidecars: Path | None = None, projector: Path | None = None) -> Checkpoint:
    """Open a folder of safetensors files, in whatever format, or a GGUF file; check it against the tensor table.

    Args:
        folder: or a .gguf file, or a folder of one.
        sidecars: of GGUF, where config.json and tokenizer are; by default they are beside it.
        projector: of GGUF, the file of the vision tower; by default the mmproj file beside it.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        CheckpointError: a missing, unknown, doubled or misshapen tensor, or a damaged file; lists the names.
        ConfigError: config.json describes another model, or its quantization wrongly.
    """
    found = gguf_model.locate(folder, projector)
    if found:
        return _open_gguf(found, gguf_model.sidecar_folder(found, sidecars))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a checkpoint folder, a hub name, or 'demo'")
    data = read_json(folder / "config.json")
    config = ModelConfig.from_dict(data)
    files = _files(folder)
    parts = [file.tensor(name) for file in files for name in file.entries]
    dialect = detect(folder, data, [part.name for part in parts])
    return build(folder, config, dialect, assemble(parts, tensor_table(config), dialect), [f.path for f in files])


def _open_gguf(files: gguf_model.Files, folder: Path) -> Checkpoint:
    config = ModelConfig.from_folder(folder)
    dialect, found = gguf_model.read(files, config)
    paths = files.paths if config.vision else list(files.model)
    return build(folder, config, dialect, found, paths, files.model[0])


def build(
    folder: Path,
    config: ModelConfig,
    dialect: Dialect,
    found: Assembled,
    files: list[Path],
    place: Path | None = None,
) -> Checkpoint:
    """The checkpoint of assembled tensors, once they are exactly those that the config calls for.

    ``place`` is what a message names, where that is not ``folder``.
    """
    table, notes = tensor_table(config), []
    tower = [name for name, row in table.items() if row.role == "vision"]
    if tower and dialect.partial and set(tower) <= set(found.missing):
        config = dataclasses.replace(config, vision=None)
        table, unused = tensor_table(config), [n for n, row in table.items() if row.role in VISION]
        notes.append("text only: the vision tower is not in the files")
        found = dataclasses.replace(
            found,
            tensors={name: stored for name, stored in found.tensors.items() if name in table},
            missing=[name for name in found.missing if name in table],
            unused=sorted({*found.unused, *(n for n in unused if n in found.tensors)}),
        )
    _check(place or folder, found)
    if found.unused:
        notes.append(f"not used: {_tensors(found.unused)}")
    generation = GenerationConfig.from_folder(folder, config)
    return Checkpoint(folder, dialect.name, config, generation, table, found.tensors, tuple(files), tuple(notes))


def _files(folder: Path) -> list[SafetensorsFile]:
    index = folder / INDEX
    names = _shards(index) if index.is_file() else sorted(path.name for path in folder.glob("*.safetensors"))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder} lacks {len(absent)} of {len(names)} shards: {_some(absent)}; download it again"
        )
    if not names:
        raise FileNotFoundError(f"{folder} holds no .safetensors file; download it again")
    return [open_file(folder / name) for name in names]


def _shards(index: Path) -> list[str]:
    """The files that an index names, each in the index's own folder."""
    places = read_json(index).get("weight_map")
    names: set[str] = set()
    for name in places.values() if isinstance(places, dict) else [places]:
        if isinstance(name, str) and name.startswith(SIDECAR):
            continue
        if not isinstance(name, str) or not _plain(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map names {name!r:.80}, not a .safetensors file; download it again")
        names.add(name)
    return sorted(names)


def _plain(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and len(name) < 256


def _check(place: Path, found: Assembled) -> None:
    if found.missing:
        raise CheckpointError(f"{place} lacks {_tensors(found.missing)}; download it again")
    if found.unknown:
        raise CheckpointError(
            f"{place} has {_tensors(found.unknown)} beyond what its config.json calls for; are they of one model?"
        )


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {_some(names)}"


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
