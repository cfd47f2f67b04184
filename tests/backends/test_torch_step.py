"""The torch denoising step against the reference: every decision of every step, masks, stopping, and what it costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cuda_backend.kernels import logits
from mlx_diffgemma.backend import CanvasSpec, Masks
from mlx_diffgemma.config import GenerationConfig
from tests.conftest import load_model

DEMO = Path(__file__).parents[2] / "mlx_diffgemma" / "demo_checkpoint"
V, C = 128, 48  # of the demo
DECISIONS = ("canvas", "argmax", "accepted", "done", "steps")
CLOSE = 1e-3  # the order of fp32 sums, amplified step after step; a random network would amplify it without end
EASY = GenerationConfig(max_denoising_steps=8, confidence_threshold=0.3, entropy_bound=3.0)


def mask(length=C, **at):
    """int32 [C] from ``p3=17`` for position 3."""
    values = np.full(length, -1, np.int32)
    for name, token in at.items():
        values[int(name[1:])] = token
    return values


def run(model, tokens, lengths, specs, blocks=1):
    """Views of every step of some blocks in lockstep, each committed behind the one before."""
    cache, commit, views = model.encode(tokens, lengths=lengths), None, []
    for _ in range(blocks):
        state = model.begin(cache, specs, commit=commit)
        views.append(model.read(state))
        while not views[-1].done.all():
            state = model.step(state)
            views.append(model.read(state))
        commit = views[-1].argmax, np.full(len(specs), views[-1].argmax.shape[1])
    return views


def assert_same_decisions(mine, theirs):
    assert len(mine) == len(theirs)
    for at, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        for name in DECISIONS:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=f"{name}, view {at}")
            assert getattr(one, name).dtype == getattr(other, name).dtype
        np.testing.assert_allclose(one.entropy, other.entropy, atol=CLOSE)
        np.testing.assert_allclose(one.confidence, other.confidence, atol=CLOSE)


def both(specs, *, seed=0, lengths=(5, 63, 90), blocks=1):
    rng = np.random.default_rng(seed)
    tokens, lengths = rng.integers(0, 100, (len(specs), max(lengths))), np.array(lengths[: len(specs)])
    return [run(load_model(DEMO, name, "float32"), tokens, lengths, specs, blocks) for name in ("cpu", "reference")]


def test_traces_equal_the_reference():
    settings = GenerationConfig(max_denoising_steps=24)
    specs = [CanvasSpec(settings, 3), CanvasSpec(settings.replace(stability_threshold=3), 2**40 + 5, block=2)]
    specs.append(CanvasSpec(settings.replace(temperature=0, max_denoising_steps=7), 9, attempt=1))
    assert_same_decisions(*both(specs, blocks=2))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_setting_per_row(seed):
    specs = [
        CanvasSpec(EASY.replace(stability_threshold=0), seed),
        CanvasSpec(EASY.replace(stability_threshold=None, max_denoising_steps=4, entropy_bound=0.5), seed + 1),
        CanvasSpec(EASY.replace(stability_threshold=2, t_min=0.01, t_max=0.05, temperature=0.5), seed + 2),
    ]
    assert_same_decisions(*both(specs, seed=seed))


def test_masks():
    clamp, start = mask(p3=17, p4=18), mask(p0=40, p3=41)
    specs = [
        CanvasSpec(EASY, 1, masks=Masks(init=start, clamp=clamp, banned=(5, 17, 99), banned_until=12)),
        CanvasSpec(EASY, 1, masks=Masks(renoise_from=mask(p7=33))),
        CanvasSpec(EASY, 1, masks=Masks(clamp=np.arange(C, dtype=np.int32))),
    ]
    mine, theirs = both(specs)
    assert_same_decisions(mine, theirs)
    first, last = mine[0], mine[-1]
    assert first.canvas[0, [0, 3, 4]].tolist() == [40, 17, 18]
    assert first.done.tolist() == [False, False, True]
    assert last.steps[2] == 0 and last.argmax[2].tolist() == list(range(C))
    for view in mine[1:]:
        assert view.argmax[0, 3:5].tolist() == [17, 18] and not view.accepted[0, 3:5].any()
        free = [0, 1, 2, *range(5, 12)]
        assert not np.isin(view.argmax[0, free], (5, 17, 99)).any()
        assert view.accepted[1, 7] or view.canvas[1, 7] == 33


def test_chunks_of_the_vocabulary_decide_alike(monkeypatch):
    specs = [CanvasSpec(EASY, 1, masks=Masks(banned=(3, 4), banned_until=9)), CanvasSpec(EASY, 2)]
    whole, _ = both(specs)
    monkeypatch.setattr(logits, "BUFFER", 4 * 2 * C * 64)  # 64 ids at a time
    sliced, _ = both(specs)
    assert_same_decisions(sliced, whole)


def test_bfloat16_denoises():
    model = load_model(DEMO, "cpu", "bfloat16")
    views = run(model, np.ones((2, 20), np.int64), None, [CanvasSpec(EASY, 1), CanvasSpec(EASY, 2)])
    assert views[-1].done.all() and np.isfinite(views[-1].entropy).all()


def test_a_step_leaves_its_state_alone_and_repeats_exactly():
    model = load_model(DEMO, "cpu", "float32")
    state = model.step(model.begin(model.encode(np.ones((1, 30), np.int64)), [CanvasSpec(EASY, 1)]))
    one, other = model.read(model.step(state)), model.read(model.step(state))
    for name in (*DECISIONS, "entropy", "confidence"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_a_step_neither_moves_nor_copies_the_prefix():
    model, large = load_model(DEMO, "cpu", "float32"), {}
    for length in (500, 5000):
        cache = model.encode(np.ones((1, length), np.int64))
        before = [(k.data_ptr(), k[:, :, C:].clone()) for k, _ in cache.layers]
        state = model.step(model.begin(cache, [CanvasSpec(EASY, 1)]))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            model.step(state)
        for (k, _), (address, kept) in zip(cache.layers, before, strict=True):
            assert k.data_ptr() == address and torch.equal(k[:, :, C:], kept)
        prefix = 5000 * 64 * 4  # the full layer's keys: one head of 64 floats a position
        taken = [event.self_cpu_memory_usage for event in seen.events()]
        large[length] = sorted(size for size in taken if size > prefix / 2)
    assert large[500] == large[5000]
