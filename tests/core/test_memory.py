"""What a checkpoint will take in memory, judged from its config and its size on disk, for all that people load."""

from __future__ import annotations

import sys

import pytest

from mlx_diffgemma.api import needed_bytes
from mlx_diffgemma.backend import CHOICES
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.json_file import read_json
from tests.core.test_config import PUBLISHED

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
