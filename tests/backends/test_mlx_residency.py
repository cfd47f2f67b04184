"""What MLX may keep: limits are set where there is a GPU, and a long session stays flat under one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.backend import CanvasSpec
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.mlx_backend import residency
from mlx_diffgemma.mlx_backend.model import MLXModel
from tests import tiny
from tests.conftest import load_model

SHORT = GenerationConfig(max_denoising_steps=2, stability_threshold=None)


def test_limits_are_set_on_a_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(residency.mx, "set_cache_limit", lambda limit: calls.append(("cache", limit)))
    monkeypatch.setattr(residency.mx, "set_wired_limit", lambda limit: calls.append(("wired", limit)))
    monkeypatch.setattr(residency.mx, "device_info", lambda: {"max_recommended_working_set_size": 17e9})
    monkeypatch.setattr(residency.mx.metal, "is_available", lambda: False)
    residency.settle()
    assert calls == []
    monkeypatch.setattr(residency.mx.metal, "is_available", lambda: True)
    residency.settle()
    assert calls == [("cache", residency.FREED), ("wired", 17_000_000_000)]


def answer(model: MLXModel, length: int) -> None:
    """A prompt of ``length`` and a block behind it."""
    tokens = np.random.default_rng(length).integers(0, 512, (1, length))
    state = model.begin(model.encode(tokens), [CanvasSpec(SHORT, seed=length)])
    for _ in range(2):
        state = model.step(state)
        model.read(state)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_session_stays_flat(compiled):
    """Prompts of ever other lengths: what is in use afterwards is what was, what is kept stays under the limit."""
    plain = load_model(tiny.checkpoint(), "mlx", "float32")
    model, limit = MLXModel(plain.config, plain.network, plain.weights, compiled=compiled), 2 * 2**20
    answer(model, 100)
    before, used, kept = mx.set_cache_limit(limit), [], []
    try:
        mx.clear_cache()
        for length in range(20, 420, 16):
            answer(model, length)
            used.append(mx.get_active_memory())
            kept.append(mx.get_cache_memory())
    finally:
        mx.set_cache_limit(before)
    assert max(kept) <= limit and max(kept) > limit / 4  # there was something to limit
    assert max(used) - min(used) < 64 * 1024, (min(used), max(used))
    assert not compiled or model.denoiser.function.traces <= 2 * 2 * 7  # which MLX does not count: sizes, full or not
