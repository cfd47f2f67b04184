"""Every kernel compiles for every card of the table, at the shapes of the 26B model, within the card's shared memory.

What this proves: types, shapes of products, machine code, shared memory. What it does not: that the code runs, or how
fast. Compiling happens in processes of their own, for this one interprets kernels.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cuda_backend.kernels.cards import CARDS

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removesuffix("_launches") for path in HERE.glob("*_launches.py"))
KERNELS = {path.stem for path in (HERE.parents[1] / "cuda_backend" / "kernels").glob("*.py")}


def cases() -> Iterator[tuple[str, int]]:
    for name in NAMES:
        fp8_only = importlib.import_module(f"tests.kernels.{name}_launches").FP8_ONLY
        yield from ((name, sm) for sm, card in CARDS.items() if card.fp8 or not fp8_only)


@pytest.mark.parametrize(("name", "sm"), list(cases()))
def test_kernels_compile_within_shared_memory(name, sm, record):
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", name, str(sm)],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert found, "nothing would be launched"
    for one in found:
        assert 0 <= one["shared"] <= CARDS[sm].shared, one
        assert one["cubin"] > 0
    record(what="compiled", file=name, sm=sm, kernels=len(found), shared=max(one["shared"] for one in found))


def test_every_file_with_a_kernel_is_compiled():
    with_kernels = {
        name
        for name in KERNELS
        if name not in ("language", "unpack")  # which launch nothing
        and "@triton.jit" in (HERE.parents[1] / "cuda_backend" / "kernels" / f"{name}.py").read_text()
    }
    assert with_kernels == set(NAMES)
