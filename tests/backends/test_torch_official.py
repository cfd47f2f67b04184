"""The torch network against transformers: float32 within 1e-3, bfloat16 rounded at the same places."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import load_model
from tests.official import Official
from tests.tiny import TEXT, checkpoint

DEMO = Path(__file__).parents[2] / "mlx_diffgemma" / "demo_checkpoint"
W = TEXT["sliding_window"]


@functools.cache
def official(folder: Path, dtype: torch.dtype) -> Official:
    return Official(folder, dtype)


def logits(folder, dtype, prompt, canvas, previous):
    """Canvas logits float32 of transformers and of the torch backend."""
    theirs = official(folder, dtype)
    mine = load_model(folder, "cpu", str(dtype).removeprefix("torch."))
    expected = theirs.logits(theirs.encode([prompt]), canvas, previous)
    return expected, mine.inspect(mine.encode(np.array([prompt])), canvas, previous=previous)["logits"]


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("length", [5, W - 1, W, W + 1, 5 * W // 2])
def test_float32(length, conditioned):
    rng = np.random.default_rng(length)
    prompt, canvas = rng.integers(8, 512, length).tolist(), rng.integers(8, 512, (1, 16))
    previous = rng.normal(size=(1, 16, 512)).astype(np.float32) * 4 if conditioned else None
    expected, found = logits(checkpoint(seed=1), torch.float32, prompt, canvas, previous)
    assert np.abs(found - expected).max() <= 1e-3


@pytest.fixture
def lowest_first(monkeypatch):
    """Router scores in bfloat16 are often equal. ``torch.topk`` promises no order then; ours is the lowest id first."""

    def topk(x, k, dim=-1):
        found = x.sort(dim=dim, descending=True, stable=True)
        return found.values.narrow(dim, 0, k), found.indices.narrow(dim, 0, k)

    monkeypatch.setattr(torch, "topk", topk)


def test_bfloat16_keys_and_values_are_the_official_bits(lowest_first):
    """Six layers deep, a rounding in the wrong place would change most of them; another order of a sum, few."""
    prompt = np.random.default_rng(0).integers(8, 128, 60).tolist()
    theirs = official(DEMO, torch.bfloat16).encode([prompt]).cache.layers
    model = load_model(DEMO, "cpu", "bfloat16")
    canvas = model.config.canvas_length
    for mine, layer in zip(model.encode(np.array([prompt])).layers, theirs, strict=True):
        for found, expected in zip(mine, (layer.keys, layer.values), strict=True):
            assert (found[:, :, canvas : canvas + 60] == expected).float().mean() > 0.99


def test_bfloat16_logits_are_nearer_to_the_official_ones_than_float32_is(lowest_first):
    rng = np.random.default_rng(0)
    prompt, canvas = rng.integers(8, 128, 100).tolist(), rng.integers(8, 128, (1, 48))
    previous = rng.normal(size=(1, 48, 128)).astype(np.float32) * 4
    expected, found = logits(DEMO, torch.bfloat16, prompt, canvas, previous)
    fine, _ = logits(DEMO, torch.float32, prompt, canvas, previous)
    assert np.abs(found - expected).mean() < 0.8 * np.abs(fine - expected).mean()
