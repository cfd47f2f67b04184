"""Queries, keys and values out of their products: normed head by head, turned (RoPE), heads before tokens.

The norm is rounded to the model's dtype, and every product and sum of the rotation as well: so does torch.
Source: transformers 5.23, ``modeling_diffusion_gemma.py``, ``DiffusionGemmaTextAttention``.
"""

from __future__ import annotations

import mlx.core as mx

from .norm import rms_norm


def split_heads(x: mx.array, dim: int) -> mx.array:
    """[B, T, H * d] to [B, H, T, d]."""
    return x.reshape(*x.shape[:2], -1, dim).swapaxes(1, 2)


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """RoPE on [B, H, T, d]: element i pairs with i + d / 2; cos and sin [B or 1, 1, T, d / 2] serve both."""
    a, b = mx.split(x, 2, -1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def heads_ops(
    q: mx.array | None,
    k: mx.array,
    v: mx.array | None,
    q_norm: mx.array,
    k_norm: mx.array,
    cos: mx.array,
    sin: mx.array,
    eps: float,
) -> tuple[mx.array | None, mx.array, mx.array]:
    """Queries [B, H, T, d], or None without ``q``, keys and values [B, K, T, d].

    Args:
        q: [B, T, H * d].  k, v: [B, T, K * d]. Without ``v`` the values come of the raw ``k``, as in full layers.
        q_norm, k_norm: float32 [d]. Values have a norm without a weight.
        cos, sin: [B or 1, 1, T, d / 2] in the dtype of ``k``.
    """
    dim = k_norm.size
    raw = split_heads(k, dim)
    turned = rotate(rms_norm(raw, k_norm, eps), cos, sin)
    values = rms_norm(raw if v is None else split_heads(v, dim), None, eps)
    queries = None if q is None else rotate(rms_norm(split_heads(q, dim), q_norm, eps), cos, sin)
    return queries, turned, values
