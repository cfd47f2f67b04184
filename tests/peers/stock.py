"""Stock mlx-vlm 0.7.10, as ``make bench`` and ``make test`` install it beside our own environment."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-bench" / "bin" / "python"


class Peer:
    """One process, started at the first request and kept."""

    def __init__(self) -> None:
        assert PYTHON.is_file(), f"{PYTHON} is missing: make .venv-bench/.ready"
        self.process = subprocess.Popen(
            [PYTHON, ROOT / "tests" / "peers" / "worker.py"],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, do: str, **request: Any) -> None:
        """Raises ``RuntimeError`` with the peer's own words."""
        print(json.dumps({"do": do} | request, default=str), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])

    def logits(self, folder: Path, prompt: list[int], canvas: np.ndarray, previous: np.ndarray | None = None):
        """float32 [C, V] from mlx-vlm; ``canvas`` int [C], ``previous`` float32 [C, V]."""
        with tempfile.TemporaryDirectory() as scratch:
            out, soft = Path(scratch) / "out.npy", None
            if previous is not None:
                soft = Path(scratch) / "previous.npy"
                np.save(soft, previous)
            self.ask("logits", folder=folder, prompt=prompt, canvas=canvas.tolist(), previous=soft, out=out)
            return np.load(out)

    def convert(self, folder: Path, out: Path, mode: str = "affine", bits: int = 0, group_size: int = 64) -> Path:
        self.ask("convert", folder=folder, out=out, mode=mode, bits=bits, group_size=group_size)
        return out


@functools.cache
def peer() -> Peer:
    return Peer()
