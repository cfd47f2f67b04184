"""The memory plan against MLX's own count of what is active and of what was active at most."""

from __future__ import annotations

import dataclasses
import gc

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import mlx_backend
from mlx_diffgemma.backend import CanvasSpec, LoadOptions
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.mlx_backend import budget, cache, model, residency, vocabulary
from mlx_diffgemma.mlx_backend.cache import empty_cache
from mlx_diffgemma.tools import plan, plan_memory, work
from mlx_diffgemma.tools.work import Load
from tests import tiny
from tests.formats.quantized import quantized
from tests.tools.middle import SHAPE

REAL = ModelConfig.from_dict(read_json(plan.PUBLISHED))
CANVAS, PROMPT, STEPS = 64, 200, 3
SETTINGS = GenerationConfig(max_denoising_steps=STEPS, confidence_threshold=None)
DTYPES = {"float32": 4, "bfloat16": 2}
SMALL = 8  # bytes that the network itself keeps from its first use on: the scale of its embedding


@dataclasses.dataclass(frozen=True)
class Run:
    """Bytes that MLX counted: active with the weights, and with the cache; at most above those, and in all."""

    load: Load
    weights: int
    cache: int
    reading: int
    step: int
    peak: int


def settled() -> int:
    mx.synchronize()
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.fixture(scope="module", params=DTYPES)
def run(request) -> Run:
    """Loading, a prompt and a block of a random model that is large enough for arrays to count."""
    checkpoint = open_checkpoint(tiny.checkpoint(0, CANVAS, tuple(SHAPE.items())))
    before = settled()
    made = mlx_backend.load(checkpoint, dtype=request.param)
    loaded = settled()
    limit = mx.set_cache_limit(0)  # else a buffer may be a freed one, a little larger than asked for
    mx.reset_peak_memory()
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (1, PROMPT))
    cache = made.encode(tokens)
    read = settled()
    reading = mx.get_peak_memory() - read
    state = made.begin(cache, [CanvasSpec(SETTINGS, seed=1)])
    made.read(state)
    begun = settled()
    mx.reset_peak_memory()
    for _ in range(STEPS):
        state = made.step(state)
        made.read(state)
    mx.synchronize()
    peak = mx.get_peak_memory()
    mx.set_cache_limit(limit)
    held = budget.held(checkpoint)
    load = Load(checkpoint.config, held, prompt=PROMPT, width=DTYPES[request.param])
    return Run(load, loaded - before, read - loaded, reading, peak - begun, peak - before)


def test_weights_are_exact(run):
    assert run.weights == sum(plan_memory.weights(run.load).values())


def test_the_cache_is_exact(run):
    planned = plan_memory.cache(run.load, PROMPT)
    assert planned <= run.cache <= planned + SMALL


def test_what_comes_and_goes_is_bounded(run, record):
    """By the plan, and the plan is no more than four times what was seen."""
    load = run.load
    reading = plan_memory.activations(load, False, PROMPT)
    step = reading + plan_memory.logits(load, False)
    assert reading / 4 < run.reading <= reading
    assert step / 4 < run.step <= step
    record(width=load.width, reading=run.reading / reading, step=run.step / step)


def test_the_peak_is_bounded(run):
    total = plan_memory.memory_plan(run.load, False).total
    assert total / 2 < run.peak <= total


def test_a_slice_of_logits_is_seen_in_the_peak(run):
    """So the bound on logits is not idle: what the vocabulary's arrays take was there."""
    assert run.step > CANVAS * SHAPE["vocab_size"] * 3 * 4


@pytest.mark.parametrize("kind", ["affine4", "mxfp4", "nvfp4", "mixed"])
def test_packed_weights_are_exact(kind):
    folder = quantized(kind)
    held = plan.subject(str(folder), None)
    load = Load(held.config, budget.held(open_checkpoint(folder)), width=held.width)
    made = mlx_backend.load(open_checkpoint(folder))
    assert sum(plan_memory.weights(load).values()) == made.describe()["weight_bytes"]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 100, 128, 129, 200, 1022, 1023, 1024, 4096])
@pytest.mark.parametrize("batch", [1, 3])
def test_capacity_is_that_of_the_cache(tokens, batch):
    config = ModelConfig.from_folder(tiny.checkpoint())
    for window in (16, 100, 1024):
        text = dataclasses.replace(config.text, sliding_window=window)
        cache = empty_cache(text, batch, mx.bfloat16)
        cache.reserve(tokens)
        load = Load(dataclasses.replace(config, text=text), {}, batch=batch)
        assert plan_memory.cache(load, tokens) == cache.nbytes


def test_the_26b_model_in_4_bits_stays_under_18_gb():
    """At a prompt of 4,096 tokens, freed buffers that MLX keeps included; with a finished answer behind it as well."""
    load = Load(REAL, work.formats(REAL, "4bit"), prompt=4096)
    most = plan_memory.memory_plan(load, True).total + residency.FREED
    plain = plan_memory.memory_plan(load, False).total + residency.FREED
    assert most < plain < plan.LIMIT == 18e9
    assert plan_memory.memory_plan(load, False, tokens=4096 + 1024).total + residency.FREED < 18e9
    assert plan.memory(load)["most"] == plain and plan.memory(load)["smallest"] == 24


def test_the_26b_plan_part_by_part():
    parts = plan_memory.memory_plan(Load(REAL, work.formats(REAL, "4bit"), prompt=4096), True).parts
    assert parts["embedding"] == 262_144 * 2816 * 8.5 / 8
    assert parts["cache"] == 2 * 2 * (25 * 8 * 256 * 1023 + 5 * 2 * 512 * 4096)
    assert parts["logits"] == 2 * 2 * 256 * 262_144, "a canvas of logits, and of probabilities"
    assert parts["weights"] == pytest.approx(14.63e9, rel=1e-3)


def test_kernels_never_take_more():
    for place in (tiny.checkpoint(), None):
        config = ModelConfig.from_folder(place) if place else REAL
        for width in (2, 4):
            for batch in (1, 4):
                load = Load(config, {}, prompt=300, batch=batch, width=width)
                plain, fused = plan_memory.memory_plan(load, False), plan_memory.memory_plan(load, True)
                assert fused.parts["activations"] <= plain.parts["activations"]


def test_constants_are_those_of_the_backend():
    """The plan is core and imports no backend, so what it knows of one is written twice."""
    assert plan_memory.CHUNK == model.CHUNK
    assert plan.FREED == residency.FREED
    assert (work.SLICE_ELEMENTS, work.SLICE_BYTES) == (vocabulary.SLICE_ELEMENTS, vocabulary.SLICE_BYTES)
    assert work.LEAST_SLOTS == cache.LEAST_CAPACITY
    for slots in range(1, 5000, 7):
        assert work.rounded_up(slots) == cache.rounded_up(slots)


def test_load_is_judged_by_it(monkeypatch):
    monkeypatch.setattr(budget, "check", lambda kernels: None)  # as where there is a GPU
    checkpoint = open_checkpoint(quantized("affine4"))
    found = {
        kernels: budget.plan(
            checkpoint.config, checkpoint.nbytes, checkpoint, device="auto", options=LoadOptions(kernels=kernels)
        )
        for kernels in ("auto", "ops", "fused")
    }
    assert found["auto"] == found["ops"], "what is not yet known is planned for the worse"
    assert found["fused"].parts["weights"] == found["ops"].parts["weights"]
    assert found["fused"].parts["activations"] < found["ops"].parts["activations"]
    assert found["ops"].tokens == 4096 and found["ops"].parts["cache"] > 0
    before = budget.plan(REAL, 15_830_000_000, None, device="auto", options=LoadOptions())
    assert before.parts["weights"] == 15_830_000_000 and "embedding" not in before.parts
    assert before.parts["cache"] == plan_memory.cache(Load(REAL, {}), 4096)
