"""The mixture of experts: which experts a token goes to, and what they make of it."""

from __future__ import annotations

import mlx.core as mx

from .linear import Linear


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in its tanh form, computed in float32 and rounded once, as torch does."""
    y = x.astype(mx.float32)
    cubic = 0.7978845608028654 * (y + 0.044715 * (y * y * y))
    return (0.5 * y * (1 + mx.tanh(cubic))).astype(x.dtype)


def choose(scores: mx.array, per_expert_scale: mx.array, count: int) -> tuple[mx.array, mx.array, mx.array]:
    """Router scores [N, E] to weights float32 [N, k], experts uint32 [N, k] (best first), odds float32 [N, E].

    The weights are renormalised over the chosen before each expert's own scale, so they need not sum to 1.
    """
    odds = mx.softmax(scores.astype(mx.float32), -1, precise=True)
    chosen = mx.argsort(-odds, -1)[:, :count]
    weight = mx.take_along_axis(odds, chosen, -1)
    weight = weight / weight.sum(-1, keepdims=True) * per_expert_scale[chosen]
    return weight, chosen, odds


def mix(x: mx.array, weight: mx.array, chosen: mx.array, gate_up: Linear, down: Linear) -> mx.array:
    """Weighted sum of expert outputs, [N, D] in the dtype of ``x``.

    Pairs of token and expert are sorted by expert, so that each expert's weights are read once for all its tokens.
    The sum over a token's experts is float32, in the order of ``chosen``.

    Args:
        x: [N, D].  weight, chosen: [N, k].
        gate_up: [E, 2F, D], gate rows first.  down: [E, D, F]. The experts compute in the dtype of the former.
    """
    count = chosen.shape[1]
    pairs = chosen.reshape(-1)
    order = mx.argsort(pairs)
    expert = pairs[order]
    rows = x.astype(gate_up.dtype)[order // count][:, None]
    gate, up = mx.split(gate_up.gather(rows, expert), 2, -1)
    out = down.gather(gelu_tanh(gate) * up, expert)
    out = out[:, 0][mx.argsort(order)].reshape(*chosen.shape, -1).astype(mx.float32)
    return (out * weight[..., None]).sum(1).astype(x.dtype)
