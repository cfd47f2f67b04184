"""Importing the library is cheap: no framework is loaded, and it takes a moment."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("mlx", "torch", "triton", "transformers")
SECONDS = 0.3  # of processor time, which does not depend on what else the machine is doing


@pytest.mark.parametrize("module", ["mlx_diffgemma", "convert.command"])
def test_importing_loads_no_framework(module: str):
    assert run(f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])") == ""


def test_importing_is_quick():
    code = "import time; start = time.process_time(); import mlx_diffgemma; print(time.process_time() - start)"
    assert min(float(run(code)) for _ in range(3)) < SECONDS


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
