"""Merged commit: a finished canvas and the next one's first step in one forward, against one after the other."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_diffgemma.backend import CanvasSpec, Masks
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import OptionError
from tests.conftest import load_model
from tests.tiny import TEXT, checkpoint

W, V, C = TEXT["sliding_window"], TEXT["vocab_size"], 16
EQUAL = 2e-4  # of logits of about 10: float32 sums in another order, through three blocks; a wrong key makes it 1
SETTINGS = GenerationConfig(max_denoising_steps=3, confidence_threshold=None)
LENGTHS = {
    "one row": (5,),
    "around the window": (W - 1, W, W + 1),
    "ragged": (3, 5 * W // 2, W),
}


def model():
    return load_model(checkpoint(seed=1, calm=True), "cpu", "float32")


def start(one, seed, lengths):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (len(lengths), max(lengths)))
    return one.encode(tokens, lengths=np.array(lengths)), rng.integers(0, V, (len(lengths), C))


def trace(one, cache, specs, commit):
    """Hidden states and ids of every step of one block."""
    state, seen = one.begin(cache, specs, commit=commit), []
    for _ in range(SETTINGS.max_denoising_steps):
        state = one.step(state)
        view = one.read(state)
        seen.append((state.last.hidden.numpy().copy(), view.canvas, view.argmax, view.accepted))
    return seen


@pytest.mark.parametrize("counts", [(C, C, C), (C, 0, 7), (0, 1, C)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_merged_is_separate(lengths, counts, record):
    one, worst = model(), 0.0
    counts = np.array(counts[: len(lengths)])
    specs = [CanvasSpec(SETTINGS, 7 + i) for i in range(len(lengths))]
    merged, tokens = start(one, 1, lengths)
    apart, _ = start(one, 1, lengths)
    for _ in range(3):  # a later block sees what an earlier commit left in the ring
        one.encode(tokens, apart, lengths=counts)
        theirs = trace(one, apart, specs, None)
        mine = trace(one, merged, specs, (tokens, counts))
        for a, b in zip(mine, theirs, strict=True):
            worst = max(worst, float(np.abs(a[0] - b[0]).max()))
            for found, expected in zip(a[1:], b[1:], strict=True):
                np.testing.assert_array_equal(found, expected)
        assert merged.lengths.tolist() == apart.lengths.tolist()
        logits = [one.inspect(cache, tokens)["logits"] for cache in (merged, apart)]
        worst = max(worst, float(np.abs(logits[0] - logits[1]).max()))
        tokens = mine[-1][2]
    record(what="merged commit", worst=worst)
    assert worst < EQUAL


def test_the_first_step_of_a_block_is_the_only_forward_of_a_commit(monkeypatch):
    one = model()
    cache, tokens = start(one, 2, (9,))
    monkeypatch.setattr(type(one.network), "encode", None)
    state = one.begin(cache, [CanvasSpec(SETTINGS, 1)], commit=(tokens, np.array([C])))
    assert cache.lengths.tolist() == [9 + C]
    one.read(one.step(state))


def test_what_a_cache_is_owed_comes_first():
    one = model()
    cache, tokens = start(one, 3, (9,))
    state = one.begin(cache, [CanvasSpec(SETTINGS, 1)], commit=(tokens, np.array([C])))
    for misuse in (
        lambda: one.encode(tokens, cache),
        lambda: cache.select([0]),
        lambda: one.begin(cache, [CanvasSpec(SETTINGS, 1)]),
        lambda: one.inspect(cache, tokens),
    ):
        with pytest.raises(AssertionError, match="first step"):
            misuse()
    one.step(state)
    with pytest.raises(AssertionError, match="this step has been taken"):
        one.step(state)
    assert cache.select([0]).lengths.tolist() == [9 + C]


def test_a_refused_block_leaves_the_cache_as_it_was():
    one = model()
    cache, tokens = start(one, 5, (9,))
    wrong = CanvasSpec(SETTINGS, 1, masks=Masks(banned=(V,), banned_until=2))
    with pytest.raises(OptionError, match="banned"):
        one.begin(cache, [wrong], commit=(tokens, np.array([C])))
    assert cache.lengths.tolist() == [9] and not cache.owed


def test_no_two_tokens_go_to_one_slot():
    """Of those that are kept: the order in which a GPU writes is not defined."""
    one = model()
    for lengths in LENGTHS.values():
        cache, _ = start(one, 6, lengths)
        chunk = cache.chunk(3 * W, np.full(len(lengths), 3 * W - 1))
        for slots in (chunk.full_slots, chunk.ring_slots):
            for row in slots.tolist():
                kept = [slot for slot in row if slot]
                assert len(kept) == len({*kept}) >= W - 1 and min(kept) >= C


@pytest.mark.parametrize("full", [64, 70])
def test_a_full_buffer_grows_whole(full):
    one = model()
    rng = np.random.default_rng(full)
    tokens, canvas = rng.integers(0, V, (1, full + 20)), rng.integers(0, V, (1, C))
    grown = one.encode(tokens[:, full:], one.encode(tokens[:, :full]))
    found, expected = (one.inspect(cache, canvas)["logits"] for cache in (grown, one.encode(tokens)))
    np.testing.assert_allclose(found, expected, atol=EQUAL, rtol=0)


def test_a_block_without_a_step_reads_its_commit_at_once():
    one = model()
    cache, tokens = start(one, 4, (9,))
    given = Masks(clamp=np.arange(C, dtype=np.int32))
    view = one.read(one.begin(cache, [CanvasSpec(SETTINGS, 1, masks=given)], commit=(tokens, np.array([C]))))
    assert view.done.all()
    apart, _ = start(one, 4, (9,))
    one.encode(tokens, apart)
    np.testing.assert_allclose(
        one.inspect(cache, tokens)["logits"], one.inspect(apart, tokens)["logits"], atol=EQUAL, rtol=0
    )
