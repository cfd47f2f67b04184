"""Checkpoints go both ways between this library and stock mlx-vlm, with the same logits.

Both sides compute in float32; a quantized checkpoint is judged by its dequantized weights, never by the original:
random weights turn the rounding of 4 bits into other logits altogether.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from benchmarks.checkpoint import googles
from convert.command import main
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.tools.parity import _router_gap
from tests.conftest import load_model
from tests.formats.foreign import foreign
from tests.peers.stock import peer
from tests.tiny import TEXT, checkpoint

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64}
MODES = {
    "bf16": ("affine", 0, 64),
    "affine 3": ("affine", 3, 64),
    "affine 4": ("affine", 4, 64),
    "affine 4 g32": ("affine", 4, 32),
    "affine 5": ("affine", 5, 64),
    "affine 6": ("affine", 6, 64),
    "affine 8": ("affine", 8, 64),
    "mxfp4": ("mxfp4", 4, 32),
    "mxfp8": ("mxfp8", 8, 32),
    "nvfp4": ("nvfp4", 4, 16),
}
RECIPES = ("bf16", "w8", "experts4", "mxfp4", "mxfp8", "nvfp4")
CANVAS, DECIDED = 16, 1e-4


@functools.cache
def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="interchange-")


@functools.cache
def source() -> Path:
    """The tiny checkpoint in bfloat16 and Google's dialect, which mlx-vlm reads, at sizes that make whole groups."""
    folder = Path(scratch().name) / "source"
    shutil.copytree(checkpoint(shape=tuple(SHAPE.items()), calm=True), folder)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = googles(json.loads((folder / "config.json").read_text()), TEXT) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def theirs(mode: str) -> Path:
    return peer().convert(source(), Path(scratch().name) / f"theirs-{mode}", *MODES[mode])


@functools.cache
def ours(recipe: str) -> Path:
    folder = Path(scratch().name) / f"ours-{recipe}"
    assert main([str(source()), "--to", "mlx", "--recipe", recipe, "--out", str(folder), "--quiet"]) == 0
    return folder


PROMPT = list(range(40, 61))


def canvases(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TEXT["vocab_size"], CANVAS)


def compare(folder: Path, backend: str) -> float:
    """Largest difference of logits, decided rows only: first step and self-conditioned."""
    model, worst, decided = load_model(folder, backend, "float32"), 0.0, 0
    for seed in range(3):
        canvas, previous = canvases(seed), None
        for _ in range(2):
            cache = model.encode(np.array([PROMPT]))
            soft = None if previous is None else previous[None]
            found = model.inspect(cache, canvas[None], previous=soft, want=("logits", "router_probabilities"))
            expected = peer().logits(folder, PROMPT, canvas, previous)
            gaps = _router_gap(found["router_probabilities"][0], TEXT["top_k_experts"]).min()
            if gaps > DECIDED:
                decided += 1
                worst = max(worst, float(np.abs(found["logits"][0] - expected).max()))
            previous = expected / np.float32(0.8)
    assert decided >= 2, "every case was near a tie of the router"
    return worst


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["reference", "mlx", "cpu"])
def test_what_mlx_vlm_writes_runs_here(mode: str, backend: str, record):
    worst = compare(theirs(mode), backend)
    record(format=f"written by mlx-vlm, {mode}", model=backend, difference=worst)
    assert worst < 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_we_write_runs_in_mlx_vlm(recipe: str, record):
    worst = compare(ours(recipe), "reference")
    record(format=f"written by us, {recipe}", model="mlx-vlm", difference=worst)
    assert worst < 1e-3


@pytest.mark.parametrize("kind", ["modelopt-nvfp4", "ct-nvfp4", "ct-int4"])
def test_what_we_repack_for_mlx_runs_in_mlx_vlm(kind: str, record):
    """Not a number changes on the way; nvfp4 keeps its second scale, in the place where mlx-vlm looks for it."""
    folder = Path(scratch().name) / f"ours-{kind}"
    assert main([str(foreign(kind)), "--to", "mlx", "--out", str(folder), "--quiet"]) == 0
    left, right = open_checkpoint(foreign(kind)), open_checkpoint(folder)
    assert all(np.array_equal(left.read(name), right.read(name)) for name in left.table)
    worst = compare(folder, "reference")
    record(format=f"written by us from {kind}", model="mlx-vlm", difference=worst)
    assert worst < 1e-3


@pytest.mark.parametrize("mode", ["affine 4", "mxfp4", "mxfp8", "nvfp4"])
def test_codes_and_scales_of_both_are_the_same(mode: str):
    """Where both quantize a tensor alike, the bytes are equal."""
    recipe = {"affine 4": "experts4"}.get(mode, mode)
    left, right = open_checkpoint(ours(recipe)), open_checkpoint(theirs(mode))
    same = [name for name in left.table if left.tensors[name].encoding == right.tensors[name].encoding]
    assert sum(left.tensors[name].quantized for name in same) > 40
    for name in same:
        a, b = left.encoded(name).parts, right.encoded(name).parts
        assert all(a[part].tobytes() == b[part].tobytes() for part in a), name
