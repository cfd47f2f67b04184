"""The count of a whole plain step against the graph of the step itself: nothing between its parts is forgotten."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import mlx_backend
from mlx_diffgemma.backend import CanvasSpec
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.mlx_backend import step
from mlx_diffgemma.mlx_backend.compiled import join, split
from mlx_diffgemma.mlx_backend.economy import Saving
from mlx_diffgemma.tools import work_ends
from mlx_diffgemma.tools.work import Load
from tests import tiny
from tests.tools.middle import SHAPE
from tests.tools.tape import as_on_a_gpu, bytes_of, compiled_passes, passes_of

CANVAS, PROMPT = 64, 200  # which is rounded up to 224
SETTINGS = GenerationConfig(max_denoising_steps=3, confidence_threshold=None)


@pytest.fixture
def traced(monkeypatch) -> tuple[Load, Callable[..., list[mx.array]], list[mx.array]]:
    """The second step of a float32 model, as a function of its arrays. In bfloat16 a CPU would widen the experts."""
    checkpoint = open_checkpoint(tiny.checkpoint(0, CANVAS, tuple(SHAPE.items())))
    model = mlx_backend.load(checkpoint, dtype="float32")
    state = model.begin(model.encode(np.zeros((1, PROMPT), int)), [CanvasSpec(SETTINGS, seed=1)])
    state = model.step(state)
    model.read(state)
    block, cache = state.block, model.encode(np.zeros((1, PROMPT), int))
    prefix = model.network.prefix(cache, CANVAS, rounded=True)
    leaves: list[mx.array] = []
    skeleton = split((block.settings, prefix, state.carried, block.schedule.at(1), Saving()), leaves)
    mx.eval(leaves)
    as_on_a_gpu(monkeypatch)

    def made(*leaves: mx.array) -> list[mx.array]:
        found: list[mx.array] = []
        split(step.denoise(model.network, *join(skeleton, iter(leaves))), found)
        return found

    return Load(checkpoint.config, {}, prompt=PROMPT, width=4), made, leaves


def test_a_whole_step(traced):
    load, function, leaves = traced
    counted, moved = work_ends.total(work_ends.costs(load, False)).nbytes, bytes_of(function, *leaves)
    assert 0.98 * moved <= counted <= moved, f"{counted / moved:.4f} of what the graph moves"


def test_passes_of_a_whole_step_are_those_of_mlx(traced):
    """But for the sampler's few small ones: MLX lets a pass have several results where they are results of the step."""
    _, function, leaves = traced
    ours, theirs = passes_of(function, *leaves), compiled_passes(function, *leaves)
    assert (ours - theirs).total() <= 2 and (theirs - ours).total() <= 2 < 80 < ours.total()
