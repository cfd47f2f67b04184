"""What a checkpoint will take in memory, judged from its config and its size on disk, for all that people load."""

from __future__ import annotations

import sys

import pytest

import mlx_diffgemma as m
from mlx_diffgemma import mlx_backend
from mlx_diffgemma.api import needed_bytes, unpacked_bytes
from mlx_diffgemma.backend import CHOICES
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import MemoryBudgetError
from mlx_diffgemma.formats import Checkpoint, open_checkpoint
from mlx_diffgemma.json_file import read_json
from tests.core.test_config import PUBLISHED
from tests.formats.foreign import foreign
from tests.formats.quantized import quantized

WEIGHTS = 51_647_562_456 // 2  # of the 26B model
TABLE = 262_144 * 2816
DENSE = 2 * WEIGHTS
QUANTIZED = {  # bytes on disk of what is published, from 4 to 8 bits
    "mxfp4": 15_830_000_000,
    "ModelOpt nvfp4": 18_818_050_776,
    "compressed-tensors FP8": 27_200_864_632,
    "affine 8-bit": 27_970_000_000,
}


def needed(stored: int, backend: str, dtype: str | None = None) -> float:
    return needed_bytes(ModelConfig.from_dict(read_json(PUBLISHED)), stored, CHOICES[backend], dtype)


@pytest.mark.parametrize("stored", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_quantized_weights_stay_packed(stored, platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    for dtype in (None, "bfloat16"):
        assert needed(stored, "mlx", dtype) == stored
        assert needed(stored, "cpu", dtype) == needed(stored, "cuda", dtype) == stored + 2 * TABLE
    assert needed(stored, "reference") == 4 * WEIGHTS


def test_dense_weights_are_as_wide_as_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    for backend in ("mlx", "cuda", "cpu"):
        assert needed(DENSE, backend) == needed(DENSE, backend, "bfloat16") == DENSE
        assert needed(DENSE, backend, "float32") == 2 * DENSE
    assert needed(DENSE, "reference") == 2 * DENSE
    monkeypatch.setattr(sys, "platform", "linux")
    assert needed(DENSE, "mlx") == 2 * DENSE, "without a GPU, MLX widens dense experts"


def test_text_only_files_are_dense_too(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    text = DENSE - 1_140_000_000
    assert needed(text, "mlx") == text and needed(text, "mlx", "float32") == 2 * text


def test_what_has_no_product_is_counted_unpacked():
    """Known once the files are open: FP8 in blocks is packed in torch and dense in MLX; the rest stays as it is."""
    blocks, eight = open_checkpoint(foreign("fp8-block")), open_checkpoint(quantized("affine8"))
    packed = sum(stored.encoding.block > 0 for stored in blocks.tensors.values())
    assert packed > 50
    for backend in ("mlx", "cpu"):
        assert unpacked_bytes(eight, CHOICES[backend]) == eight.nbytes
    assert unpacked_bytes(blocks, CHOICES["cpu"]) == blocks.nbytes
    dense = sum(2 * row.size for row in blocks.table.values())
    assert unpacked_bytes(blocks, CHOICES["mlx"]) == dense > 1.5 * blocks.nbytes


def test_what_would_not_fit_unpacked_is_refused_before_a_weight_is_read(monkeypatch):
    folder = foreign("fp8-block")
    stored = open_checkpoint(folder).nbytes
    monkeypatch.setattr(Checkpoint, "read", None)
    monkeypatch.setattr(mlx_backend, "memory", lambda device: int(1.5 * stored))
    with pytest.raises(MemoryBudgetError, match="'mlx'"):
        m.load(folder, backend="mlx")
