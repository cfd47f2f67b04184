"""Shared fixtures: the models behind the seam, loaded once, and the record of what was compared."""

from __future__ import annotations

import os

# Triton reads it where kernels are defined: without a GPU they are interpreted. ``make gpu`` sets it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_diffgemma.backend import choose, implementation
from mlx_diffgemma.formats import open_checkpoint
from tests.proofs import PROOFS, picked

BACKENDS = ("reference", "mlx", "cpu")
REPORT = Path(__file__).parents[1] / "build" / "parity"


def pytest_sessionstart(session) -> None:
    """The record is of one run: the controlling process clears what an earlier one left."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(REPORT, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and report.passed:
        PROOFS.passed(item.path)
    return report


def pytest_sessionfinish(session) -> None:
    """On a GPU: the rows of ``proven.json``, unless tests were picked."""
    if not picked(session.config):
        PROOFS.finish(item.path for item in session.items)


def pytest_terminal_summary(terminalreporter) -> None:
    for title, rows in (("proven", PROOFS.written), ("metal-vm: shown, and no proof for any chip", PROOFS.virtual)):
        if rows:
            terminalreporter.section(title)
            for row in rows:
                terminalreporter.write_line(json.dumps(row))


@functools.lru_cache(maxsize=12)
def load_model(folder: Path, backend: str, dtype: str | None = None):
    """A model by folder and backend. A missing backend is a failure, never a skip."""
    choice = choose(backend)
    return implementation(choice).load(open_checkpoint(folder), device=choice.device, dtype=dtype)


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(params=("mlx", "cpu"))
def fast_backend(request) -> str:
    return request.param


@pytest.fixture
def record(request):
    """Write a figure beside the test's name; ``tests/parity/table.py`` prints them all."""

    def write(**figures) -> None:
        REPORT.mkdir(parents=True, exist_ok=True)
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in figures.items()}
        with (REPORT / f"{worker}.jsonl").open("a") as file:
            file.write(json.dumps({"test": request.node.name} | plain) + "\n")

    return write
