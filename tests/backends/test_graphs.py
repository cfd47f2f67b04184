"""A step captured once and replayed: nothing that may change is frozen. On a CPU a tape stands for the CUDA graph.

The mistake looked for is vLLM's #51994: a flag cast to a new tensor on the host, whose value at capture lived on.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref

import numpy as np
import pytest
import torch

import cuda_backend
from cuda_backend.graphs import GraphState, copy, cuda_capture, leaves
from cuda_backend.model import TorchModel
from cuda_backend.step import step
from mlx_diffgemma.backend import CanvasSpec, Masks
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.formats import open_checkpoint
from tests.backends.tape import record as tape
from tests.conftest import load_model
from tests.proofs import PROOFS
from tests.tiny import FULL, SLIDING, TEXT, checkpoint

V, C = TEXT["vocab_size"], 16
SHALLOW = (("num_hidden_layers", 2), ("layer_types", (SLIDING, FULL)))  # one layer of a kind is replayed like six
SETTINGS = GenerationConfig(max_denoising_steps=4, entropy_bound=4.0, confidence_threshold=0.3)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    return request.param


def models(place, dtype="float32"):
    """One model twice: step by step, and through graphs."""
    folder = checkpoint(seed=1, shape=SHALLOW)
    if place == "cuda":  # with its kernels, for torch's grouped product of float32 waits for the host
        plain = cuda_backend.load(open_checkpoint(folder), device=place, dtype="bfloat16", kernels="fused")
    else:
        plain = load_model(folder, place, dtype)
    capture = tape if place == "cpu" else cuda_capture()
    fresh = functools.partial(
        TorchModel, plain.config, plain.network.weights, plain.device, plain.dtype, plain.network.ops
    )
    return fresh(whole=True), fresh(capture)


def specs(seed):
    """Two rows that share nothing with those of another seed but the number of steps and the depth of history."""
    mask = np.full(C, -1, np.int32)
    mask[seed % C] = seed % V
    given = Masks(clamp=mask, renoise_from=np.roll(mask, 1), banned=(seed % 7, 9 + seed % 5), banned_until=1 + seed % C)
    one = SETTINGS.replace(t_min=0.1 + 0.01 * (seed % 9), entropy_bound=2.0 + seed % 3)
    return [CanvasSpec(one, seed, masks=given), CanvasSpec(SETTINGS.replace(temperature=0.0), seed + 1)]


def blocks(model, seed, lengths, count=3):
    """Every view of some blocks, each committed behind the one before."""
    rng = np.random.default_rng(seed)
    cache, commit, views = model.encode(rng.integers(0, V, (2, 40)), lengths=np.array(lengths)), None, []
    for at in range(count):
        state = model.begin(cache, [dataclasses.replace(spec, block=at) for spec in specs(seed + at)], commit=commit)
        done = np.zeros(2, bool)
        while not done.all():
            state = model.step(state)
            view = model.read(state)
            views.append(view)
            done = view.done
        commit = view.argmax, np.array([C, C - at])
    return views


def assert_equal(mine, theirs):
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


def test_blocks_by_graphs_equal_blocks_step_by_step(request, place, record):
    plain, graphed = models(place)
    for seed, lengths in ((1, (30, 40)), (1000, (40, 2))):
        assert_equal(blocks(graphed, seed, lengths), blocks(plain, seed, lengths))
    if place == "cuda":
        PROOFS.of(request.node, place, record)("graph", plain.dtype)
    else:
        record(what="traced", blocks=6)


def test_a_graph_is_captured_once_per_shape(place):
    _, graphed = models(place)
    cache = graphed.encode(np.random.default_rng(0).integers(0, V, (2, 10)))
    captured = set()
    for at in range(4):
        commit = (np.ones((2, C), np.int64), np.array([C, at])) if at else None
        state = graphed.begin(cache, specs(at), commit=commit)
        assert isinstance(state, GraphState)
        captured.add(id(state.captured))
        graphed.step(state)
    assert len(captured) == 2  # with and without a commit: the cache had room


def changed(tensor):
    """Other values that a step can run on."""
    if tensor.dtype == torch.bool:
        return ~tensor
    if tensor.dtype.is_floating_point:
        return tensor * 0.75 + 0.01
    return torch.where(tensor == 0, 1, tensor - 1)


def test_the_next_request_finds_the_graphs_of_the_last(place):
    """Its cache moves to where they look; the last one's, if somebody still has it, takes a copy along."""
    plain, graphed = models(place)
    rng = np.random.default_rng(6)
    prompts, canvas = rng.integers(0, V, (2, 2, 30)), rng.integers(0, V, (2, C))
    first, second = (graphed.encode(tokens) for tokens in prompts)
    captured = {id(graphed.begin(cache, specs(2)).captured) for cache in (first, second, first)}
    assert len(captured) == 1
    assert first.layers[0][0] is not second.layers[0][0]
    for cache, tokens in zip((first, second), prompts, strict=True):
        found, expected = (
            one.inspect(kept, canvas)["logits"] for one, kept in ((graphed, cache), (plain, plain.encode(tokens)))
        )
        np.testing.assert_array_equal(found, expected)


def test_a_cache_that_grows_leaves_its_room(place):
    """Its full layers get new buffers, its rings do not; the next cache in the old room must not share them."""
    plain, graphed = models(place)
    rng = np.random.default_rng(7)
    prompts, canvas = rng.integers(0, V, (2, 2, 40)), rng.integers(0, V, (2, C))
    kept = []
    for tokens in prompts:
        caches = [one.encode(tokens) for one in (graphed, plain)]
        for commit in (None, (canvas, np.array([C, C])), (canvas[::-1], np.array([C, 9]))):
            for one, cache in zip((graphed, plain), caches, strict=True):
                one.step(one.begin(cache, specs(2), commit=commit))
        kept.append(caches)
    for mine, theirs in kept:
        found, expected = (one.inspect(cache, canvas)["logits"] for one, cache in ((graphed, mine), (plain, theirs)))
        np.testing.assert_array_equal(found, expected)


def test_two_blocks_in_progress_have_rooms_of_their_own(place):
    plain, graphed = models(place)
    prompts = np.random.default_rng(8).integers(0, V, (2, 2, 20))
    views = []
    for one in (plain, graphed):
        caches = [one.encode(tokens) for tokens in prompts]
        states = [one.begin(cache, specs(3 + at)) for at, cache in enumerate(caches)]
        for _ in range(2):  # by turns
            states = [one.step(state) for state in states]
            views.append([one.read(state) for state in states])
    for mine, theirs in zip(views[2:], views[:2], strict=True):
        assert_equal(mine, theirs)


def test_what_is_over_cannot_go_on(place):
    _, graphed = models(place)
    cache = graphed.encode(np.ones((2, 10), np.int64))
    first = graphed.begin(cache, specs(1))
    second = graphed.step(first)
    for misuse in (lambda: graphed.step(first), lambda: graphed.read(first)):
        with pytest.raises(AssertionError, match="a step has been taken"):
            misuse()
    graphed.begin(cache, specs(2))
    with pytest.raises(AssertionError, match="another one has begun"):
        graphed.step(second)


def test_a_cache_that_grew_by_reading_takes_its_rings_along(place):
    plain, graphed = models(place)
    rng = np.random.default_rng(9)
    prompts, more, canvas = rng.integers(0, V, (2, 2, 40)), rng.integers(0, V, (2, 60)), rng.integers(0, V, (2, C))
    caches = [one.encode(prompts[0]) for one in (graphed, plain)]
    graphed.step(graphed.begin(caches[0], specs(1)))
    for one, cache in zip((graphed, plain), caches, strict=True):
        one.encode(more, cache)
    graphed.step(graphed.begin(graphed.encode(prompts[1]), specs(1)))
    found, expected = (
        one.inspect(cache, canvas)["logits"] for one, cache in zip((graphed, plain), caches, strict=True)
    )
    np.testing.assert_array_equal(found, expected)


def test_graphs_keep_no_cache_alive(place):
    _, graphed = models(place)
    cache = graphed.encode(np.ones((2, 10), np.int64))
    graphed.step(graphed.begin(cache, specs(1), commit=(np.ones((2, C), np.int64), np.array([C, 3]))))
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("begun", [False, True])
def test_every_input_is_read_at_every_replay(place, begun):
    """Each tensor of a state is changed alone, after the capture; the replay must give what the plain step gives."""
    _, graphed = models(place)
    network, config = graphed.network, graphed.config
    rng = np.random.default_rng(5)
    with torch.inference_mode():
        cache = graphed.encode(rng.integers(0, V, (2, 40)), lengths=np.array([30, 40]))
        graphed.begin(cache, specs(4))
        commit = rng.integers(0, V, (2, C)), np.array([C, 5])
        state = graphed.begin(cache, specs(3), commit=commit)
        captured = state.captured
        if begun:
            graphed.step(state)
        start = captured.later if begun else captured.first
        kept = [tensor.clone() for tensor, _ in leaves(start)]
        layers = [(k.clone(), v.clone()) for k, v in cache.layers]
        looked = 0
        for at, (tensor, shared) in enumerate(leaves(start)):
            if shared:
                continue
            looked += 1
            views = []
            for run in (lambda: step(config, network, start).view(), lambda: replayed(captured, begun)):
                for (old, _), value in zip(leaves(start), kept, strict=True):
                    old.copy_(value)
                for buffers, values in zip(cache.layers, layers, strict=True):
                    for buffer, value in zip(buffers, values, strict=True):
                        buffer.copy_(value)
                tensor.copy_(changed(kept[at]))
                views.append(run().clone())
            assert torch.equal(views[0], views[1]), f"tensor {at} of the state is frozen"
        assert looked > 20


def replayed(captured, begun):
    (captured.go_on if begun else captured.begin)()
    return captured.view


def test_a_frozen_number_would_be_found():
    """The check itself: a step that takes its temperature from the host goes on with the old one."""
    seen = {"temperature": 1.0}
    x, y = torch.ones(3), torch.zeros(3)
    replay = tape(lambda: y.copy_(x / seen["temperature"]))
    seen["temperature"] = 2.0
    replay()
    assert y.tolist() == [1.0, 1.0, 1.0]
    x.fill_(6)
    replay()
    assert y.tolist() == [6.0, 6.0, 6.0]
    for made in (lambda: torch.tensor([2.0]), lambda: torch.from_numpy(np.ones(3)), lambda: torch.nonzero(x)):
        with pytest.raises(AssertionError, match="graph"):
            tape(lambda made=made: y.copy_(made()))


def test_no_step_waits_for_the_device():
    """On meta tensors, which have no values, reading one to the host is an error."""
    plain, _ = models("cpu")

    plain, _ = models("cpu", "bfloat16")

    def on_meta(x):
        if isinstance(x, torch.Tensor):
            return x.to("meta")
        if isinstance(x, (list, tuple)):
            return type(x)(map(on_meta, x))
        if isinstance(x, dict):
            return {key: on_meta(value) for key, value in x.items()}
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return dataclasses.replace(x, **{f.name: on_meta(getattr(x, f.name)) for f in dataclasses.fields(x)})
        return x

    with torch.inference_mode():
        cache = plain.encode(np.ones((2, 20), np.int64))
        state = plain.begin(cache, specs(1), commit=(np.ones((2, C), np.int64), np.array([C, 3])))
        network = dataclasses.replace(plain.network, weights=on_meta(plain.network.weights))
        cache.layers, cache.device = on_meta(cache.layers), torch.device("meta")
        state = on_meta(state)
        for _ in range(2):
            state = step(plain.config, network, state)
        assert state.view().shape == (2, 5 * C + 2)


def test_copies_leave_no_tensor_out():
    plain, _ = models("cpu")
    state = plain.begin(plain.encode(np.ones((2, 20), np.int64)), specs(1))
    other = plain.begin(plain.encode(np.ones((2, 20), np.int64)), specs(2))
    with torch.inference_mode():
        copy(other, state)
    for (a, shared), (b, _) in zip(leaves(state), leaves(other), strict=True):
        assert shared or torch.equal(a, b)
