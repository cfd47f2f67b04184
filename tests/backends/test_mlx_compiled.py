"""A compiled step: the same as the plain one, compiled once per shape, made ahead and submitted when it is due."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.backend import CanvasSpec, Masks
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.mlx_backend import step
from mlx_diffgemma.mlx_backend.cache import rounded_up, visible_slots
from mlx_diffgemma.mlx_backend.compiled import Compiled, join, split
from mlx_diffgemma.mlx_backend.model import MLXModel
from tests import tiny
from tests.backends.test_mlx_step import ROWS, SETTINGS, C, draw_ids, folder, same
from tests.conftest import load_model

assert folder  # a fixture


def compiled(of: MLXModel, **options) -> MLXModel:
    return MLXModel(of.config, of.network, of.weights, compiled=True, **options)


def views(model: MLXModel, lengths: np.ndarray, specs: list[CanvasSpec], steps: int, seed: int = 0) -> list:
    cache = model.encode(draw_ids(seed, len(specs), int(lengths.max())), lengths=lengths)
    state = model.begin(cache, specs)
    found = [model.read(state)]
    for _ in range(steps):
        state = model.step(state)
        found.append(model.read(state))
    return found


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_equals_the_plain_step(folder, rows):
    """Views of whole blocks over ragged rows, whose prefixes are read to a rounded extent and masked."""
    plain, lengths = load_model(folder, "mlx", "float32"), np.array([40, 5, 16])
    same(views(compiled(plain), lengths, rows, 6), views(plain, lengths, rows, 6))


def test_what_is_compiled_is_of_no_request(folder):
    """One compilation of the first step and one of all others serve other prompts, seeds and settings, each rightly."""
    plain = load_model(folder, "mlx", "float32")
    fast = compiled(plain)
    for seed, length in enumerate((30, 44, 50)):
        specs = [CanvasSpec(SETTINGS.replace(entropy_bound=0.1 + seed, temperature=1 + seed / 9), seed=seed)]
        lengths = np.array([length])
        same(views(fast, lengths, specs, 3, seed), views(plain, lengths, specs, 3, seed))
    assert fast.denoiser.function.traces == 2
    # others for a full extent, where nothing is masked; for a window that is not full; for more slots
    for length, traces in ((64, 4), (9, 6), (65, 8), (64, 8), (31, 8), (90, 8)):
        views(fast, np.array([length]), [CanvasSpec(SETTINGS, seed=9)], 3)
        assert fast.denoiser.function.traces == traces, length


def test_a_step_is_submitted_when_it_is_due(folder, monkeypatch):
    """Its graph is made while the step before runs; nothing of it is computed unless it is asked for."""
    fast = compiled(load_model(folder, "mlx", "float32"))
    submitted, made = [], []
    evaluate, function = mx.async_eval, fast.denoiser.function
    monkeypatch.setattr(step.mx, "async_eval", lambda *arrays: (submitted.append(arrays), evaluate(*arrays)))
    monkeypatch.setattr(fast.denoiser, "function", lambda *args: (made.append(1), function(*args))[1])
    cache = fast.encode(draw_ids(0, 1, 20))
    submitted.clear()
    state = fast.begin(cache, [CanvasSpec(GenerationConfig(max_denoising_steps=3, stability_threshold=None), seed=1)])
    counts = [(len(submitted), len(made))]
    for _ in range(4):
        state = fast.step(state)
        fast.read(state)
        counts.append((len(submitted), len(made)))
    assert counts == [(1, 0), (2, 2), (3, 3), (4, 3), (4, 3)]  # the last step makes none, and a fourth is none


def test_closing_early_costs_no_step(folder):
    """What was made ahead and never asked for goes with its state."""
    fast = compiled(load_model(folder, "mlx", "float32"))
    cache = fast.encode(draw_ids(0, 1, 20))
    first = fast.step(fast.begin(cache, [CanvasSpec(SETTINGS, seed=1)]))
    assert len(first.ahead) == 1
    fast.read(first)
    again = fast.step(fast.begin(cache, [CanvasSpec(SETTINGS, seed=1)]))
    np.testing.assert_array_equal(fast.read(again).canvas, fast.read(first).canvas)


def test_masks_are_arguments(folder):
    plain, lengths = load_model(folder, "mlx", "float32"), np.array([12])
    fast = compiled(plain)
    for token in (7, 8):
        clamp = np.where(np.arange(C) < 4, token, -1).astype(np.int32)
        specs = [CanvasSpec(SETTINGS, seed=1, masks=Masks(clamp=clamp, banned=(token + 1,), banned_until=C))]
        found = views(fast, lengths, specs, 3)
        same(found, views(plain, lengths, specs, 3))
        assert (found[-1].argmax[0, :4] == token).all() and (found[-1].argmax != token + 1).all()
    assert fast.denoiser.function.traces == 2


# ---- its parts


def test_trees_come_apart_and_together():
    tree = (step.Saving(3, None), [mx.array(1), (mx.array(2.0), "x")], None)
    leaves: list[mx.array] = []
    skeleton = split(tree, leaves)
    assert len(leaves) == 2 and hash(skeleton) == hash(split(tree, []))
    found = join(skeleton, iter(leaves))
    assert found[0] == tree[0] and found[2] is None and found[1][1][1] == "x" and found[1][0] is leaves[0]
    assert skeleton != split((step.Saving(4, None), *tree[1:]), [])


def test_constants_and_shapes_are_the_key():
    calls = []

    def scaled(x: mx.array, factor: int) -> dict:
        calls.append((x.shape, factor))
        return [x * factor, None]

    fast = Compiled(scaled)
    for length, factor in ((2, 3), (2, 3), (4, 3), (2, 5), (4, 3)):
        product, nothing = fast(mx.ones(length), factor)
        assert product.tolist() == [float(factor)] * length and nothing is None
    assert calls == [((2,), 3), ((4,), 3), ((2,), 5)] and fast.traces == 3


def test_extents_are_rounded_up_to_four_sizes_per_doubling():
    sizes = [rounded_up(n) for n in range(1, 5000)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size - n < max(64, n / 4) for n, size in enumerate(sizes, 1))
    assert len({*sizes}) <= 4 + 4 * 5
    seen = visible_slots(np.array([300, 20]), None, capacity=310)
    assert (seen.extent, seen.held.tolist(), seen.every) == (310, [300, 20], False)
    assert visible_slots(np.array([300, 20]), 15).every


def test_no_options_no_ahead(folder):
    """Plain steps are made when they are due, for making one costs as much as running it."""
    plain = load_model(folder, "mlx", "float32")
    state = plain.step(plain.begin(plain.encode(draw_ids(0, 1, 20)), [CanvasSpec(SETTINGS, seed=1)]))
    assert not state.ahead and not plain.describe()["compiled"]
    assert compiled(load_model(tiny.checkpoint(), "mlx", "float32")).describe()["compiled"]
