"""Peak memory: a few chunks, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.tensors import tensor_table
from tests.tiny import FULL, SLIDING, official_config

SHAPE = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 512, "moe_intermediate_size": 512}
LAYERS = [SLIDING, SLIDING, FULL]
EXPERTS = 48  # a bank of 100 MB in bfloat16
CHILD = """
import resource, sys
from convert.command import main
import rich.progress
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = main(sys.argv[1:])
print(status, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """470 MB, three layers."""
    folder = tmp_path_factory.mktemp("large")
    config = official_config(**SHAPE, num_experts=EXPERTS, num_hidden_layers=len(LAYERS), layer_types=LAYERS)
    config.save_pretrained(folder)
    table = tensor_table(ModelConfig.from_folder(folder))
    draw = np.random.default_rng(0)
    some = draw.standard_normal(1 << 20).astype(np.float32)
    tensors = {n: np.resize(some, row.shape).astype(ml_dtypes.bfloat16) for n, row in table.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("--recipe", "experts4"),
        ("--recipe", "bf16"),
        ("--recipe", "nvfp4"),
    ],
    ids=" ".join,
)
def test_a_few_chunks_are_in_memory(large: Path, options: tuple[str, ...], tmp_path: Path):
    """The limit is one bank of experts and one file; it stays below the bank, here 100 MB of 470."""
    # A process of its own, started by a small one: on Linux the peak of a parent is handed down.
    command = [sys.executable, "-c", CHILD, str(large), "--out", str(tmp_path / "out"), "--quiet", *options]
    starter = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    done = subprocess.run([sys.executable, "-c", starter, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, peak = map(int, done.stdout.split())
    size = (large / "model.safetensors").stat().st_size
    assert status == 0 and size > 450_000_000 and peak < 100_000_000
    parameters = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]
    assert parameters["total_parameters"] * 2 > 450_000_000
