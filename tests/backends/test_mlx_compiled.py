"""A compiled step: the same as the plain one, compiled once per shape, made ahead and submitted when it is due."""

from __future__ import annotations

import gc
import threading

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import load, stream_generate
from mlx_diffgemma.backend import CanvasSpec, Masks
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.events import Finished
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.mlx_backend import load as load_mlx
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
    views(fast, np.array([90]), [CanvasSpec(SETTINGS.replace(max_denoising_steps=5), seed=9)], 3)
    assert fast.denoiser.function.traces == 8  # the cap on steps is no part of it


def test_lengths_close_to_each_other_look_alike(folder):
    """Whatever the prompt, the block and the buffers that came before: a size per quarter of a doubling."""
    fast = compiled(load_model(folder, "mlx", "float32"))
    for length in range(257, 319, 7):
        views(fast, np.array([length]), [CanvasSpec(SETTINGS, seed=1)], 2)
    assert fast.denoiser.function.traces == 2
    views(fast, np.array([320]), [CanvasSpec(SETTINGS, seed=1)], 2)  # which fills its extent
    assert fast.denoiser.function.traces == 4
    cache = fast.encode(draw_ids(0, 1, 200))
    for _ in range(12):  # blocks behind one prompt: 216 to 392 tokens
        state = fast.begin(cache, [CanvasSpec(SETTINGS, seed=1)], commit=(draw_ids(1, 1, C), np.array([C])))
        for _ in range(2):
            state = fast.step(state)
            fast.read(state)
        del state
    assert fast.denoiser.function.traces <= 12


def test_bits_do_not_depend_on_who_was_there_before(folder):
    """A row behind buffers that once held a longer one reads what it would read alone."""
    fast = compiled(load_model(folder, "mlx", "float32"))
    tokens, long = draw_ids(0, 1, 150), draw_ids(1, 1, 700)
    both = np.zeros((2, 700), int)
    both[0, :150], both[1] = tokens[0], long[0]
    kept = fast.encode(both, lengths=np.array([150, 700])).select([0])

    def first(cache) -> np.ndarray:
        return fast.read(fast.step(fast.begin(cache, [CanvasSpec(SETTINGS, seed=4)]))).entropy

    alone = fast.encode(tokens)
    assert kept.layers[-1].capacity > alone.layers[-1].capacity
    np.testing.assert_allclose(first(kept), first(alone), atol=1e-4)  # the prompt was read in a batch of another shape
    extents = [
        fast.denoiser.begin(cache, [CanvasSpec(SETTINGS, seed=4)]).block.prefix.visible for cache in (kept, alone)
    ]
    assert [x.extent for x in extents[0]] == [x.extent for x in extents[1]]


def test_a_stream_may_be_read_from_any_thread():
    """As a server does: every event in a thread of its own."""
    plain, processor = load("demo", backend="mlx", dtype="float32")
    fast = compiled(plain)

    def told(model: MLXModel) -> list:
        events, found, done = stream_generate(model, processor, "recite jack", seed=3, max_tokens=96), [], object()

        def one() -> None:
            found.append(next(events, done))

        while not found or found[-1] is not done:
            thread = threading.Thread(target=one)
            thread.start()
            thread.join()
        return [event.tokens for event in found[:-1] if isinstance(event, Finished)]

    assert told(fast) == told(plain) != []


def test_a_model_takes_its_weights_along():
    """Without the collector of cycles: what is dropped is gone, so that the next model finds room."""
    gc.collect()
    before = mx.get_active_memory()
    gc.disable()
    try:
        plain = load_mlx(open_checkpoint(tiny.checkpoint()), dtype="float32")
        model = compiled(plain)
        del plain
        views(model, np.array([30]), [CanvasSpec(SETTINGS, seed=1)], 3)
        held = mx.get_active_memory() - before
        del model
        assert held > 10**6 and mx.get_active_memory() - before < held / 100
    finally:
        gc.enable()


def test_the_oldest_compilation_is_let_go(monkeypatch):
    monkeypatch.setattr("mlx_diffgemma.mlx_backend.compiled.MOST", 2)
    fast = Compiled(lambda x, factor: x * factor)
    for factor in (1, 2, 1, 3, 1, 2):
        assert fast(mx.ones(2), factor).tolist() == [factor, factor]
    assert fast.traces == 4 and len(fast._made) == 2


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


def test_closing_early_costs_no_step(folder, monkeypatch):
    """What was made ahead and never asked for goes with its state."""
    fast = compiled(load_model(folder, "mlx", "float32"))
    cache = fast.encode(draw_ids(0, 1, 20))
    submitted, evaluate = [], mx.async_eval
    monkeypatch.setattr(step.mx, "async_eval", lambda *arrays: (submitted.append(arrays), evaluate(*arrays)))
    first = fast.step(fast.begin(cache, [CanvasSpec(SETTINGS, seed=1)]))
    assert len(first.ahead) == 1 and len(submitted) == 2  # of the beginning and of one step
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
    seen = visible_slots(np.array([300, 20]), None, rounded=True)
    assert (seen.extent, seen.held.tolist(), seen.every) == (320, [300, 20], False)
    assert visible_slots(np.array([300, 20]), 15).every
    assert visible_slots(np.array([900, 20]), 1000, rounded=True).extent == 1000


def test_no_options_no_ahead(folder):
    """Plain steps are made when they are due, for making one costs as much as running it."""
    plain = load_model(folder, "mlx", "float32")
    state = plain.step(plain.begin(plain.encode(draw_ids(0, 1, 20)), [CanvasSpec(SETTINGS, seed=1)]))
    assert not state.ahead and not plain.describe()["compiled"]
    assert compiled(load_model(tiny.checkpoint(), "mlx", "float32")).describe()["compiled"]
