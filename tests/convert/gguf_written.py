"""GGUF files of our making: the source they come from, and the writing of them, done once per process."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import ml_dtypes
from safetensors.numpy import save_file

from convert import plan, recipes
from convert.gguf_target import GGUF
from convert.progress import Silent
from mlx_diffgemma.formats import Checkpoint, open_checkpoint
from mlx_diffgemma.hub import DEMO
from tests.formats import gguf_files as files

Q8_0 = "[roles]\nembedding = 'affine 8 g32'\nattention = 'affine 8 g32'\nmlp = 'affine 8 g32'\n\
experts = 'affine 8 g32'\nself_conditioning = 'affine 8 g32'\n"


@functools.cache
def home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="gguf-writer-")


def furnished(folder: Path) -> Path:
    """With the demo's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def source(dtype: str = "bfloat16") -> Path:
    """The tiny checkpoint with rows of whole blocks, in one dtype."""
    return _source(dtype)


@functools.cache
def _source(dtype: str) -> Path:
    folder = furnished(files.beside(Path(home().name) / f"source-{dtype}", files.source()))
    arrays = {name: a.astype(getattr(ml_dtypes, dtype, dtype)) for name, a in files.tensors(files.source()).items()}
    save_file(arrays, folder / "model.safetensors")
    return folder


def recipe(name: str) -> recipes.Recipe:
    if name != "q8_0":
        return recipes.recipe(None if name == "keep" else name)
    path = Path(home().name) / "q8_0.toml"
    path.write_text(Q8_0)
    return recipes.recipe(str(path))


def planned(folder: Path, name: str = "keep") -> plan.Plan:
    return plan.make(open_checkpoint(folder), GGUF(), recipe(name))


def write(folder: Path | Checkpoint, out: Path, name: str = "keep", *, text_only: bool = False) -> Path:
    checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder)
    target = GGUF()
    target.write(plan.make(checkpoint, target, recipe(name), text_only=text_only), out, Silent())
    return out


def written(name: str, dtype: str = "bfloat16") -> Path:
    return _written(name, dtype)


@functools.cache
def _written(name: str, dtype: str) -> Path:
    return write(source(dtype), Path(home().name) / f"{name}-{dtype}", name)


def model_file(folder: Path) -> Path:
    (found,) = (path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))
    return found


def projector_file(folder: Path) -> Path:
    (found,) = folder.glob("mmproj*.gguf")
    return found
