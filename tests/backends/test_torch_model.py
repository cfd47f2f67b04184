"""The torch network against the NumPy reference: logits, scores, ragged batches, windows, blocks, pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cuda_backend
from cuda_backend.kernels import logits
from mlx_diffgemma.errors import BackendError, OptionError
from mlx_diffgemma.formats import open_checkpoint
from tests.conftest import load_model
from tests.tiny import TEXT, checkpoint

DEMO = Path(__file__).parents[2] / "mlx_diffgemma" / "demo_checkpoint"
W, V = TEXT["sliding_window"], TEXT["vocab_size"]
CLOSE = 1e-3  # the order of fp32 sums, which a random network amplifies to 4e-4; logits reach 10
ALL = ("logits", "hidden", "router", "router_probabilities")
LENGTHS = (5, W - 1, W, W + 1, 5 * W // 2)


def models():
    folder = checkpoint(seed=1)
    return load_model(folder, "reference"), load_model(folder, "cpu", "float32")


def ids(rng, *shape):
    return rng.integers(0, V, shape)


def ragged(rng, lengths):
    """Tokens [B, L], padded with ids that would show if they were read."""
    return ids(rng, len(lengths), max(lengths)), np.array(lengths)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape
        np.testing.assert_allclose(found[name], values, atol=CLOSE, rtol=0, err_msg=name)


@pytest.mark.parametrize("length", LENGTHS)
def test_explains_itself_like_the_reference(length):
    rng, (reference, model) = np.random.default_rng(length), models()
    tokens, canvas = ids(rng, 1, length), ids(rng, 1, 16)
    previous = rng.normal(size=(1, 16, V)).astype(np.float32) * 4
    theirs, mine = reference.encode(tokens, score=True), model.encode(tokens, score=True)
    assert_same(
        model.inspect(mine, canvas, previous=previous, want=ALL),
        reference.inspect(theirs, canvas, previous=previous, want=ALL),
    )
    assert_same(model.inspect(mine, canvas), reference.inspect(theirs, canvas))
    np.testing.assert_allclose(mine.scores, theirs.scores, atol=CLOSE, rtol=0)


def test_ragged_rows_equal_single_rows_block_after_block():
    rng, (_, model) = np.random.default_rng(3), models()
    tokens, lengths = ragged(rng, (5, W + 1, 5 * W // 2))
    batch = model.encode(tokens, lengths=lengths)
    singles = [model.encode(tokens[i : i + 1, :n]) for i, n in enumerate(lengths)]
    for counts in ((16, 3, 0), (16, 16, 16), (0, 0, 1)):
        canvas = ids(rng, 3, 16)
        together = model.inspect(batch, canvas)["logits"]
        for i, cache in enumerate(singles):
            alone = model.inspect(cache, canvas[i : i + 1])["logits"][0]
            np.testing.assert_allclose(together[i], alone, atol=CLOSE, rtol=0)
        more = ids(rng, 3, 16)
        model.encode(more, batch, lengths=np.array(counts))
        for i, count in enumerate(counts):
            model.encode(more[i : i + 1, :count], singles[i])
        assert batch.lengths.tolist() == [int(cache.lengths[0]) for cache in singles]


@pytest.mark.parametrize("piece", [1, 7, W - 1, W, 64])
def test_pieces_of_a_prompt_change_nothing(monkeypatch, piece):
    rng, (reference, model) = np.random.default_rng(piece), models()
    tokens, lengths = ragged(rng, (50, 3, W))
    canvas = ids(rng, 3, 16)
    theirs = reference.encode(tokens, lengths=lengths, score=True)
    monkeypatch.setattr(model, "chunk", piece)
    mine = model.encode(tokens, lengths=lengths, score=True)
    np.testing.assert_allclose(mine.scores, theirs.scores, atol=CLOSE, rtol=0)
    assert_same(model.inspect(mine, canvas), reference.inspect(theirs, canvas))


def test_select_and_concat_move_rows():
    rng, (reference, model) = np.random.default_rng(4), models()
    tokens, lengths = ragged(rng, (40, 9, W))
    canvas = ids(rng, 4, 16)
    caches = []
    for one in (reference, model):
        long = one.encode(tokens, lengths=lengths).select([2, 0])
        short = one.encode(tokens[:, :9], lengths=np.array([1, 9, 4])).select([1, 0])
        caches.append(long.concat(short))
    assert caches[1].lengths.tolist() == [W, 40, 9, 1]
    assert_same(model.inspect(caches[1], canvas), reference.inspect(caches[0], canvas))
    caches = [one.encode(canvas, cache) for one, cache in zip((reference, model), caches, strict=True)]
    assert_same(model.inspect(caches[1], canvas), reference.inspect(caches[0], canvas))


def test_select_copies():
    rng, (_, model) = np.random.default_rng(5), models()
    cache, canvas = model.encode(ids(rng, 1, 20)), ids(rng, 1, 16)
    before = model.inspect(cache, canvas)["logits"]
    model.encode(ids(rng, 1, 30), cache.select([0]))
    np.testing.assert_array_equal(model.inspect(cache, canvas)["logits"], before)


def test_a_ring_takes_no_more_than_the_window():
    rng, (_, model) = np.random.default_rng(6), models()
    cache = model.encode(ids(rng, 1, 200))
    slots = {model.config.text.full(i): keys.shape[2] - 16 for i, (keys, _) in enumerate(cache.layers)}
    assert slots == {True: 200, False: W - 1}
    assert cache.nbytes == sum(2 * keys.nbytes for keys, _ in cache.layers)


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch):
    rng, (_, model) = np.random.default_rng(7), models()
    tokens, canvas = ids(rng, 1, 20), ids(rng, 1, 16)
    cache = model.encode(tokens, score=True)
    previous = rng.normal(size=(1, 16, V)).astype(np.float32) * 4
    whole, scores = model.inspect(cache, canvas, previous=previous), cache.scores
    monkeypatch.setattr(logits, "BUFFER", 4 * 16 * 64)  # 64 ids at a time
    assert_same(model.inspect(cache, canvas, previous=previous), whole)
    np.testing.assert_allclose(model.encode(tokens, score=True).scores, scores, atol=CLOSE, rtol=0)
    assert np.isnan(scores[0, 0]) and np.isfinite(scores[0, 1:]).all()


def test_bfloat16_computes_close_to_float32():
    rng = np.random.default_rng(8)
    half, full = load_model(DEMO, "cpu", "bfloat16"), load_model(DEMO, "cpu", "float32")
    tokens, canvas = rng.integers(0, 128, (1, 20)), rng.integers(0, 128, (1, 48))
    coarse = half.inspect(half.encode(tokens), canvas)["logits"]
    fine = full.inspect(full.encode(tokens), canvas)["logits"]
    assert half.describe()["dtype"] == "bfloat16"
    assert half.describe()["weight_bytes"] < 0.6 * full.describe()["weight_bytes"]
    assert np.corrcoef(coarse.ravel(), fine.ravel())[0, 1] > 0.99


def test_embedding_scale_is_rounded_to_the_dtype():
    folder = checkpoint(seed=1, shape=(("hidden_size", 48),))
    assert load_model(folder, "cpu", "bfloat16").network.scale == float(torch.tensor(48**0.5).bfloat16())
    assert load_model(folder, "cpu", "float32").network.scale == float(np.float32(48**0.5))


def test_describes_itself_and_refuses_what_it_cannot_do():
    _, model = models()
    described = model.describe()
    assert described["backend"] == "cpu" and described["kernels"]["fused"] == described["approximations"] == []
    assert cuda_backend.memory("cpu") > 0 and model.peak_memory() > 0
    with pytest.raises(OptionError, match="float16"):
        cuda_backend.load(open_checkpoint(checkpoint(seed=1)), device="cpu", dtype="float16")
    with pytest.raises(OptionError, match="attention"):
        model.inspect(model.encode(np.ones((1, 3))), np.ones((1, 16)), want=("attention",))


def test_experts_that_torch_cannot_group_are_refused_before_loading():
    """In bfloat16 a row of 20 is 40 bytes; in float32 it is 80, five times 16."""
    folder = checkpoint(seed=1, shape=(("moe_intermediate_size", 20),))
    assert load_model(folder, "cpu", "float32").encode(np.ones((1, 3))).lengths.tolist() == [3]
    with pytest.raises(BackendError, match="moe_intermediate_size=20"):
        load_model(folder, "cpu", "bfloat16")
