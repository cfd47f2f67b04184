"""The ragged cache: rows move unharmed, the prefix is neither copied nor written by a step."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.backend import CanvasSpec
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.mlx_backend.cache import ring_positions
from mlx_diffgemma.mlx_backend.kernels.ops import PLAIN
from mlx_diffgemma.mlx_backend.model import MLXModel
from tests import tiny
from tests.conftest import load_model

C, V = 16, 512


def draw_ids(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape)


def test_ring_positions():
    found = ring_positions(np.array([0, 3, 7, 12]), 5, 5)
    assert found.tolist() == [[-1] * 5, [0, 1, 2, -1, -1], [5, 6, 2, 3, 4], [10, 11, 7, 8, 9]]


def test_select_and_concat():
    mlx = load_model(tiny.checkpoint(), "mlx", "float32")
    lengths, canvas = np.array([40, 5, 17]), draw_ids(1, 3, C)
    cache = mlx.encode(draw_ids(0, 3, 40), lengths=lengths)
    expected = mlx.inspect(cache, canvas)["logits"]
    order = [2, 0]
    chosen = cache.select(order)
    assert chosen.lengths.tolist() == [17, 40]
    np.testing.assert_allclose(mlx.inspect(chosen, canvas[order])["logits"], expected[order], atol=1e-4)
    joined = cache.select([1]).concat(chosen)
    assert joined.lengths.tolist() == [5, 17, 40] and joined.nbytes == cache.nbytes
    np.testing.assert_allclose(mlx.inspect(joined, canvas[[1, 2, 0]])["logits"], expected[[1, 2, 0]], atol=1e-4)
    mlx.encode(draw_ids(2, 2, 16), chosen)  # a selection is a copy
    np.testing.assert_allclose(mlx.inspect(cache, canvas)["logits"], expected, atol=1e-4)


def step_overhead(mlx, cache) -> int:
    """Bytes above what was there before, at the peak of a step."""
    settings = GenerationConfig(stability_threshold=None)
    state = mlx.begin(cache, [CanvasSpec(settings, seed=1)] * len(cache.lengths))
    for _ in range(2):  # the first steps allocate what later ones reuse
        state = mlx.step(state)
        mlx.read(state)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    state = mlx.step(state)
    mlx.read(state)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_does_not_copy_the_prefix(rows, compiled):
    """Canvas of 1, 4 heads: all scores at once, twice and as weights, take less than the keys of one layer."""
    plain = load_model(tiny.checkpoint(canvas_length=1), "mlx", "float32")
    mlx = MLXModel(plain.config, plain.network, plain.weights, compiled=compiled)
    length = 8000
    lengths = np.array([length, length - 100])[:rows]
    cache = mlx.encode(draw_ids(3, rows, length), lengths=lengths)
    keys = rows * length * 32 * 4
    overhead = step_overhead(mlx, cache)
    assert overhead < keys, (overhead, keys)
    attend = mlx.network.ops.canvas_attention

    def copying(q, k, v, prefix_k, prefix_v, visible):
        return attend(q, k, v, prefix_k + 0, prefix_v, visible)

    network = dataclasses.replace(mlx.network, ops=dataclasses.replace(PLAIN, canvas_attention=copying))
    copied = MLXModel(plain.config, network, plain.weights, compiled=compiled)
    assert step_overhead(copied, cache) > keys  # the measurement sees it


def test_a_step_leaves_the_prefix_alone():
    mlx = load_model(tiny.checkpoint(), "mlx", "float32")
    cache = mlx.encode(draw_ids(4, 2, 30), lengths=np.array([30, 9]))
    before = [(np.array(x.k), np.array(x.v)) for x in cache.layers]
    state = mlx.begin(cache, [CanvasSpec(GenerationConfig(), seed=1)] * 2)
    mlx.read(mlx.step(state))
    for layer, (k, v) in zip(cache.layers, before, strict=True):
        np.testing.assert_array_equal(np.array(layer.k), k)
        np.testing.assert_array_equal(np.array(layer.v), v)
