"""The whole model with every kernel on, emulated, against the model with none: load, self-check, steps, answers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import mlx.core as mx
import pytest

from mlx_diffgemma import load, mlx_backend
from mlx_diffgemma.api import generate
from mlx_diffgemma.errors import BackendError, OptionError
from mlx_diffgemma.mlx_backend.kernels import check, ops
from mlx_diffgemma.mlx_backend.kernels.chip import chip_here
from mlx_diffgemma.mlx_backend.kernels.choice import MATRICES
from mlx_diffgemma.mlx_backend.kernels.launch import available, running_on
from tests.metal_cpu.runner import emulate
from tests.metal_kernels.prompts import prompts


@pytest.fixture
def metal(place):
    """Kernels run: on what stands for the GPU, or on the one there is."""
    with running_on(emulate) if place == "cpu-emulated" else contextlib.nullcontext():
        yield place


def answers(count: int, **options) -> list[tuple]:
    model, processor = load("demo", backend="mlx", dtype="float32", **options)
    asked = prompts(count)
    return [generate(model, processor, prompt, seed=7, max_tokens=48).canvases for prompt in asked]


@pytest.mark.parametrize("options", [{}, {"self_conditioning": "survivors", "tail": "hold"}], ids=["exact", "savings"])
def test_demo_answers(options, metal):
    """From load to the last canvas: equal ids, with the self-check passed on the way."""
    assert answers(20, kernels="fused", **options) == answers(20, kernels="ops", **options)


@pytest.mark.soak
def test_demo_answers_soak(metal):
    assert answers(200, kernels="fused") == answers(200, kernels="ops")


def test_what_runs_is_said(metal):
    told = load("demo", backend="mlx", kernels="fused")[0].describe()
    missing = {"survivors"} | ({*MATRICES} if metal == "metal" and chip_here().virtual else set())
    assert {*told["kernels"]["fused"]} == {*ops.KERNELS} - missing
    assert told["kernels"].get("emulated", False) == (metal == "cpu-emulated")
    assert told["compiled"] == (metal == "metal")  # an emulated kernel runs when it is called: nothing can be traced


def test_a_wrong_kernel_is_found_when_it_is_loaded(metal, monkeypatch):
    wrong = dataclasses.replace(ops.FUSED, geglu=lambda *args: ops.FUSED.geglu(*args) * 1.05)
    monkeypatch.setattr(mlx_backend, "self_check", functools.partial(check.self_check, fused=wrong))
    with pytest.raises(BackendError, match=r"kernel 'geglu' .*kernels='ops'"):
        load("demo", backend="mlx", kernels="fused")


def test_without_metal_kernels_are_refused():
    if not available():
        with pytest.raises(OptionError, match=r"kernels='fused'.*Mac's GPU.*kernels='ops'"):
            load("demo", backend="mlx", kernels="fused")
    assert available() == mx.metal.is_available()
