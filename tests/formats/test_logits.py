"""Checkpoints of other tools on every model, against the reference on what their own formulas say they stand for.

compressed-tensors, ModelOpt and fine-grained FP8 are judged by the formulas in ``foreign.py``, GGUF by its package.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_diffgemma.formats import open_checkpoint
from tests.conftest import load_model
from tests.formats import gguf_files
from tests.formats.foreign import KINDS, dequantized, foreign

TOLERANCE = 1e-3
WANT = ("logits", "router")
GGUF = ("Q8_0", "Q4_0", "Q5_1", "MXFP4", "Q4_K_M")


def compare(quantized: Path, plain: Path, backend: str) -> float:
    """Teacher forced, ragged: a first step, one conditioned on it, both again behind a committed block.

    Experts must be chosen alike; the largest difference of logits comes back.
    """
    model, judge = load_model(quantized, backend, "float32"), load_model(plain, "reference")
    config, rng = open_checkpoint(quantized).config, np.random.default_rng(0)
    vocab, length, lengths = config.text.vocab_size, config.canvas_length, np.array([24, 5])
    prompt, canvas = rng.integers(0, vocab, (2, 24)), rng.integers(0, vocab, (2, length))
    ours, theirs = (m.encode(prompt, lengths=lengths) for m in (model, judge))
    worst = 0.0
    for _ in range(2):
        previous = None
        for _ in range(2):
            found = model.inspect(ours, canvas, previous=previous, want=WANT)
            expected = judge.inspect(theirs, canvas, previous=previous, want=WANT)
            assert np.array_equal(found["router"], expected["router"])
            worst = max(worst, float(np.abs(found["logits"] - expected["logits"]).max()))
            previous = expected["logits"] / np.float32(0.7)
        for m, cache in ((model, ours), (judge, theirs)):
            m.encode(canvas, cache)
    assert np.abs(expected["logits"]).max() > 3, "the logits are too small to mean anything"
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_of_other_tools(kind: str, backend: str, record):
    worst = compare(foreign(kind), dequantized(kind), backend)
    record(format=kind, model=backend, difference=worst)
    assert worst < TOLERANCE


@pytest.mark.parametrize("kind", GGUF)
def test_gguf(kind: str, backend: str, record):
    worst = compare(gguf_files.model(kind), gguf_files.plain(kind), backend)
    record(format=f"GGUF {kind}", model=backend, difference=worst)
    assert worst < TOLERANCE
