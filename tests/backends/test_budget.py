"""The memory plan of the torch backend: exact where it claims to be, a bound elsewhere, and what it says of 26B."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cuda_backend
from cuda_backend import budget
from cuda_backend.kernels import choice
from cuda_backend.kernels.cards import CARDS
from mlx_diffgemma.backend import CanvasSpec, LoadOptions
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.formats import Checkpoint, open_checkpoint
from mlx_diffgemma.formats.encoding import Encoding, dense, grouped
from mlx_diffgemma.formats.stored import Stored
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.memory import MemoryPlan
from mlx_diffgemma.tensors import tensor_table
from tests.backends.live import Live
from tests.conftest import load_model
from tests.core.test_config import PUBLISHED
from tests.formats.foreign import foreign
from tests.formats.quantized import quantized
from tests.tiny import checkpoint

README = Path(__file__).parents[2] / "README.md"
CONFIG = ModelConfig.from_dict(read_json(PUBLISHED))
FP8, NVFP4 = Encoding("fp8", "bfloat16", 8), grouped("nvfp4")
FOUR = grouped("affine", bits=4, group_size=64)
QUANTIZED = ("attention", "mlp", "experts")
H100 = choice.Gpu("H100", 90, CARDS[90])
STEPS = GenerationConfig(max_denoising_steps=3, confidence_threshold=None)


def big(**encodings: Encoding) -> Checkpoint:
    """The 26B model on disk, but without the disk: encodings by role, the rest bfloat16."""

    def stored(row) -> Stored:
        encoding = encodings.get(row.role, dense()) if len(row.shape) > 1 else dense()
        return Stored(encoding, row.shape, (), lambda *_: pytest.fail("read"), "", encoding.quantized)

    table = tensor_table(CONFIG)
    tensors = {name: stored(row) for name, row in table.items()}
    return Checkpoint(Path(), "none", CONFIG, GenerationConfig(), table, tensors, ())


def on_gpu(monkeypatch, held: Checkpoint, kernels: str, batch: int = 1, tokens: int = 4096 + 1024) -> MemoryPlan:
    """A prompt of 4,096 tokens and an answer of 1,024, on an H100 that need not be there."""
    monkeypatch.setattr(choice, "gpu_of", lambda device, requested: H100)
    options = LoadOptions(kernels=kernels)
    return budget.plan(CONFIG, 0, held, device="cuda", options=options, batch=batch, tokens=tokens)


ALL_FP8 = dict.fromkeys(QUANTIZED, FP8)


@pytest.mark.parametrize(
    ("encodings", "batch", "limit"),
    [
        (ALL_FP8, 1, 30e9),
        (ALL_FP8 | {"experts": NVFP4}, 1, 19e9),
        (ALL_FP8 | {"experts": FOUR}, 1, 19e9),
        (ALL_FP8, 16, 80e9),
        ({}, 1, 80e9),
    ],
    ids=["FP8", "nvfp4 experts", "affine 4-bit experts", "FP8, 16 rows", "bfloat16"],
)
def test_26b_fits(encodings, batch, limit, monkeypatch, record):
    plan = on_gpu(monkeypatch, big(**encodings), "fused", batch)
    record(what="memory plan", line=plan.line("a GPU"))
    print(plan.line("a GPU"))
    assert plan.total < limit
    assert plan.parts["weights"] + plan.parts["embedding"] > 0.6 * plan.total / batch**0.5


def test_the_readme_has_these_sums(monkeypatch):
    text = README.read_text(encoding="utf-8")
    for encodings, batch in ((ALL_FP8, 1), (ALL_FP8 | {"experts": NVFP4}, 1), (ALL_FP8, 16)):
        total = on_gpu(monkeypatch, big(**encodings), "fused", batch).total
        assert f" {total / 1e9:.1f} GB" in text, f"{total / 1e9:.1f} GB"


def test_26b_in_plain_operations(monkeypatch):
    """Slow, but it must fit where it fits with kernels: what is unpacked is one bank of experts at a time."""
    plain, fused = (on_gpu(monkeypatch, big(**ALL_FP8), kernels) for kernels in ("ops", "fused"))
    assert plain.total < 32e9 and "graphs" not in plain.parts and "unpacking" not in fused.parts
    assert 1.0e9 < plain.parts["unpacking"] < 1.4e9
    blocks = Encoding("fp8", "bfloat16", 8, block=128)
    assert on_gpu(monkeypatch, big(**dict.fromkeys(QUANTIZED, blocks)), "fused").parts["unpacking"] > 1e9


def test_parts_grow_as_they_should(monkeypatch):
    held = big(**ALL_FP8)
    one, four = (on_gpu(monkeypatch, held, "fused", batch).parts for batch in (1, 4))
    assert four["cache"] == 4 * one["cache"] and four["weights"] == one["weights"]
    long = on_gpu(monkeypatch, held, "fused", tokens=131_072).parts["cache"]
    full = 2 * 5 * 2 * 512 * 2  # bytes per position of the five full layers
    assert long - one["cache"] == full * (131_072 - 8192)
    head = LoadOptions(kernels="fused", head="fp8")
    assert budget.plan(CONFIG, 0, held, device="cuda", options=head).parts["head"] == 262_144 * (2816 + 4)
    assert on_gpu(monkeypatch, held, "fused", tokens=10**9).tokens == CONFIG.text.max_position_embeddings


# ---- against models that are there


MLX_KINDS = ("affine4", "mixed", "all nvfp4+global", "all mxfp4")
FOREIGN = ("fp8-block", "ct-fp8", "modelopt-fp8", "ct-int4")


def folder_of(kind: str) -> Path:
    return quantized(kind) if kind in MLX_KINDS else foreign(kind) if kind in FOREIGN else checkpoint(seed=1)


@pytest.mark.parametrize("kind", ["dense", *MLX_KINDS, *FOREIGN])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_and_cache_are_exact(kind, dtype):
    """And ``describe`` has it."""
    opened, model = open_checkpoint(folder_of(kind)), load_model(folder_of(kind), "cpu", dtype)
    options = LoadOptions(dtype)
    rng = np.random.default_rng(1)
    for batch, tokens in ((1, 5), (3, 700), (2, 64)):
        plan = budget.plan(opened.config, 0, opened, device="cpu", options=options, batch=batch, tokens=tokens)
        assert plan.parts["weights"] + plan.parts["embedding"] == model.describe()["weight_bytes"]
        if kind == "dense":
            cache = model.encode(rng.integers(0, opened.config.text.vocab_size, (batch, tokens)))
            assert plan.parts["cache"] == cache.nbytes
    described = model.describe()["memory"]
    assert described["parts"]["weights"] == plan.parts["weights"]
    assert described["tokens"] == min(budget.TOKENS, opened.config.text.max_position_embeddings)


WIDE = (("vocab_size", 2**17),)


def test_weights_for_fp8_activations_are_exact():
    """Their scales become float32."""
    opened = open_checkpoint(foreign("ct-fp8"))
    described = cuda_backend.load(opened, device="cpu", activations="fp8").describe()
    parts = described["memory"]["parts"]
    assert parts["weights"] + parts["embedding"] == described["weight_bytes"]


@pytest.mark.parametrize(
    ("kind", "dtype", "batch", "tokens"),
    [
        ("tiny", "float32", 1, 600),
        ("tiny", "bfloat16", 3, 300),
        ("affine4", "bfloat16", 2, 300),
        ("wide", "bfloat16", 1, 100),
        ("wide", "float32", 4, 100),
    ],
)
def test_forwards_stay_within_the_plan(kind, dtype, batch, tokens, record):
    """In plain operations on a CPU; scores of the attention are within an operation, where nobody counts them."""
    folder = checkpoint(seed=1, shape=WIDE) if kind == "wide" else folder_of(kind)
    opened, model = open_checkpoint(folder), load_model(folder, "cpu", dtype)
    options = LoadOptions(dtype)
    parts = budget.plan(opened.config, 0, opened, device="cpu", options=options, batch=batch, tokens=tokens).parts
    with Live() as reading:
        cache = model.encode(np.random.default_rng(1).integers(0, 512, (batch, tokens)))
    state = model.step(model.begin(cache, [CanvasSpec(STEPS, row) for row in range(batch)]))
    with Live() as stepping:
        model.step(state)
    setting = budget.Setting(opened.config, torch.float32.itemsize // (1 + (dtype == "bfloat16")), batch, tokens, 512)
    rows = max(setting.step_rows, batch * min(tokens, 512))
    seen = parts["activations"] - budget.scores_bytes(setting, rows) + parts.get("unpacking", 0)
    record(what="memory", reading=reading.peak / seen, stepping=stepping.peak / (seen + parts["vocabulary"]))
    assert 0.3 * seen < reading.peak - cache.nbytes <= seen
    assert stepping.peak <= seen + parts["vocabulary"]
    if opened.config.text.vocab_size > 10_000:
        assert stepping.peak > 0.5 * parts["vocabulary"]
