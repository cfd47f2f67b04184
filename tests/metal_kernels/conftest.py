"""The same tests on a CPU and, with ``-m metal``, on a Mac's GPU, where passing ones are written down as proof."""

from __future__ import annotations

import pytest

from mlx_diffgemma.mlx_backend.kernels.chip import chip_here
from tests.proofs import PROOFS, VIRTUAL


@pytest.fixture(params=["cpu-emulated", pytest.param("metal", marks=pytest.mark.metal)])
def place(request) -> str:
    return request.param


@pytest.fixture
def proof(request, place, record):
    """``proof(kernel, dtype)`` at the end of a test: on a Mac, the kernel may then be chosen there for that dtype."""
    return PROOFS.of(request.node, label(place), record)


def label(place: str) -> str:
    """In a virtual machine the GPU of its host is seen through a driver of its own: that says nothing about a chip."""
    chip = chip_here()
    return VIRTUAL if place == "metal" and chip is not None and chip.virtual else place
