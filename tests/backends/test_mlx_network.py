"""The MLX forward pass against the NumPy reference, on tiny random weights."""

from __future__ import annotations

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.errors import BackendError, OptionError
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.mlx_backend import load, model, vocabulary, weights
from tests import tiny
from tests.conftest import load_model

W, C, V = 16, 16, 512
BOUND = 1e-3  # logits of about 10 through six layers of float32 in another order of sums
EVERYTHING = ("logits", "hidden", "router", "router_probabilities")


@pytest.fixture(scope="module")
def both():
    folder = tiny.checkpoint()
    return load_model(folder, "reference"), load_model(folder, "mlx", "float32")


def draw_ids(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape)


def agree(found: dict, expected: dict) -> None:
    np.testing.assert_array_equal(found["router"], expected["router"])
    for name in ("logits", "hidden", "router_probabilities"):
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected[name], atol=BOUND, rtol=0, err_msg=name)
    np.testing.assert_array_equal(found["logits"].argmax(-1), expected["logits"].argmax(-1))


@pytest.mark.parametrize("length", [1, 5, W - 1, W, W + 1, 5 * W // 2])
def test_prompt_lengths(both, length):
    """Around the window, first and second step, then behind a committed canvas; the scores of the prompt too."""
    reference, mlx = both
    tokens, canvas = draw_ids(length, 1, length), draw_ids(length + 100, 1, C)
    old, new = reference.encode(tokens, score=True), mlx.encode(tokens, score=True)
    np.testing.assert_allclose(new.scores, old.scores, atol=BOUND, rtol=0)
    for _ in range(2):
        first = reference.inspect(old, canvas, want=EVERYTHING)
        agree(mlx.inspect(new, canvas, want=EVERYTHING), first)
        shaped = first["logits"] / np.float32(0.7)
        agree(
            mlx.inspect(new, canvas, previous=shaped, want=EVERYTHING),
            reference.inspect(old, canvas, previous=shaped, want=EVERYTHING),
        )
        reference.encode(canvas, old)
        assert mlx.encode(canvas, new) is new and new.lengths.tolist() == old.lengths.tolist()


def test_ragged_rows_equal_single_rows(both):
    """Rows of other lengths, one untouched by the second call, two blocks deep."""
    reference, mlx = both
    first, second = np.array([40, 5, 16]), np.array([16, 0, 9])
    tokens, more, canvas = draw_ids(1, 3, 40), draw_ids(2, 3, 16), draw_ids(3, 3, C)
    batch = mlx.encode(tokens, lengths=first, score=True)
    assert np.isnan(batch.scores[1, 5:]).all() and np.isnan(batch.scores[:, 0]).all()
    mlx.encode(more, batch, lengths=second)
    assert batch.lengths.tolist() == [56, 5, 25]
    found = mlx.inspect(batch, canvas, want=EVERYTHING)
    for row in range(3):
        alone = reference.encode(tokens[row : row + 1, : first[row]])
        reference.encode(more[row : row + 1], alone, lengths=second[row : row + 1])
        expected = reference.inspect(alone, canvas[row : row + 1], want=EVERYTHING)
        agree({name: value[row : row + 1] for name, value in found.items()}, expected)


@pytest.mark.parametrize("chunk", [1, 7, W])
def test_chunks_equal_one_pass(both, chunk, monkeypatch):
    _, mlx = both
    tokens, canvas, lengths = draw_ids(4, 2, 43), draw_ids(5, 2, C), np.array([43, 20])
    whole = mlx.encode(tokens, lengths=lengths, score=True)
    monkeypatch.setattr(model, "CHUNK", chunk)
    parts = mlx.encode(tokens, lengths=lengths, score=True)
    np.testing.assert_allclose(parts.scores, whole.scores, atol=BOUND)
    agree(mlx.inspect(parts, canvas, want=EVERYTHING), mlx.inspect(whole, canvas, want=EVERYTHING))


def test_log_probabilities_in_slices(both, monkeypatch):
    _, mlx = both
    tokens = draw_ids(6, 1, 21)
    whole = mlx.encode(tokens, score=True).scores
    monkeypatch.setattr(vocabulary, "SLICE_ELEMENTS", 3 * V)
    np.testing.assert_allclose(mlx.encode(tokens, score=True).scores, whole, atol=1e-5)


def test_bfloat16_runs_and_says_what_is_wider(both):
    reference, _ = both
    mlx = load_model(tiny.checkpoint(), "mlx", "bfloat16")
    shown = mlx.describe()
    assert (shown["backend"], shown["dtype"], shown["kernels"]["fused"]) == ("mlx", "bfloat16", [])
    assert mlx.network.table.dtype == mx.bfloat16 and float(mlx.network.scale) == 8.0
    if mx.default_device() == mx.Device(mx.cpu):
        assert any("experts" in note for note in shown["notes"])
    tokens, canvas = draw_ids(7, 1, 20), draw_ids(8, 1, C)
    found = mlx.inspect(mlx.encode(tokens), canvas)["logits"]
    expected = reference.inspect(reference.encode(tokens), canvas)["logits"]
    correlation = np.corrcoef(found.ravel(), expected.ravel())[0, 1]
    assert correlation > 0.8, correlation  # random routers: rounding alone sends a quarter of the tokens elsewhere


def test_norm_rounds_once():
    """In bfloat16 the product with the weight is rounded, not its factors."""
    mlx = load_model(tiny.checkpoint(), "mlx", "bfloat16")
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(ml_dtypes.bfloat16)
    name = "model.decoder.norm"
    weight, wide = np.array(mlx.network.weights[f"{name}.weight"]), x.astype(np.float32)
    exact = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(1e-6)) * weight
    found = np.array(mlx.network.norm(weights.to_mlx(x), name).astype(mx.float32))
    differing = (found != exact.astype(ml_dtypes.bfloat16).astype(np.float32)).mean()
    assert differing < 0.01, differing  # only where the sum's order crosses a rounding boundary


def test_bfloat16_bits_survive():
    bits = np.arange(0, 0x7F80, 13, dtype=np.uint16)
    np.testing.assert_array_equal(np.array(weights.to_mlx(bits.view(ml_dtypes.bfloat16)).view(mx.uint16)), bits)


def test_refusals():
    checkpoint = open_checkpoint(tiny.checkpoint())
    with pytest.raises(OptionError, match="float8"):
        load(checkpoint, device="auto", dtype="float8")
    with pytest.raises(BackendError, match="gpu0"):
        load(checkpoint, device="gpu0")
