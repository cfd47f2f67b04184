"""A model in GGUF: its files (splits, an image projector beside them) and their tensors as rows of the tensor table.

GGUF has neither config.json nor tokenizer.json; both come from the folder of the file, or from another one that is
named. What the file says of its network must agree with that config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import ModelConfig
from ..errors import CheckpointError
from ..tensors import encoder_scalar, item_bytes, tensor_table
from .assemble import Assembled, Parts, assemble
from .encoding import Encoded, dense
from .gguf_blocks import held_bytes, stored
from .gguf_fields import check_fields
from .gguf_file import FLOATS, GGUFFile, GGUFTensor, open_gguf
from .gguf_names import (
    ARCHITECTURES,
    ENCODER_SCALAR,
    PATCHES,
    PROJECTOR,
    PROJECTOR_TYPE,
    ROPE,
    readable_names,
    vision_names,
)
from .schemes import SOURCE
from .stored import Part, Stored

SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
PREFERRED = ("bf16", "f32", "f16")  # of several image projectors: the published one is bfloat16


@dataclass(frozen=True)
class Files:
    """The model's own files, all splits in order, and the image projector's."""

    model: tuple[Path, ...]
    projector: Path | None = None

    @property
    def paths(self) -> list[Path]:
        return [*self.model, *([self.projector] if self.projector else [])]


def locate(path: Path, projector: Path | None = None) -> Files | None:
    """The files of a model that is named by one of them or by its folder; None where that is not GGUF.

    Args:
        projector: an mmproj file; by default the one beside the model, if there is one.

    Raises:
        FileNotFoundError: a split is not there.
        CheckpointError: a folder with several models.
    """
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            return None
        first, folder = path, path.parent
    elif path.is_dir() and not any(path.glob("*.safetensors")):
        models = sorted({_first(file) for file in path.glob("*.gguf") if not _projects(file)})
        if not models:
            return None
        if len(models) > 1:
            names = ", ".join(model.name for model in models[:3]) + (" and more" if len(models) > 3 else "")
            raise CheckpointError(f"{path} holds {len(models)} models: {names}; give the file instead of the folder")
        first, folder = models[0], path
    else:
        return None
    return Files(_splits(first), projector or _beside(folder, first))


def _projects(path: Path) -> bool:
    return "mmproj" in path.name.lower()


def _first(path: Path) -> Path:
    """The first of the splits that a file belongs to."""
    match = SPLIT.fullmatch(path.name)
    return path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf") if match else path


def _splits(path: Path) -> tuple[Path, ...]:
    match = SPLIT.fullmatch(path.name)
    if not match:
        return (path,)
    count = int(match[3])
    if not count:
        raise CheckpointError(f"{path} claims to be one of 0 splits; download it again")
    found = tuple(path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, count + 1))
    absent = [each.name for each in found if not each.is_file()]
    if absent:
        raise FileNotFoundError(f"{path} lacks {len(absent)} of {count} splits: {absent[0]}; download it again")
    return found


def _beside(folder: Path, model: Path) -> Path | None:
    found = sorted(path for path in folder.glob("*.gguf") if _projects(path) and path != model)
    for kind in PREFERRED:
        for path in found:
            if re.search(rf"(?<![a-z]){kind}", path.name.lower()):
                return path
    return found[0] if found else None


def sidecar_folder(files: Files, given: Path | None) -> Path:
    """Where config.json and the tokenizer are.

    Raises:
        FileNotFoundError: there is no config.json.
    """
    folder = given or files.model[0].parent
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, which {files.model[0].name} needs; put the config.json, generation_config"
            f".json, tokenizer and template files of {SOURCE} there"
        )
    return folder


def resident_bytes(files: Files, config: ModelConfig) -> int:
    """Bytes of the text model's weights once loaded; those that become dense, in the config's dtype."""
    tensors = [tensor for path in files.model for tensor in open_gguf(path).tensors.values()]
    return sum(held_bytes(tensor, item_bytes(config)) for tensor in tensors)


@dataclass(frozen=True)
class Named:
    """A tensor of a file under its canonical name."""

    tensor: GGUFTensor
    name: str

    @property
    def path(self) -> Path:
        return self.tensor.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.tensor.read(start, stop)


@dataclass(frozen=True)
class GGUF:
    """``partial``: whether there is no image projector, so that the vision tower cannot be there."""

    partial: bool = True
    name: str = "GGUF"
    suffixes: frozenset[str] = frozenset({"weight"})

    def stored(self, shape: tuple[int, ...], parts: Parts) -> Stored:
        part = parts["weight"]
        assert isinstance(part, Named)
        if part.name == PATCHES:
            return patches(shape, part.tensor)
        return stored(shape, part.tensor)

    def ignored(self, name: str) -> bool:
        return False


def patches(shape: tuple[int, ...], part: GGUFTensor) -> Stored:
    """The patch embedding [D, p * p * 3] from the weights of a convolution [D, 3, p, p].

    Raises:
        CheckpointError: another shape, or blocks.
    """
    edge = round((shape[-1] // 3) ** 0.5)
    wanted = (shape[0], 3, edge, edge)
    if part.logical != wanted or part.kind not in FLOATS:
        raise CheckpointError(
            f"{part.path}: {part.name} is {part.kind} of shape {part.logical}, config.json calls for {wanted}; "
            "are they of one model?"
        )
    encoding = dense(str(part.dtype))

    def load(start: int, stop: int) -> Encoded:
        rows = part.read(start, stop).transpose(0, 2, 3, 1).reshape(stop - start, -1)
        return Encoded(encoding, rows.shape, {"weight": rows})

    return Stored(encoding, shape, (part,), load)


def read(files: Files, config: ModelConfig) -> tuple[GGUF, Assembled]:
    """All tensors of the model, not one of them read.

    Raises:
        CheckpointError: damaged files, another architecture, a network that config.json does not describe, or a tensor
            that cannot be what the table has under its name.
    """
    opened = [open_gguf(path) for path in files.model]
    _check_splits(opened)
    main = opened[0]
    if main.architecture == PROJECTOR:
        raise CheckpointError(f"{main.path} is an image projector; give the model's own .gguf file")
    if main.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{main.path} holds a model of architecture {main.architecture!r:.80}; this library runs "
            "'diffusion-gemma' only"
        )
    check_fields(main, config)
    projector = open_gguf(files.projector) if files.projector and config.vision else None
    dialect = GGUF(partial=projector is None)
    parts = [*_text_parts(opened, config), *(_vision_parts(projector, config) if projector else ())]
    found = assemble(parts, tensor_table(config), dialect)
    scalars = {encoder_scalar(layer) for layer in range(config.text.num_hidden_layers)}
    if scalars <= set(found.missing):
        raise CheckpointError(
            f"{main.path} lacks the encoder's {len(scalars)} layer scalars ({ENCODER_SCALAR}): the converter of "
            "llama.cpp #24427 drops them and they cannot be made up; take a file of #24423, such as Unsloth's, "
            f"or convert from {SOURCE}"
        )
    return dialect, found


def _check_splits(opened: list[GGUFFile]) -> None:
    for number, file in enumerate(opened):
        count = file.fields.get("split.count", 1)
        place = file.fields.get("split.no", 0)
        if (place, count) != (number, len(opened)):
            raise CheckpointError(
                f"{file.path} says that it is split {place!r:.40} (from 0) of {count!r:.40}, its name says {number} of "
                f"{len(opened)}; download it again"
            )
    total, wanted = sum(len(file.tensors) for file in opened), opened[0].fields.get("split.tensors.count")
    if wanted is not None and wanted != total:
        raise CheckpointError(
            f"{opened[0].path} and its splits have {total} of {wanted!r:.40} tensors; download them again"
        )


def _text_parts(opened: list[GGUFFile], config: ModelConfig) -> Iterator[Part]:
    names = readable_names(config)
    for file in opened:
        for name, tensor in file.tensors.items():
            if name != ROPE:
                yield Named(tensor, names.get(name, name))


def _vision_parts(file: GGUFFile, config: ModelConfig) -> Iterator[Part]:
    kind = file.fields.get("clip.vision.projector_type", file.fields.get("clip.projector_type", PROJECTOR_TYPE))
    if file.architecture != PROJECTOR or kind != PROJECTOR_TYPE:
        raise CheckpointError(
            f"{file.path} is {file.architecture!r:.80} of {kind!r:.80}, expected the image projector of this model "
            f"({PROJECTOR!r} of {PROJECTOR_TYPE!r}); move it elsewhere to load the text model alone"
        )
    names = {name: canonical for canonical, name in vision_names(config).items()}
    for name, tensor in file.tensors.items():
        yield Named(tensor, names.get(name, name))
