"""What the tests of the converters share: small checkpoints of every format, the command, comparisons bit for bit."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from convert.command import main
from mlx_diffgemma.formats import open_checkpoint
from tests.tiny import checkpoint

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64}


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="convert-")


def source(dtype: str = "bfloat16") -> Path:
    """The tiny checkpoint with rows that are whole groups of 64, and a few sidecars."""
    return _source(dtype)


@functools.cache
def _source(dtype: str) -> Path:
    folder = Path(_home().name) / f"source-{dtype}"
    shutil.copytree(checkpoint(shape=tuple(SHAPE.items())), folder)
    if dtype != "float32":
        import torch

        tensors = load_file(folder / "model.safetensors")
        save_file({n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text('{"model": {}}\n')
    (folder / "tokenizer_config.json").write_text('{"chat_template": null}')
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n\xc3\xa4")
    (folder / "processor_config.json").write_text('{"processor_class": "Gemma4Processor"}')
    (folder / "README.md").write_text("not copied")
    return folder


@functools.cache
def converted(recipe: str | None, to: str = "mlx") -> Path:
    """``source()``, converted once per process."""
    return run(source(), Path(_home().name) / f"{to}-{recipe}", "--to", to, *(["--recipe", recipe] if recipe else []))


def run(folder: Path | str, out: Path, *options: str) -> Path:
    assert main([str(folder), "--out", str(out), "--quiet", *options]) == 0
    return out


def same_numbers(left: Path, right: Path, *, encodings: bool = True) -> None:
    """Every tensor of both, bit for bit."""
    one, other = open_checkpoint(left), open_checkpoint(right)
    assert one.table.keys() == other.table.keys()
    for name in one.table:
        a, b = one.encoded(name), other.encoded(name)
        if encodings:
            assert a.encoding == b.encoding, name
            assert a.parts.keys() == b.parts.keys()
            assert all(a.parts[part].tobytes() == b.parts[part].tobytes() for part in a.parts), name
        else:
            assert np.array_equal(a.decode().astype(np.float32), b.decode().astype(np.float32)), name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(capsys, *arguments: object) -> str:
    """The one line that the command says no with."""
    capsys.readouterr()  # making the source may have said something
    try:
        status = main([str(part) for part in arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    printed = capsys.readouterr()
    assert status == 2 and len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("mlx_diffgemma.convert: ") and printed.out == ""
    return printed.err.strip()
