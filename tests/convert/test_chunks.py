"""Cut into many ranges or read whole, a checkpoint is converted to the same bytes.

The tests' tensors would all fit one range; those of the 26B model do not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from convert import chunks
from convert.manifest import MANIFEST
from mlx_diffgemma.hub import DEMO
from tests.convert.cases import run, source
from tests.formats.foreign import foreign
from tests.formats.quantized import quantized

CASES: dict[str, tuple[Callable[[], Path], str, str | None]] = {
    "dense": (source, "hf", None),
    "affine": (source, "mlx", "experts4"),
    "mxfp4": (source, "mlx", "mxfp4"),
    "nvfp4": (source, "mlx", "nvfp4"),
    "fp8": (source, "compressed-tensors", "fp8"),
    "nvfp4 with global scales": (source, "compressed-tensors", "experts4-fp8"),
    "gguf": (lambda: DEMO, "gguf", "q8_0"),
    "carried codes": (lambda: quantized("affine4"), "mlx", None),
    "experts from pieces": (lambda: foreign("ct-int4"), "mlx", None),
    "global scales from pieces": (lambda: foreign("modelopt-nvfp4"), "mlx", None),
    "blocks": (lambda: foreign("fp8-block"), "hf", "bf16"),
}


@pytest.mark.parametrize("case", CASES)
def test_many_ranges_give_the_bytes_of_one(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, to, recipe = CASES[case]
    options = ["--to", to, *(["--recipe", recipe] if recipe else [])]
    whole = run(made(), tmp_path / "whole", *options)
    ranges, cut = chunks.ranges, []
    monkeypatch.setattr(chunks, "CHUNK", 3000)
    monkeypatch.setattr(chunks, "ranges", lambda item: cut.append(len(list(ranges(item)))) or ranges(item))
    pieces = run(made(), tmp_path / "pieces", *options)
    assert sum(count > 2 for count in cut) > 10, "hardly a tensor was cut"
    files = {path.name for path in whole.iterdir()} - {MANIFEST}
    assert files == {path.name for path in pieces.iterdir()} - {MANIFEST}
    assert [name for name in files if (whole / name).read_bytes() != (pieces / name).read_bytes()] == []
    hashes = [json.loads((folder / MANIFEST).read_text())["outputs"] for folder in (whole, pieces)]
    assert hashes[0] == hashes[1]
