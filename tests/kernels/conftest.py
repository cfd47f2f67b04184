"""The same tests in the interpreter and, with ``-m gpu``, on a GPU, where passing ones are written down as proof."""

from __future__ import annotations

import pytest

from tests.proofs import PROOFS


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request) -> str:
    return request.param


@pytest.fixture
def proof(request, place, record):
    """``proof(kernel, dtype)`` at the end of a test: on a GPU, the kernel may then be chosen there for that dtype."""
    return PROOFS.of(request.node, place, record)
