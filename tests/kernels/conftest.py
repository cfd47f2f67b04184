"""The same tests in the interpreter and, with ``-m gpu``, on a GPU, where passing ones are written down as proof."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request) -> str:
    return request.param


@pytest.fixture
def proof(place, record):
    """``proof(kernel, dtype)`` at the end of a test: on a GPU, the kernel may then be chosen there for that dtype."""

    def write(kernel: str, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        if place == "cpu":
            record(what="interpreted", kernel=kernel, dtype=name)
            return
        from cuda_backend.kernels.choice import prove

        prove(kernel, name)

    return write
