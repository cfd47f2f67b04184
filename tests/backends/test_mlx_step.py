"""A denoising step of the MLX backend against the reference and the rules."""

from __future__ import annotations

import shutil

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_diffgemma.backend import CanvasSpec, Masks
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.mlx_backend import step, vocabulary
from mlx_diffgemma.mlx_backend.kernels import head
from mlx_diffgemma.sampling import rules
from tests import tiny
from tests.conftest import load_model

C, V = 16, 512
SETTINGS = GenerationConfig(max_denoising_steps=6)
EXACT = ("canvas", "argmax", "accepted", "done", "steps")


def draw_ids(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape)


def given(**ids: int) -> np.ndarray:
    mask = np.full(C, -1, np.int32)
    for place, token in ids.items():
        mask[int(place[1:])] = token
    return mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny checkpoint with a weak self-conditioning: with random weights at full strength, a step multiplies the
    difference between two orders of sums by about 15, and free-running traces part after four steps."""
    calm = tmp_path_factory.mktemp("calm")
    shutil.copytree(tiny.checkpoint(), calm, dirs_exist_ok=True)
    tensors = load_file(calm / "model.safetensors")
    tensors["model.decoder.self_conditioning.down_proj.weight"] *= np.float32(0.02)
    save_file(tensors, calm / "model.safetensors")
    return calm


def trace(model, specs: list[CanvasSpec], lengths: np.ndarray, steps: int = 7, commit: bool = False) -> list:
    cache = model.encode(draw_ids(0, len(specs), int(lengths.max())), lengths=lengths)
    canvas = (draw_ids(9, len(specs), C), np.array([C, 0, 7])[: len(specs)])
    state = model.begin(cache, specs, commit=canvas if commit else None)
    views = [model.read(state)]
    for _ in range(steps):
        state = model.step(state)
        views.append(model.read(state))
    return views


def same(found: list, expected: list) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name in EXACT:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=f"{name} of view {number}")
        np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-3)
        np.testing.assert_allclose(a.confidence, b.confidence, atol=1e-3)


ROWS = {
    "seeds and caps": [
        CanvasSpec(SETTINGS, seed=1),
        CanvasSpec(SETTINGS.replace(max_denoising_steps=3, entropy_bound=5.0), seed=2**63, block=4),
        CanvasSpec(SETTINGS.replace(temperature=0, t_max=0.9), seed=3, attempt=1),
    ],
    "stopping": [
        CanvasSpec(SETTINGS.replace(stability_threshold=0, confidence_threshold=1e6), seed=1),
        CanvasSpec(SETTINGS.replace(stability_threshold=None, confidence_threshold=1e6), seed=1),
        CanvasSpec(SETTINGS.replace(stability_threshold=1, confidence_threshold=1e6), seed=1),
    ],
    "masks": [
        CanvasSpec(SETTINGS, seed=1, masks=Masks(clamp=given(p0=7, p3=9, p15=1), banned=(1, 5, 400), banned_until=9)),
        CanvasSpec(
            SETTINGS, seed=2, masks=Masks(init=draw_ids(5, C).astype(np.int32), renoise_from=given(p1=44, p2=3))
        ),
        CanvasSpec(SETTINGS, seed=3, masks=Masks(clamp=np.arange(C, dtype=np.int32))),
    ],
}


@pytest.mark.parametrize("commit", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_traces_equal_the_reference(folder, rows, commit):
    """Every view of a block, finished rows frozen, over ragged rows."""
    lengths = np.array([40, 5, 16])
    expected = trace(load_model(folder, "reference"), rows, lengths, commit=commit)
    same(trace(load_model(folder, "mlx", "float32"), rows, lengths, commit=commit), expected)
    assert expected[-1].done.all()


def test_masks_hold():
    clamp = given(p0=7, p3=9)
    banned = tuple(range(256))
    specs = [CanvasSpec(SETTINGS, seed=1, masks=Masks(clamp=clamp, banned=banned, banned_until=10))]
    for view in trace(load_model(tiny.checkpoint(), "mlx", "float32"), specs, np.array([5]))[1:]:
        for canvas in (view.canvas, view.argmax):
            np.testing.assert_array_equal(canvas[0, [0, 3]], [7, 9])
        assert not view.accepted[0, [0, 3]].any()
        free = clamp[:10] == -1
        assert (view.argmax[0, :10][free] >= 256).all()
        assert (view.canvas[0, :10][free & view.accepted[0, :10]] >= 256).all()


def test_all_clamped_takes_no_step():
    specs = [CanvasSpec(SETTINGS, seed=1, masks=Masks(clamp=np.arange(C, dtype=np.int32)))]
    mlx = load_model(tiny.checkpoint(), "mlx", "float32")
    state = mlx.begin(mlx.encode(draw_ids(0, 1, 5)), specs)
    view = mlx.read(state)
    assert view.done.all() and view.steps.tolist() == [0] and mlx.step(state) is state
    np.testing.assert_array_equal(view.argmax[0], np.arange(C))


@pytest.mark.parametrize("rows_per_slice", [1, 5, 24])
def test_slices_change_nothing(folder, rows_per_slice, monkeypatch):
    """Slices that split canvases, span two, and leave a remainder."""
    mlx, rows, lengths = load_model(folder, "mlx", "float32"), ROWS["masks"], np.array([40, 5, 16])
    whole = trace(mlx, rows, lengths, steps=3)
    monkeypatch.setattr(vocabulary, "SLICE_ELEMENTS", rows_per_slice * V)
    same(trace(mlx, rows, lengths, steps=3), whole)


def test_slices_bound_memory(monkeypatch):
    """One slice after the other: the peak is a few slices, although all were submitted together."""
    mlx = load_model(tiny.checkpoint(), "mlx", "float32")
    hidden, level, uniform = mx.random.normal((1, 2048, 64)), mx.ones((1,)), mx.random.uniform(shape=(1, 2048))
    mx.eval(hidden, level, uniform)

    def peak(rows: int) -> int:
        monkeypatch.setattr(vocabulary, "SLICE_ELEMENTS", rows * V)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        reading = vocabulary.read_canvas(mlx.network, hidden, level, uniform, None)
        mx.eval(reading.argmax, reading.drawn, reading.entropy, reading.confidence, reading.soft)
        return mx.get_peak_memory() - before

    kept = 2048 * (64 + 4) * 4 * 2  # the results, as parts and joined
    assert peak(64) < kept + 10 * 64 * V * 4
    assert peak(2048) > 2 * 2048 * V * 4  # the measurement sees what it should


@pytest.mark.parametrize("vocab_size", [512, 500, 999, 4096])
def test_draw_in_two_levels(vocab_size):
    """Equal to the rule but where the other order of sums moves the target across a boundary; never a zero weight."""
    random = np.random.default_rng(vocab_size)
    shaped = random.normal(size=(400, vocab_size)).astype(np.float32) * 4
    shaped[:, -40:] = -1e30
    uniform = random.random(400).astype(np.float32)
    uniform[:3] = 0, 2**-24, 1 - 2**-24
    weight = np.exp(shaped - shaped.max(-1, keepdims=True))
    runs = mx.array(weight).reshape(400, -1, head.run_length(vocab_size))
    found = np.array(head.draw(runs, mx.cumsum(runs.sum(-1), -1), mx.array(uniform)))
    expected = rules.draw(shaped, uniform)
    assert (found != expected).mean() < 0.01
    assert (found < vocab_size - 40).all() and (np.take_along_axis(weight, found[:, None], -1) > 0).all()
    cumulated = np.cumsum(weight.astype(np.float64), -1)
    share = np.take_along_axis(cumulated, found[:, None], -1)[:, 0] / cumulated[:, -1]
    assert (share > uniform - 1e-5).all()


def test_accept_and_confident_follow_the_rules():
    random = np.random.default_rng(0)
    entropy = np.round(random.random((300, C)).astype(np.float32) * random.random((300, 1)), 2).astype(np.float32)
    free, bound = random.random((300, C)) < 0.8, random.random(300).astype(np.float32)
    free[0] = False
    accepted = np.array(step.accept(mx.array(entropy), mx.array(bound), mx.array(free)))
    calm = np.array(step.confident(mx.array(entropy), mx.array(bound), mx.array(free)))
    for row in range(300):
        np.testing.assert_array_equal(accepted[row], rules.accept(entropy[row], bound[row], free[row]))
        assert calm[row] == rules.confident(entropy[row], bound[row], free[row])


def test_bfloat16_steps():
    """Runs to the end, with the soft embedding of rounded logits in the model's dtype."""
    mlx = load_model(tiny.checkpoint(), "mlx", "bfloat16")
    state = mlx.begin(mlx.encode(draw_ids(0, 1, 5)), [CanvasSpec(SETTINGS, seed=1)])
    while not mlx.read(state).done.all():
        state = mlx.step(state)
    assert state.carried.soft.dtype == mx.bfloat16 and 1 <= mlx.read(state).steps[0] <= 6
    assert mlx.peak_memory() >= mlx.weights.nbytes
