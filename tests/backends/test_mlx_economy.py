"""What a step may leave out: the rule, and that the visible answer stays what it was."""

from __future__ import annotations

import functools
import json

import evaluate
import numpy as np
import pytest
import tasks

from mlx_diffgemma import load
from mlx_diffgemma.api import batch_generate, generate
from mlx_diffgemma.backend import CanvasSpec, CanvasView, Masks
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.mlx_backend import step
from mlx_diffgemma.mlx_backend.economy import STILL, SURE, Economy, Saving
from mlx_diffgemma.mlx_backend.model import MLXModel
from tests.backends.test_mlx_step import ROWS, folder, same, trace
from tests.conftest import load_model
from tests.metal_kernels.prompts import prompts

assert folder  # a fixture
C, END = 16, 5
FREE = Masks()
SETTINGS = GenerationConfig(eos_token_ids=(END,))


def view(argmax, entropy=0.0, canvas=None, accepted=True, done=False) -> CanvasView:
    argmax = np.asarray(argmax)
    canvas = argmax if canvas is None else np.asarray(canvas)
    shape = argmax.shape
    accepted, entropy = np.broadcast_to(accepted, shape), np.broadcast_to(np.float32(entropy), shape)
    return CanvasView(canvas, argmax, accepted, entropy, entropy, np.full(shape[0], done), np.full(shape[0], 1))


def economy(rows: int = 1, masks: Masks = FREE, **options) -> Economy:
    options = {"survivors": False, "hold": False} | options
    return Economy.of([CanvasSpec(SETTINGS, seed=1, masks=masks)] * rows, C, **options)


def show(to: Economy, shown: CanvasView, flat: int) -> None:
    """The view of the step after those that it has seen."""
    to.learn(shown, flat, to.at + 1)


def row(end: int | None, other: int = 7) -> list[int]:
    """A canvas of text that ends at ``end``."""
    return [other] * C if end is None else [other] * end + [END] * (C - end)


def test_nothing_is_left_out_unless_asked_for():
    plain = economy()
    for _ in range(5):
        show(plain, view([row(3)]), 0)
    assert plain.saving() == Saving(None, None)


def test_flat_rows_decide_how_many_are_dense():
    few = economy(rows=2, survivors=True)
    assert few.saving().dense == 1  # nothing is known yet
    for flat, dense in ((0, 0), (1, 0.25), (8, 0.25), (9, 1), (32, 1)):
        show(few, view([row(3)] * 2), flat)
        assert few.saving() == Saving(None, dense), flat


@pytest.mark.parametrize(
    ("end", "rows"), [(0, 2), (1, 2), (2, 4), (5, 6), (13, 14), (14, None), (15, None), (None, None)]
)
def test_a_still_tail_is_held(end, rows):
    held = economy(hold=True)
    for number in range(STILL):
        assert held.saving().rows is None, number
        show(held, view([row(end)]), 0)
    assert held.saving().rows == rows  # in eighths of the canvas, the end of the text included


def test_what_moves_is_computed():
    held = economy(hold=True)
    for number in range(STILL + 2):
        argmax = row(3)
        argmax[9] = number  # a position of the tail that changes
        show(held, view([argmax]), 0)
    assert held.saving().rows == 10
    for kind in ({"entropy": 2 * SURE}, {"accepted": False}, {"canvas": [[8] * C]}):
        held = economy(hold=True)
        for _ in range(STILL + 2):
            show(held, view([row(3)], **kind), 0)
        assert held.saving().rows is None, kind


def test_the_tail_comes_back_when_the_end_moves_into_it():
    held = economy(hold=True)
    for _ in range(STILL + 1):
        show(held, view([row(3)]), 0)
    assert held.saving().rows == 4
    beyond = [7, 7, 7, 7] + [END] * 12  # what ended the text is text now
    show(held, view([beyond]), 0)
    assert held.saving().rows == 6
    show(held, view([row(None)]), 0)
    assert held.saving().rows is None


def test_given_positions_are_still():
    clamp = np.where(np.arange(C) >= 12, 9, -1).astype(np.int32)
    held = economy(hold=True, masks=Masks(clamp=clamp))
    canvas = row(3)[:12] + [9] * 4
    for _ in range(STILL + 1):
        accepted = np.arange(C) < 12
        show(held, view([canvas], entropy=np.where(accepted, 0, 3), accepted=accepted), 0)
    assert held.saving().rows == 4


def test_the_slowest_row_decides_and_a_finished_one_needs_nothing():
    held = economy(rows=2, hold=True)
    for _ in range(STILL + 1):
        show(held, view([row(3), row(9)]), 0)
    assert held.saving().rows == 10
    show(held, CanvasView(*(getattr(view([row(3), row(9)]), name) for name in CanvasView.__annotations__)), 0)
    held.last.done[1] = True
    assert held.saving().rows == 4


def test_a_view_that_is_read_again_teaches_nothing():
    held = economy(hold=True, survivors=True)
    for _ in range(5):
        held.learn(view([row(3)]), 1, 1)
    assert held.saving() == Saving(None, 0.25)
    held.learn(view([row(3)]), 0, 2)
    held.learn(view([row(None)]), 9, 1)
    assert held.saving() == Saving(4, 0)


# ---- steps


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_survivors_are_exact_where_all_survive(folder, rows):
    """Logits of random weights lie within e^10 of each other, so gathering loses nothing, flat or not."""
    dense, lengths = load_model(folder, "mlx", "float32"), np.array([40, 5, 16])
    sparse = type(dense)(dense.config, dense.network, dense.weights, survivors=True)
    same(trace(sparse, rows, lengths, steps=4), trace(dense, rows, lengths, steps=4))


@pytest.mark.parametrize("options", [{"hold": True}, {"survivors": True}], ids=lambda x: next(iter(x)))
def test_a_plan_that_the_last_view_changed_is_made_anew(options, monkeypatch):
    """Compiled and ahead or not, each step saves what the views before it allow."""
    plain, processor = demo()
    tokens = np.array([processor.prompt_ids(prompts(1)[0])])
    every = processor.generation.replace(confidence_threshold=None)

    def run(compiled: bool) -> tuple[list, list]:
        model = MLXModel(plain.config, plain.network, plain.weights, compiled=compiled, **options)
        state, views, savings = model.begin(model.encode(tokens), [CanvasSpec(every, seed=5)]), [], []
        for _ in range(10):
            savings.append(state.block.economy.saving())
            state = model.step(state)
            views.append(model.read(state))
            views[-1] = model.read(state)  # looking twice changes nothing
        return views, savings

    (fast, planned), (slow, expected) = run(True), run(False)
    assert planned == expected and len({*planned}) > 1
    same(fast, slow)


def test_held_positions_keep_what_they_had(folder):
    """Whatever stands there: the head is told to cover a part, and the rest of every view is the view before."""
    model = load_model(folder, "mlx", "float32")
    specs = ROWS["masks"][:2]
    state = model.begin(model.encode(np.ones((2, 9), int)), specs)
    for _ in range(2):
        state = model.step(state)
    before = state.carried
    args = (state.block.settings, state.block.prefix, before, state.block.schedule.at(2))
    part, whole = (step.denoise(model.network, *args, Saving(rows=rows)) for rows in (6, None))
    for name in ("argmax", "entropy", "confidence", "accepted"):
        found, old, full = (np.array(getattr(x, name)) for x in (part, before, whole))
        if name != "accepted":  # which is decided among all positions
            np.testing.assert_array_equal(found[:, 6:], old[:, 6:], name)
            np.testing.assert_allclose(found[:, :6], full[:, :6], rtol=1e-5)
    np.testing.assert_array_equal(np.array(part.soft)[:, 6:], np.array(before.soft)[:, 6:])
    np.testing.assert_allclose(np.array(part.soft)[:, :6], np.array(whole.soft)[:, :6], atol=1e-5)


# ---- answers


@functools.cache
def demo(**options):
    return load("demo", backend="mlx", dtype="float32", **options)


@pytest.mark.parametrize("options", [{"tail": "hold"}, {"self_conditioning": "survivors"}], ids=lambda x: next(iter(x)))
def test_answers_stay_what_they_were(options, monkeypatch):
    """Demo prompts; and something was left out indeed."""
    seen, saving = [], Economy.saving
    monkeypatch.setattr(Economy, "saving", lambda self: (seen.append(saving(self)), seen[-1])[1])
    for prompt in prompts(5):
        every = {
            "seed": 11,
            "max_tokens": 48,
            "confidence_threshold": None,
        }  # all steps, for short answers stop at once
        expected = generate(*demo(), prompt, **every)
        found = generate(*demo(**options), prompt, **every)
        assert found.text == expected.text and found.tokens == expected.tokens, prompt
    assert any(x.rows for x in seen) if "tail" in options else any(x.dense == 0 for x in seen)


@functools.cache
def two_thousand(**options) -> list[str]:
    examples = tasks.evaluation_set(2000)
    return [answer.text for answer in evaluate.answers(*demo(**options), examples)]


@pytest.mark.soak
@pytest.mark.parametrize("options", [{"tail": "hold"}, {"self_conditioning": "survivors"}], ids=lambda x: next(iter(x)))
def test_no_answer_changes(options):
    """The demo's 2,000 held-out prompts, as the README says."""
    assert two_thousand(**options) == two_thousand()


def test_in_a_batch_too():
    asked = prompts(4)
    expected = batch_generate(*demo(), asked, seed=3, max_tokens=48)
    found = batch_generate(*demo(tail="hold", self_conditioning="survivors"), asked, seed=3, max_tokens=48)
    assert [x.text for x in found] == [x.text for x in expected]


def test_what_is_left_out_is_said():
    told = demo(tail="hold", self_conditioning="survivors")[0].describe()["approximations"]
    assert any("survivors" in line for line in told) and any("hold" in line for line in told)
    assert demo()[0].describe()["approximations"] == [] and json.dumps(demo()[0].describe())
