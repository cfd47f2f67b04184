"""RMS norms of a layer and what stands between them: sums with the stream, the layer scalar, the router's input.

A norm is taken in float32 and multiplied by its float32 weight before it is rounded to the model's dtype; every sum
and product after that is rounded as well. Source: transformers 5.23, ``modeling_diffusion_gemma.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class AfterAttention:
    """Weights of ``after_attention``: three norms, float32 [D], and the router's scale [D] in the model's dtype."""

    post_attention: mx.array
    pre_feedforward: mx.array
    pre_feedforward_2: mx.array
    router: mx.array


@dataclass(frozen=True)
class Parts:
    """The stream behind the attention and what the dense MLP, the experts and the router read of it.

    All [..., D] in the model's dtype.
    """

    stream: mx.array
    dense: mx.array
    experts: mx.array
    router: mx.array


@dataclass(frozen=True)
class AfterExperts:
    """Weights of ``after_experts``, float32 [D]: of the dense MLP's output, of the experts', of their sum."""

    dense: mx.array
    experts: mx.array
    both: mx.array


# ---- plain


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """In float32 with the product by the float32 weight, then rounded to the dtype of ``x``."""
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


def after_attention_ops(h: mx.array, attention: mx.array, weights: AfterAttention, eps: float) -> Parts:
    """``h``, the stream, and ``attention``, the output of ``o_proj``: [..., D], to the new stream and its norms."""
    stream = h + rms_norm(attention, weights.post_attention, eps)
    z = rms_norm(stream, None, eps) * weights.router
    # A Python factor would be rounded to bfloat16 first; torch multiplies by the float32 value.
    router = (z.astype(mx.float32) * h.shape[-1] ** -0.5).astype(h.dtype)
    dense, experts = (rms_norm(stream, w, eps) for w in (weights.pre_feedforward, weights.pre_feedforward_2))
    return Parts(stream, dense, experts, router)


def after_experts_ops(
    stream: mx.array,
    dense: mx.array,
    mixed: mx.array,
    weights: AfterExperts,
    scalar: mx.array,
    eps: float,
    following: mx.array,
) -> tuple[mx.array, mx.array]:
    """The stream behind the layer and its norm by ``following``, both [..., D].

    Args:
        stream, dense, mixed: [..., D], of the dense MLP and of the experts' sum.
        scalar: the layer's, [1] in the model's dtype.
        following: float32 [D], weight of the next layer's first norm or of the last one.
    """
    both = rms_norm(dense, weights.dense, eps) + rms_norm(mixed, weights.experts, eps)
    stream = (stream + rms_norm(both, weights.both, eps)) * scalar
    return stream, rms_norm(stream, following, eps)
