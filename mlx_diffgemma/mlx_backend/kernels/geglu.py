"""GeGLU: GELU in its tanh form of the gate, times up; GELU in float32, rounded once, and then the product, as in torch.

Source: transformers 5.23, ``modeling_diffusion_gemma.py``, ``DiffusionGemmaTextMLP`` and its experts.
"""

from __future__ import annotations

import mlx.core as mx

from .elementary import tanh
from .launch import Kernel

THREADS = 256
KERNEL = Kernel(
    name="geglu",
    inputs=("gate", "up"),
    outputs=("out",),
    # gate and up are two arrays, or columns of one: STRIDE is how far rows are apart, START where up begins in its own.
    source="""
    const uint column = thread_position_in_grid.x, row = thread_position_in_grid.y;
    if (column >= WIDTH) return;
    const float x = float(gate[size_t(row) * STRIDE + column]);
    const float cubic = 0.7978845608028654f * (x + 0.044715f * (x * x * x));
    const T activated = T(0.5f * x * (1.0f + metal::precise::tanh(cubic)));
    out[size_t(row) * WIDTH + column] = T(float(activated) * float(up[size_t(row) * STRIDE + START + column]));
    """,
)


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in its tanh form, computed in float32 and rounded once."""
    y = x.astype(mx.float32)
    cubic = 0.7978845608028654 * (y + 0.044715 * (y * y * y))
    return (0.5 * y * (1 + tanh(cubic))).astype(x.dtype)


def geglu_ops(gate: mx.array, up: mx.array | None = None) -> mx.array:
    """``gate`` and ``up`` [..., F], or both in ``gate`` [..., 2 F], gate first; [..., F] in their dtype."""
    if up is None:
        gate, up = mx.split(gate, 2, -1)
    return gelu_tanh(gate) * up


def geglu_kernel(gate: mx.array, up: mx.array | None = None) -> mx.array:
    """As ``geglu_ops``."""
    stride = gate.shape[-1]
    width = stride if up is not None else stride // 2
    shape = (*gate.shape[:-1], width)
    rows = gate.size // stride
    (out,) = KERNEL(
        gate,
        gate if up is None else up,
        template={"T": gate.dtype, "STRIDE": stride, "WIDTH": width, "START": 0 if up is not None else width},
        grid=(-(-width // THREADS) * THREADS, rows, 1),
        threadgroup=(THREADS, 1, 1),
        shapes=[shape],
        dtypes=[gate.dtype],
    )
    return out
