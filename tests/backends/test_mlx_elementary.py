"""exp, tanh and softmax by way of powers of two, on the CPU, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.mlx_backend.kernels import elementary


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def test_exp():
    x = mx.concatenate([-mx.arange(0, 80, 0.001), mx.array([0.0, -1e30, -2e38, -mx.inf])])
    found, truth = wide(elementary.exp(x)), np.exp(wide(x))
    assert (np.abs(found - truth) <= 5e-6 * truth + 1e-38).all()
    assert found[-4] == 1 and (found[-3:] == 0).all()


def test_tanh():
    x = mx.concatenate([mx.arange(-50, 50, 0.001), mx.array([1e30, -1e30, mx.inf, -mx.inf, 0.0])])
    found = wide(elementary.tanh(x))
    np.testing.assert_allclose(found, np.tanh(wide(x)), atol=3e-7, rtol=0)
    assert found[-5:].tolist() == [1, -1, 1, -1, 0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_softmax(dtype):
    scores = (mx.random.normal((7, 300), key=mx.random.key(1)) * 20).astype(dtype)
    scores[0, 5:] = -mx.inf
    found, x = elementary.softmax(scores), wide(scores)
    truth = np.exp(x - x.max(-1, keepdims=True))
    truth /= truth.sum(-1, keepdims=True)
    assert found.dtype == dtype
    assert np.abs(wide(found) - truth).max() < (1e-5 if dtype == mx.float32 else 4e-3)


def test_a_gpu_keeps_its_own(monkeypatch):
    monkeypatch.setattr(elementary, "on_cpu", lambda: False)
    x = mx.array([-3.0, 0.5])
    for name in ("exp", "tanh"):
        assert getattr(elementary, name)(x).tolist() == getattr(mx, name)(x).tolist()
    assert elementary.softmax(x).tolist() == mx.softmax(x, -1, precise=True).tolist()
