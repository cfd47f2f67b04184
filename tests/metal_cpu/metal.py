"""Running a few lines of Metal in a test."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.mlx_backend.kernels.launch import Kernel
from tests.metal_cpu.runner import emulate, thread_order

INDEX = "const uint i = thread_position_in_grid.x;\n"


def kernel(source: str, inputs: int, outputs: int = 1, header: str = "") -> Kernel:
    """``source`` with ``i``, the thread; inputs are ``a``, ``b``, ..., outputs ``o``, ``p``, ..."""
    return Kernel("lines", tuple("abcdefgh"[:inputs]), tuple("opqr"[:outputs]), INDEX + source, header)


def call(threads: int, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32, **more: Any) -> dict[str, Any]:
    """The arguments of MLX's call: one threadgroup, one output; ``more`` takes the place of any."""
    found = {"template": [], "grid": (threads, 1, 1), "threadgroup": (threads, 1, 1)}
    return found | {"output_shapes": [shape], "output_dtypes": [dtype]} | more


def run(
    source: str, *inputs: mx.array, threads: int = 64, order: int = 0, header: str = "", out: Any = None, **more: Any
) -> np.ndarray:
    """The one output: ``threads`` float32, or of ``out`` = (shape, dtype). bfloat16 comes as float32."""
    shape, dtype = out or ((threads,), mx.float32)
    with thread_order(order):
        (found,) = emulate(kernel(source, len(inputs), 1, header), list(inputs), call(threads, shape, dtype, **more))
    return np.array(found.astype(mx.float32) if found.dtype == mx.bfloat16 else found)


def floats(n: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    """Normal numbers times 4."""
    return (mx.random.normal((n,), key=mx.random.key(seed)) * 4).astype(dtype)
