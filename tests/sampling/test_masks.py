"""Canvas masks: 300 random specs, every step of every model held against the rules of ``sampling/rules.py``."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mlx_diffgemma.backend import CanvasSpec, Masks
from mlx_diffgemma.config import UNSET, GenerationConfig
from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.events import Draft
from mlx_diffgemma.sampling import rules
from mlx_diffgemma.sampling.noise import block_noise
from mlx_diffgemma.tools.parity import NOISE, first_difference, margin
from tests.conftest import load_model
from tests.tiny import checkpoint

LENGTH, VOCAB, ROWS, ROUNDS, STEPS = 16, 512, 30, 10, 4


def some(rng, share) -> np.ndarray:
    """Random ids at about ``share`` of the positions, unset elsewhere."""
    return np.where(rng.random(LENGTH) < share, rng.integers(0, VOCAB, LENGTH), UNSET).astype(np.int32)


def random_spec(rng) -> CanvasSpec:
    maybe = lambda: some(rng, rng.choice([0.1, 0.5, 0.9])) if rng.random() < 0.5 else None  # noqa: E731
    banned = tuple(rng.integers(0, VOCAB, 40).tolist()) if rng.random() < 0.5 else ()
    clamp = np.zeros(LENGTH, np.int32) if rng.random() < 0.03 else maybe()
    settings = GenerationConfig(
        max_denoising_steps=int(rng.integers(1, STEPS + 1)),
        entropy_bound=float(rng.choice([0.01, 0.1, 5.0, 100.0])),
        stability_threshold=rng.choice([0, 1, 2, None]),
        confidence_threshold=float(rng.choice([1e-3, 2.0, 9.0])),
        temperature=float(rng.choice([0.0, 0.5, 1.0])),
    )
    return CanvasSpec(
        settings,
        seed=int(rng.integers(2**62)),
        block=int(rng.integers(3)),
        attempt=int(rng.integers(2)),
        masks=Masks(maybe(), clamp, maybe(), banned, int(rng.integers(LENGTH + 1))),
    )


@functools.cache
def round_of(index: int) -> tuple[np.ndarray, list[CanvasSpec]]:
    rng = np.random.default_rng(7000 + index)
    return rng.integers(0, VOCAB, (ROWS, 9)), [random_spec(rng) for _ in range(ROWS)]


@functools.cache
def views(backend: str, index: int) -> list:
    """The view of every step, until all rows are done."""
    prompts, specs = round_of(index)
    model = load_model(checkpoint(seed=3, calm=True), backend, "float32")
    state = model.begin(model.encode(prompts), specs)
    found = [model.read(state)]
    for _ in range(STEPS):
        state = model.step(state)
        found.append(model.read(state))
    return found


def check_row(row: int, spec: CanvasSpec, steps: list) -> None:
    """One row's whole block against the rules: what it shows must follow from the entropies it reports."""
    settings, masks = spec.settings, spec.masks
    clamp = np.full(LENGTH, UNSET) if masks.clamp is None else masks.clamp
    free = clamp == UNSET
    noise = block_noise(spec.seed, block=spec.block, attempt=spec.attempt, steps=STEPS, length=LENGTH, vocab_size=VOCAB)
    start = noise.start if masks.init is None else np.where(masks.init == UNSET, noise.start, masks.init)
    assert (steps[0].canvas[row] == np.where(free, start, clamp)).all()
    assert steps[0].done[row] == (not free.any())
    history: list[np.ndarray] = []
    for at, (before, view) in enumerate(pairwise(steps)):
        canvas, argmax, accepted, entropy = (getattr(view, n)[row] for n in ("canvas", "argmax", "accepted", "entropy"))
        assert (canvas[~free] == clamp[~free]).all() and (argmax[~free] == clamp[~free]).all()
        if before.done[row]:
            assert (canvas == before.canvas[row]).all() and (argmax == before.argmax[row]).all(), "not frozen"
            assert view.done[row] and view.steps[row] == before.steps[row]
            continue
        assert (accepted == rules.accept(entropy, settings.entropy_bound, free)).all()
        fresh = noise.renoise[at]
        if masks.renoise_from is not None:
            fresh = np.where(masks.renoise_from == UNSET, fresh, masks.renoise_from)
        assert (canvas[free & ~accepted] == fresh[free & ~accepted]).all()
        if settings.temperature == 0:
            assert (canvas[accepted] == argmax[accepted]).all()
        early = np.arange(LENGTH) < masks.banned_until
        assert not np.isin(argmax[early & free], masks.banned).any()
        assert not np.isin(canvas[early & accepted], masks.banned).any()
        stop = settings.stability_threshold is not None and rules.stable(history, argmax, settings.stability_threshold)
        stop = stop and rules.confident(entropy, settings.confidence_threshold, free)
        history.append(argmax)
        assert view.steps[row] == at + 1
        assert view.done[row] == (stop or at + 1 == settings.max_denoising_steps)


@pytest.mark.parametrize("index", range(ROUNDS))
def test_random_specs_obey_the_rules(index, backend):
    _, specs = round_of(index)
    found = views(backend, index)
    for row, spec in enumerate(specs):
        check_row(row, spec, found)
    assert found[-1].done.all()


def drafts(found: list, row: int) -> list[Draft]:
    names = ("canvas", "argmax", "accepted", "entropy", "confidence")
    steps = [view for before, view in pairwise(found) if not before.done[row]]
    return [Draft(row, 0, int(v.steps[row]), *(getattr(v, name)[row] for name in names)) for v in steps]


def test_models_agree_on_random_specs(fast_backend, record):
    """Every row's decisions equal the reference's; one that differs must have been a near tie (at most 2 %)."""
    models = tuple(load_model(checkpoint(seed=3, calm=True), name, "float32") for name in ("reference", fast_backend))
    explained = []
    for index in range(ROUNDS):
        prompts, specs = round_of(index)
        expected, found = views("reference", index), views(fast_backend, index)
        for row, spec in enumerate(specs):
            at = first_difference(drafts(expected, row), drafts(found, row))
            if at is not None:
                explained.append(margin(models, prompts[row], spec, drafts(expected, row), at))
    record(backend=fast_backend, specs=ROWS * ROUNDS, differences=len(explained), margins=explained)
    assert all(narrow < NOISE for narrow in explained)
    assert len(explained) <= 0.02 * ROWS * ROUNDS


def test_masks_with_nothing_in_them_change_nothing(backend):
    prompts, specs = round_of(0)
    model = load_model(checkpoint(seed=3, calm=True), backend, "float32")
    unset = np.full(LENGTH, UNSET, np.int32)
    plain = [replace(spec, masks=Masks()) for spec in specs]
    empty = [replace(spec, masks=Masks(unset, unset, unset, (1, 2), 0)) for spec in specs]
    left, right = model.begin(model.encode(prompts), plain), model.begin(model.encode(prompts), empty)
    for _ in range(STEPS):
        left, right = model.step(left), model.step(right)
        a, b = model.read(left), model.read(right)
        assert all((getattr(a, name) == getattr(b, name)).all() for name in ("canvas", "argmax", "accepted", "done"))


def test_the_noise_of_a_position_never_depends_on_masks():
    """Clamping half of the canvas leaves the other half's fresh tokens where they were."""
    prompts, specs = round_of(1)
    half = np.where(np.arange(LENGTH) < LENGTH // 2, 7, UNSET).astype(np.int32)
    model = load_model(checkpoint(seed=3, calm=True), "reference")
    settings = GenerationConfig(max_denoising_steps=2, entropy_bound=1e-6)
    free = model.step(model.begin(model.encode(prompts), [CanvasSpec(settings, s.seed) for s in specs]))
    held = [CanvasSpec(settings, s.seed, masks=Masks(clamp=half)) for s in specs]
    clamped = model.step(model.begin(model.encode(prompts), held))
    a, b = model.read(free), model.read(clamped)
    both = ~a.accepted & ~b.accepted & (half == UNSET)
    assert both.sum() > ROWS and (a.canvas[both] == b.canvas[both]).all()


@pytest.mark.parametrize("mask", [np.zeros(3, np.int32), np.full(LENGTH, VOCAB), np.full(LENGTH, -2), np.zeros(LENGTH)])
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(OptionError, match="clamp"):
        Masks(clamp=mask).checked(LENGTH, VOCAB)


@pytest.mark.parametrize(
    ("banned", "until", "named"),
    [((VOCAB,), 1, "512"), ((-1,), 1, "-1"), ((0.5,), 1, "0.5"), (range(VOCAB), 1, "every"), ((3,), -1, "-1")],
)
def test_a_ban_that_does_not_fit_is_refused(banned, until, named):
    """Unchecked, a negative id or bound means another position on every backend."""
    with pytest.raises(OptionError, match=f"banned.*{named}"):
        Masks(banned=tuple(banned), banned_until=until).checked(LENGTH, VOCAB)


def test_a_stability_threshold_beyond_the_steps_is_never_met(backend):
    """Nor does it make a history of that length."""
    model = load_model(checkpoint(seed=3, calm=True), backend, "float32")
    settings = GenerationConfig(max_denoising_steps=3, stability_threshold=2**40, confidence_threshold=1e6)
    specs = [CanvasSpec(settings.replace(stability_threshold=n), 1) for n in (2**40, 3, 0)]
    state = model.begin(model.encode(np.ones((3, 5), np.int64)), specs)
    for _ in range(3):
        state = model.step(state)
    assert model.read(state).steps.tolist() == [3, 3, 1]
