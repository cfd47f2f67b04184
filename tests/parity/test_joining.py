"""Rows that join a batch under way: each ends as it would alone, whatever its neighbours have behind them."""

from __future__ import annotations

import numpy as np

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.events import Finished
from mlx_diffgemma.sampling import engine
from tests.conftest import load_model
from tests.tiny import checkpoint

LENGTHS = (1, 14, 15, 16, 17, 31, 64, 65, 100)  # around the window of 16, and beyond a new buffer's 64 slots


def requests() -> list[engine.Request]:
    rng = np.random.default_rng(5)
    found = []
    for row, length in enumerate(rng.permutation(LENGTHS)):
        settings = GenerationConfig(
            max_tokens=int(rng.choice([16, 33, 64])),
            max_denoising_steps=int(rng.integers(1, 5)),
            entropy_bound=float(rng.choice([0.1, 5.0])),
            stability_threshold=[0, 1, 2, None][rng.integers(4)],
            confidence_threshold=float(rng.choice([1e-3, 2.0, 9.0])),
            temperature=float(rng.choice([0.0, 0.5, 1.0])),
            eos_token_ids=tuple(rng.integers(0, 512, 6).tolist()),
            pad_token_id=0,
        )
        prompt = tuple(rng.integers(0, 512, length).tolist())
        found.append(engine.Request(row, prompt, settings, int(rng.integers(2**62))))
    return found


def run(model, waves: list[list[engine.Request]]) -> dict[int, tuple]:
    waiting = list(waves)
    events = engine.run(model, lambda running: waiting.pop(0) if waiting else None)
    return {e.row: (e.canvases, e.stats.steps_per_block) for e in events if isinstance(e, Finished)}


def test_rows_that_join_end_as_they_would_alone(backend):
    model, rows = load_model(checkpoint(seed=3, calm=True), backend, "float32"), requests()
    alone = {number: end for row in rows for number, end in run(model, [[row]]).items()}
    joined = run(model, [rows[:2], [rows[2]], [], rows[3:6], [], rows[6:]])
    assert joined == alone
    assert max(len(canvases) for canvases, _ in alone.values()) == 4
