"""The mixture of experts: what the experts make of the tokens that are sent to them."""

from __future__ import annotations

import mlx.core as mx

from .kernels.moe import Routes
from .kernels.ops import Ops
from .linear import Linear


def mix(x: mx.array, routes: Routes, gate_up: Linear, down: Linear, ops: Ops, dtype: mx.Dtype) -> mx.array:
    """Weighted sum of expert outputs for each row of ``x`` [N, D]: [N, D] of ``dtype``.

    Args:
        gate_up: [E, 2F, D], gate rows first.  down: [E, D, F]. The experts compute in the dtype of the former.
    """
    rows = x.astype(gate_up.dtype)[routes.token][:, None]
    inner = ops.geglu(gate_up.gather(rows, routes.expert))
    return ops.gather_sum(down.gather(inner, routes.expert)[:, 0], routes, dtype)
