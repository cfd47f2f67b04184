"""GGUF files on every model, against the reference on the numbers that the gguf package reads from them."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_diffgemma.formats import open_checkpoint
from tests.conftest import load_model
from tests.formats import gguf_files as files

TOLERANCE = 1e-3
WANT = ("logits", "router")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "MXFP4", "Q4_K_M"])
def test_logits_and_experts_are_those_of_the_dequantized_model(kind: str, backend: str, record):
    """Teacher forced: a first step, one conditioned on it, and both again behind a committed block."""
    model = load_model(files.model(kind), backend, "float32")
    judge = load_model(files.plain(kind), "reference")
    config, rng = open_checkpoint(files.model(kind)).config, np.random.default_rng(0)
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
    record(format=f"GGUF {kind}", model=backend, difference=worst)
    assert worst < TOLERANCE and np.abs(expected["logits"]).max() > 3
