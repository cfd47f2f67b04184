"""Foreign checkpoints on every model, against the reference on what the formats' own formulas say they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_diffgemma.formats import open_checkpoint
from tests.conftest import load_model
from tests.formats.foreign import KINDS, dequantized, foreign

TOLERANCE = 1e-3
WANT = ("logits", "router")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_experts_are_the_formulas(kind: str, backend: str, record):
    """Teacher forced: a first step, one conditioned on it, and both again behind a committed block."""
    model, judge = load_model(foreign(kind), backend, "float32"), load_model(dequantized(kind), "reference")
    config, rng = open_checkpoint(foreign(kind)).config, np.random.default_rng(0)
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
    record(format=kind, model=backend, difference=worst)
    assert worst < TOLERANCE and np.abs(expected["logits"]).max() > 5
