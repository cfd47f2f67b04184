"""Triton, or what stands in for it where it is not installed: macOS, Windows, a torch without it.

Kernel files import ``triton`` and ``tl`` from here, so that their plain functions can be used everywhere. A stand-in
has what is asked for while a module is imported and nothing else; whether a kernel may run is decided in ``choice.py``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_diffgemma.backend import installed

AVAILABLE = installed("triton")
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it where kernels are defined
Given = TypeVar("Given")


class Absent:
    """A decorator that returns the function, and a constant that stays what it is."""

    @staticmethod
    def jit(function: Given) -> Given:
        return function

    @staticmethod
    def constexpr(value: Given) -> Given:
        return value


if TYPE_CHECKING:
    triton: Any
    tl: Any
elif AVAILABLE:
    import triton
    import triton.language as tl
else:
    triton = tl = Absent()

__all__ = ["AVAILABLE", "INTERPRETED", "tl", "triton"]
