"""Packed weights in torch: the very numbers of NumPy, logits of the reference, and nothing unpacked that stays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import cuda_backend
from cuda_backend import linear, weights
from cuda_backend.linear import Dense, Quantized, Stack
from mlx_diffgemma import reference
from mlx_diffgemma.backend import CanvasSpec
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.formats import Checkpoint, open_checkpoint
from mlx_diffgemma.formats.checkpoint import EMBEDDING
from mlx_diffgemma.formats.encoding import DTYPES, Encoded, Encoding, dense, encode, grouped
from mlx_diffgemma.formats.stored import Stored
from mlx_diffgemma.reference.network import Network
from mlx_diffgemma.tensors import VISION
from tests.formats.quantized import EVERYWHERE, KINDS, quantized, source
from tests.tiny import TEXT

V, W = TEXT["vocab_size"], TEXT["sliding_window"]
CLOSE = 1e-3  # the order of fp32 sums, amplified by a random network to 4e-4; logits reach 10
ROUTER_GAP = 1e-4

AFFINE = [grouped("affine", bits=b, group_size=64, dtype=d) for b in (2, 3, 4, 5, 6, 8) for d in DTYPES]
AFFINE += [grouped("affine", bits=b, group_size=g) for b in (3, 4) for g in (32, 128)]
NVFP4 = dataclasses.replace(grouped("nvfp4"), global_scale=True)
CHANNEL = Encoding("fp8")
BLOCK, SMALL = Encoding("fp8", "float32", block=128), Encoding("fp8", block=32)
PACKED = [*AFFINE, grouped("mxfp4"), grouped("mxfp8"), grouped("nvfp4"), NVFP4, CHANNEL, BLOCK, SMALL]
SHAPES = [(1, 128), (37, 384), (300, 128), (3, 20, 128), (2, 130, 256)]
ODD = [(5, 7), (130, 300), (3, 129, 131)]  # FP8 has no groups
CASES = [(e, shape) for e in PACKED for shape in SHAPES + (ODD if e.mode == "fp8" else [])]
TWO_STEPS = GenerationConfig(max_denoising_steps=3, confidence_threshold=1e-9)


# ---- the numbers


def on_device(encoded: Encoded) -> Dense | Quantized:
    """As ``load`` puts it there."""
    parts = {name: weights.host_copy([part]) for name, part in encoded.parts.items()}
    if not encoded.encoding.quantized:
        return Dense(parts["weight"])
    return Quantized(encoded.encoding, encoded.shape, parts)


def any_bits(encoding: Encoding, shape: tuple[int, ...]) -> Encoded:
    """Parts of random bits: every code and scale there is, infinite, subnormal and not a number among them."""
    rng, parts = np.random.default_rng(len(shape)), {}
    for name, (size, dtype) in encoding.parts(shape).items():
        bits = rng.integers(0, 256, (*size[:-1], size[-1] * dtype.itemsize), np.uint8)
        parts[name] = bits.view(dtype)
    return Encoded(encoding, shape, parts)


def assert_same_bits(found: torch.Tensor, expected: np.ndarray) -> None:
    """Signs of zeros included; nan is nan."""
    values = found.numpy()
    assert values.dtype == expected.dtype == np.float32 and values.shape == expected.shape
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(values), ~number)
    np.testing.assert_array_equal(values.view(np.uint32)[number], expected.view(np.uint32)[number])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinite scales
@pytest.mark.parametrize(("encoding", "shape"), CASES, ids=str)
def test_dequantizing_gives_the_very_numbers_of_numpy(encoding, shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[..., -1, :] = 0
    for encoded in (encode(values, encoding), any_bits(encoding, shape)):
        expected, weight = encoded.decode(), on_device(encoded)
        assert weight.shape == shape and weight.nbytes == encoding.nbytes(shape)
        assert_same_bits(weight.dense(torch.float32), expected)
        once = torch.from_numpy(expected).bfloat16()
        assert torch.equal(weight.dense(torch.bfloat16).nan_to_num(7), once.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_weights_are_what_is_stored(dtype):
    encoded = any_bits(dense(dtype), (3, 8, 4))
    weight = on_device(encoded)
    assert weight.nbytes == encoded.encoding.nbytes(encoded.shape)
    assert_same_bits(weight.dense(torch.float32), encoded.decode().astype(np.float32))


@pytest.mark.parametrize("encoding", PACKED, ids=str)
@pytest.mark.parametrize("piece", [1, 128 * 200])
def test_pieces_change_nothing(monkeypatch, encoding, piece):
    for shape in ((300, 128), (5, 130, 128)):
        weight = on_device(encode(np.random.default_rng(1).normal(size=shape).astype(np.float32), encoding))
        whole = {dtype: weight.dense(dtype) for dtype in (torch.float32, torch.bfloat16)}
        with monkeypatch.context() as patch:
            patch.setattr(linear, "PIECE", piece)
            assert all(torch.equal(weight.dense(dtype), values) for dtype, values in whole.items())


@pytest.mark.parametrize("encoding", PACKED, ids=str)
def test_no_value_is_read_by_the_host(monkeypatch, encoding):
    """Tensors without data suffice, so the same operations can be captured in a CUDA graph."""
    monkeypatch.setattr(linear, "PIECE", 20_000)
    for shape in ((300, 128), (5, 130, 128)):
        weight = on_device(any_bits(encoding, shape))
        empty = dataclasses.replace(weight, parts={name: part.to("meta") for name, part in weight.parts.items()})
        values = empty.dense(torch.bfloat16)
        assert values.is_meta and values.shape == shape and values.dtype == torch.bfloat16


# ---- whole models


def recoded(checkpoint: Checkpoint, choose: Callable[[str], Encoding | None]) -> Checkpoint:
    """``checkpoint`` with the matrices for which there is a choice encoded so, in memory."""
    tensors = dict(checkpoint.tensors)
    for name, row in checkpoint.table.items():
        encoding = choose(name) if row.role not in VISION and len(row.shape) > 1 else None
        if encoding:
            values = checkpoint.read(name)

            def read(start: int, stop: int, values=values, encoding=encoding) -> Encoded:
                return encode(values[start:stop], encoding)

            tensors[name] = Stored(encoding, row.shape, (), read, quantized=encoding.quantized)
    return dataclasses.replace(checkpoint, tensors=tensors)


def unlike(name: str) -> Encoding | None:
    """Neighbours in one product that differ in every way."""
    kinds = {
        "q_proj": CHANNEL,
        "k_proj": None,
        "gate_proj": grouped("mxfp4"),
        "up_proj": grouped("affine", bits=5, group_size=64),
    }
    return kinds.get(name.split(".")[-2], grouped("mxfp8") if "experts" in name else None)


IN_MEMORY: dict[str, Callable[[str], Encoding | None]] = {
    "fp8 per channel": lambda name: None if name == EMBEDDING else CHANNEL,
    "fp8 block 128": lambda name: None if name == EMBEDDING else BLOCK,
    "fp8 block 32 everywhere": lambda name: SMALL,
    "unlike neighbours": unlike,
    "float16": lambda name: dense("float16"),
    "two floats": lambda name: dense("float16" if "k_proj" in name or "up_proj" in name else "bfloat16"),
}
ALL = (*KINDS, *EVERYWHERE, *IN_MEMORY)


@functools.cache
def checkpoint_of(kind: str) -> Checkpoint:
    if kind in IN_MEMORY:
        return recoded(open_checkpoint(source()), IN_MEMORY[kind])
    return open_checkpoint(quantized(kind))


@functools.cache
def torch_model(kind: str, dtype: str | None = "float32"):
    return cuda_backend.load(checkpoint_of(kind), device="cpu", dtype=dtype)


@contextmanager
def router_gaps() -> Iterator[list[float]]:
    """How close each routing of the reference came to another choice."""
    gaps, route = list[float](), Network.route

    def watching(self, h, layer):
        found = route(self, h, layer)
        ranked, top = np.sort(found[2], -1)[:, ::-1], self.config.top_k_experts
        gaps.append(float((ranked[:, top - 1] - ranked[:, top]).min()))
        return found

    with mock.patch.object(Network, "route", watching):
        yield gaps


@dataclasses.dataclass(frozen=True)
class Question:
    """One prompt, a committed block, a canvas, and perhaps the logits of a step before."""

    tokens: np.ndarray
    block: np.ndarray
    canvas: np.ndarray
    previous: np.ndarray | None

    def answer(self, model) -> np.ndarray:
        cache = model.encode(self.block, model.encode(self.tokens))
        return model.inspect(cache, self.canvas, previous=self.previous)["logits"]


def question(seed: int, conditioned: bool) -> Question:
    rng = np.random.default_rng(seed)
    tokens, block, canvas = (rng.integers(0, V, (1, n)) for n in (W + 1, 16, 16))
    previous = rng.normal(size=(1, 16, V)).astype(np.float32) * 4
    return Question(tokens, block, canvas, previous if conditioned else None)


def decided(kind: str, conditioned: bool) -> tuple[Question, np.ndarray]:
    """A question no router was undecided about, and the reference's logits."""
    judge = reference.load(checkpoint_of(kind))
    for seed in range(2000):
        asked = question(seed, conditioned)
        with router_gaps() as gaps:
            logits = asked.answer(judge)
        if min(gaps) > ROUTER_GAP:
            return asked, logits
    raise AssertionError(f"no decided question for {kind} among 2000 seeds")


@pytest.mark.parametrize("conditioned", [False, True], ids=["first", "conditioned"])
@pytest.mark.parametrize("kind", ALL)
def test_logits_equal_the_reference(kind, conditioned, record):
    asked, expected = decided(kind, conditioned)
    difference = float(np.abs(asked.answer(torch_model(kind)) - expected).max())
    record(format=kind, model="cpu", difference=difference)
    assert np.abs(expected).max() > 5, "the logits are too small to mean anything"
    assert difference <= CLOSE


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The same numbers as dense float32."""
    return recoded(checkpoint, lambda name: dense("float32"))


@pytest.mark.parametrize("kind", ALL)
def test_bfloat16_equals_the_dequantized_checkpoint_bit_for_bit(kind):
    plain = cuda_backend.load(dequantized(checkpoint_of(kind)), device="cpu", dtype="bfloat16")
    for conditioned in (False, True):
        asked = question(5, conditioned)
        np.testing.assert_array_equal(asked.answer(torch_model(kind, "bfloat16")), asked.answer(plain))


@pytest.mark.parametrize("kind", ALL)
def test_matrices_stay_packed(kind):
    """In memory is what is on disk, but for the embedding, unpacked, and norms, which are float32."""
    checkpoint, model = checkpoint_of(kind), torch_model(kind, "bfloat16")
    expected = 0
    for name, row in checkpoint.table.items():
        if row.role in VISION:
            continue
        stored = checkpoint.tensors[name]
        if stored.encoding.quantized and name != EMBEDDING:
            expected += stored.encoding.nbytes(row.shape)
        else:
            expected += row.size * (4 if row.role == "norm" else 2)
    assert model.describe()["weight_bytes"] == expected


def test_pieces_of_one_format_lie_in_one_matrix():
    def shapes(kind: str):
        layer = torch_model(kind).network.weights.layers[0]
        return type(layer.self_attn.qkv_proj), type(layer.mlp.gate_up_proj)

    assert shapes("all mxfp4") == shapes("fp8 block 32 everywhere") == (Quantized, Quantized)
    assert shapes("float16") == shapes("two floats") == (Dense, Dense)
    assert shapes("unlike neighbours") == (Stack, Stack)
    assert shapes("fp8 block 128") == (Stack, Stack)  # 64 and 192 rows: blocks end inside a piece


# ---- a step


def steps(model) -> list[np.ndarray]:
    """Everything that two steps show."""
    state = model.begin(model.encode(np.arange(20)[None]), [CanvasSpec(TWO_STEPS, 7)])
    views = []
    for _ in range(2):
        state = model.step(state)
        views += [getattr(model.read(state), f.name) for f in dataclasses.fields(model.read(state))]
    return views


@pytest.mark.parametrize("kind", ["mixed", "nvfp4+global", "fp8 per channel"])
def test_one_matrix_is_unpacked_at_a_time_and_none_survives(monkeypatch, kind):
    model, unpack = torch_model(kind, "bfloat16"), Quantized.dense
    made: list[StorageWeakRef] = []

    def watching(self: Quantized, dtype: torch.dtype) -> torch.Tensor:
        assert all(storage.expired() for storage in made), "an unpacked matrix is still there"
        values = unpack(self, dtype)
        made.append(StorageWeakRef(values.untyped_storage()))
        return values

    monkeypatch.setattr(Quantized, "dense", watching)
    state = model.begin(model.encode(np.arange(20)[None]), [CanvasSpec(TWO_STEPS, 7)])
    del made[:-1]
    state = model.step(state)
    assert len(made) > 6 * 4 and all(storage.expired() for storage in made)
    assert not model.read(state).done.all()


def test_host_copies_are_let_go_one_by_one(monkeypatch):
    copies, copy = list[StorageWeakRef](), weights.host_copy

    def watching(arrays):
        assert all(storage.expired() for storage in copies)
        host = copy(arrays)
        copies.append(StorageWeakRef(host.untyped_storage()))
        return host

    monkeypatch.setattr(weights, "host_copy", watching)
    held = weights.read_weights(checkpoint_of("affine4"), torch.device("meta"), torch.bfloat16)
    assert len(copies) > 100 and held.embed_tokens.is_meta


@pytest.mark.parametrize("kind", ["mixed", "mxfp4", "nvfp4+global", "fp8 block 128"])
def test_runs_are_bit_identical(kind):
    again = cuda_backend.load(checkpoint_of(kind), device="cpu", dtype="bfloat16")
    for one, other in zip(steps(torch_model(kind, "bfloat16")), steps(again), strict=True):
        np.testing.assert_array_equal(one, other)


# ---- what is said


def test_formats_are_described():
    described = torch_model("mixed", "bfloat16").describe()
    counts = described["formats"]
    assert counts["affine 4-bit g64"] == counts["affine 6-bit g64"] == 6  # banks
    assert counts["bfloat16 from affine 8-bit g64"] == 1 and counts["affine 8-bit g64"] == 41
    checkpoint = checkpoint_of("mixed")
    assert sum(counts.values()) == sum(row.role not in VISION for row in checkpoint.table.values())
    assert described["approximations"] == [
        "dequantized weights (affine 4-bit g64, affine 6-bit g64, affine 8-bit g64) are rounded to bfloat16"
    ]
    assert any("embedding (affine 8-bit g64)" in note for note in described["notes"])
    assert torch_model("mixed").describe()["approximations"] == []


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp8", "nvfp4"])
def test_short_codes_lose_nothing_in_bfloat16(kind):
    checkpoint, model = checkpoint_of(f"all {kind}"), torch_model(f"all {kind}", "bfloat16")
    assert model.describe()["approximations"] == []
    for name, stored in checkpoint.tensors.items():
        if stored.encoding.quantized:
            values = torch.from_numpy(checkpoint.read(name))
            assert torch.equal(values.bfloat16().float(), values)


def test_float16_is_computed_in_bfloat16_unless_asked():
    half, exact = torch_model("float16", None).describe(), torch_model("float16", "float32").describe()
    assert (half["dtype"], exact["dtype"]) == ("bfloat16", "float32")
    assert "float16 weights are rounded to bfloat16; dtype='float32' keeps them" in half["notes"]
    assert not any("rounded" in note for note in exact["notes"])
    assert half["approximations"] == exact["approximations"] == []


def test_float16_scales_are_used_as_they_are():
    checkpoint = open_checkpoint(quantized("affine4", dtype="float16"))
    asked, model = question(0, True), cuda_backend.load(checkpoint, device="cpu", dtype="float32")
    np.testing.assert_allclose(asked.answer(model), asked.answer(reference.load(checkpoint)), atol=CLOSE, rtol=0)
    assert cuda_backend.load(checkpoint, device="cpu").describe()["dtype"] == "bfloat16"
