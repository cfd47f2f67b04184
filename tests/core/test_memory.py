"""What a checkpoint will take in memory, judged from its config and its size on disk, for all that people load."""

from __future__ import annotations

import pytest

import mlx_diffgemma as m
from mlx_diffgemma import mlx_backend
from mlx_diffgemma.backend import CHOICES, LoadOptions, implementation
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import MemoryBudgetError
from mlx_diffgemma.formats import Checkpoint, open_checkpoint
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.memory import MemoryPlan
from mlx_diffgemma.mlx_backend import budget
from tests.conftest import load_model
from tests.core.test_config import PUBLISHED
from tests.formats.foreign import foreign
from tests.formats.quantized import quantized

WEIGHTS = 51_647_562_456 // 2  # of the 26B model
VISION = 2 * 570_000_000  # bytes of its vision tower, about
TABLE = 262_144 * 2816
DENSE = 2 * WEIGHTS
QUANTIZED = {  # bytes on disk of what is published, from 4 to 8 bits
    "mxfp4": 15_830_000_000,
    "ModelOpt nvfp4": 18_818_050_776,
    "compressed-tensors FP8": 27_200_864_632,
    "affine 8-bit": 27_970_000_000,
}
CONFIG = ModelConfig.from_dict(read_json(PUBLISHED))


def weights(stored: int, backend: str, dtype: str | None = None) -> int:
    """Of the 26B model, before it is downloaded."""
    choice = CHOICES[backend]
    device = "cpu" if backend == "cuda" else choice.device  # the weights are the same
    plan = implementation(choice).plan(CONFIG, stored, None, device=device, options=LoadOptions(dtype))
    return plan.parts["weights"] + plan.parts.get("embedding", 0)


def gpu(monkeypatch, there: bool) -> None:
    monkeypatch.setattr(budget, "on_cpu", lambda: not there)


@pytest.mark.parametrize("stored", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("metal", [True, False])
def test_quantized_weights_stay_packed(stored, metal, monkeypatch):
    gpu(monkeypatch, metal)
    for dtype in (None, "bfloat16"):
        assert weights(stored, "mlx", dtype) == stored
        assert weights(stored, "cpu", dtype) == weights(stored, "cuda", dtype) == stored + 2 * TABLE
    assert 4 * WEIGHTS - 2 * VISION - 10**8 < weights(stored, "reference") < 4 * WEIGHTS


def test_dense_weights_are_as_wide_as_they_are_asked_for(monkeypatch):
    gpu(monkeypatch, True)
    for backend, tower in (("mlx", 0), ("cuda", VISION), ("cpu", VISION)):
        found = weights(DENSE, backend)
        assert found == weights(DENSE, backend, "bfloat16") == pytest.approx(DENSE - tower, rel=0.002)
        assert weights(DENSE, backend, "float32") == 2 * found
    gpu(monkeypatch, False)
    assert weights(DENSE, "mlx") == 2 * DENSE, "without a GPU, MLX widens dense experts"


def test_text_only_files_are_dense_too(monkeypatch):
    gpu(monkeypatch, True)
    text = DENSE - VISION
    assert weights(text, "mlx") == text and weights(text, "mlx", "float32") == 2 * text


def held(checkpoint: Checkpoint, backend: str, dtype: str | None = None) -> int:
    """Bytes of weights once the files are open."""
    choice, options = CHOICES[backend], LoadOptions(dtype)
    code = implementation(choice)
    plan = code.plan(checkpoint.config, checkpoint.nbytes, checkpoint, device=choice.device, options=options)
    return plan.parts["weights"] + plan.parts.get("embedding", 0)


def test_what_has_no_product_is_counted_unpacked():
    """Known once the files are open: FP8 in blocks is packed in torch and dense in MLX; the rest stays as it is."""
    blocks, eight = open_checkpoint(foreign("fp8-block")), open_checkpoint(quantized("affine8"))
    packed = sum(stored.encoding.block > 0 for stored in blocks.tensors.values())
    assert packed > 50
    assert held(eight, "cpu") < 1.2 * eight.nbytes and held(eight, "mlx") < 1.1 * eight.nbytes
    assert held(blocks, "mlx") > 1.5 * held(blocks, "cpu")


@pytest.mark.parametrize("backend", ["mlx", "cpu"])
def test_the_dtype_that_is_asked_for_is_what_counts(backend, monkeypatch):
    """Not the config's: a bfloat16 checkpoint in float32 takes twice as much."""
    gpu(monkeypatch, True)
    demo = open_checkpoint(m.hub.DEMO)
    assert held(demo, backend) == held(demo, backend, "bfloat16") < 0.51 * held(demo, backend, "float32")


@pytest.mark.parametrize("kind", ["affine4", "mxfp4", "mixed"])
def test_mlx_holds_what_was_planned(kind):
    model, checkpoint = load_model(quantized(kind), "mlx"), open_checkpoint(quantized(kind))
    assert held(checkpoint, "mlx") == pytest.approx(model.describe()["weight_bytes"], rel=0.02)


def test_what_would_not_fit_unpacked_is_refused_before_a_weight_is_read(monkeypatch):
    folder = foreign("fp8-block")
    stored = open_checkpoint(folder).nbytes
    monkeypatch.setattr(Checkpoint, "read", None)
    monkeypatch.setattr(mlx_backend, "memory", lambda device: int(1.5 * stored))
    with pytest.raises(MemoryBudgetError, match="'mlx'") as error:
        m.load(folder, backend="mlx")
    assert "are free" in str(error.value) and "\n" not in str(error.value)


def test_a_plan_in_one_line():
    plan = MemoryPlan({"cache": 600_000_000, "weights": 25_200_000_000, "graphs": 1_000_000}, tokens=4096)
    assert plan.line("NVIDIA H100") == "25.8 GB on NVIDIA H100: weights 25.2, cache 0.6 at 4,096 tokens"
    assert MemoryPlan.of(plan.describe()) == plan
    several = MemoryPlan({"cache": 9_600_000_000}, tokens=4096, batch=16)
    assert several.line("a GPU") == "9.6 GB on a GPU: cache 9.6 at 4,096 tokens in 16 rows"
    assert MemoryPlan({"weights": 3_000_000}).line("cpu") == "3.0 MB on cpu: weights 3.0"
