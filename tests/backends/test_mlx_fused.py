"""Models of Metal kernels, emulated, against plain operations: random and quantized weights, any set of kernels."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.mlx_backend import load as load_mlx
from mlx_diffgemma.mlx_backend.kernels import choice
from mlx_diffgemma.mlx_backend.kernels.launch import running_on
from mlx_diffgemma.mlx_backend.kernels.ops import KERNELS
from tests import tiny
from tests.formats.quantized import quantized
from tests.metal_cpu.runner import emulate

BOUND = 1e-3  # logits of about 10, through six layers in float32


@pytest.fixture(autouse=True)
def metal():
    with running_on(emulate):
        yield


@functools.cache
def plain(folder, **options):
    return load_mlx(open_checkpoint(folder), kernels="ops", **options)


def compared(fused, truth, lengths, vocab: int) -> float:
    """Both models' first step and a self-conditioned one, behind ragged rows; the largest difference of logits."""
    random, want = np.random.default_rng(5), ("logits", "router")
    rows, canvas = len(lengths), truth.config.canvas_length
    tokens, ids = random.integers(0, vocab, (rows, max(lengths))), random.integers(0, vocab, (rows, canvas))
    caches = [model.encode(tokens, lengths=np.array(lengths)) for model in (fused, truth)]
    previous, worst = None, 0.0
    for _ in range(2):
        found, expected = (
            model.inspect(cache, ids, previous=previous, want=want)
            for model, cache in zip((fused, truth), caches, strict=True)
        )
        np.testing.assert_array_equal(found["router"], expected["router"])
        np.testing.assert_allclose(found["logits"], expected["logits"], atol=BOUND, rtol=0)
        np.testing.assert_array_equal(found["logits"].argmax(-1), expected["logits"].argmax(-1))
        worst = max(worst, float(np.abs(found["logits"] - expected["logits"]).max()))
        previous = expected["logits"] / np.float32(0.7)
    return worst


@pytest.mark.parametrize("lengths", [[5], [40, 16]])
def test_logits(lengths, record):
    """Random weights at full strength, behind rows inside the window and beyond it."""
    folder = tiny.checkpoint()
    fused = load_mlx(open_checkpoint(folder), kernels="fused", dtype="float32")
    worst = compared(fused, plain(folder, dtype="float32"), lengths, 512)
    record(kernels="all, cpu-emulated", rows=len(lengths), logits_apart=worst)


@pytest.mark.parametrize("kind", ["affine4", "all affine4", "all nvfp4"])
def test_quantized_weights(kind):
    """Their products are MLX's; rows of the table are gathered by a kernel."""
    checkpoint = open_checkpoint(quantized(kind))
    vocab = checkpoint.config.text.vocab_size
    fused = load_mlx(checkpoint, kernels="fused", dtype="float32", self_conditioning="survivors")
    compared(fused, load_mlx(checkpoint, kernels="ops", dtype="float32"), [9], vocab)


def proven(*kernels: str, dtype: str) -> list[dict]:
    chip = choice.chip_here()
    return [choice.key(kernel, chip, dtype) for kernel in kernels]


SETS = [("odds",), ("look",), ("survivors",), ("look", "odds"), ("look", "survivors"), ("geglu", "heads", "route")]


@pytest.mark.parametrize("conditioning", ["dense", "survivors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", SETS, ids="+".join)
def test_any_set_of_kernels_can_be_proven(kernels, dtype, conditioning, monkeypatch):
    """``auto`` turns on what has a row and nothing else, whatever stands beside it; the self-check passes."""
    monkeypatch.setattr(choice, "read_rows", lambda path: proven(*kernels, dtype=dtype))
    checkpoint = open_checkpoint(tiny.checkpoint())
    model = load_mlx(checkpoint, kernels="auto", dtype=dtype, self_conditioning=conditioning)
    expected = {*kernels} - ({"survivors"} if conditioning == "dense" else set())
    assert {*model.describe()["kernels"]["fused"]} == expected <= {*KERNELS}
    if dtype == "float32":
        compared(model, plain(tiny.checkpoint(), dtype=dtype), [9], 512)


def test_what_no_kernel_can_gather_stays_plain():
    """A table in a format that the gather kernel does not decode: everything else is fused, and it is said why."""
    folder = quantized("all affine6")
    model = load_mlx(open_checkpoint(folder), kernels="fused", dtype="float32", self_conditioning="survivors")
    told = model.describe()["kernels"]
    assert {*told["fused"]} == {*KERNELS} - {"survivors"}
    assert told["ops"] == {"not for affine codes of 6 bits in groups of 64": ["survivors"]}
    compared(model, load_mlx(open_checkpoint(folder), kernels="ops", dtype="float32"), [9], 512)
