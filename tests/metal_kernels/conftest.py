"""The same tests on a CPU and, with ``-m metal``, on a Mac's GPU."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["cpu-emulated", pytest.param("metal", marks=pytest.mark.metal)])
def place(request) -> str:
    return request.param


@pytest.fixture
def proof(place, record):
    """``proof(kernel, dtype)`` at the end of a test."""

    def write(kernel, dtype) -> None:
        record(what=place, kernel=kernel, dtype=str(dtype).rpartition(".")[2])

    return write
