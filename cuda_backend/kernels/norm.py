"""RMS norms of a layer and what stands between them: sums with the stream, the sum over experts, FP8 activations.

Three launches per layer, each a row per program: a norm costs its latency, not its bytes, so what meets at one place
of the layer is done while the row is in registers. Rows are [N, D]; norm weights are float32 [D], for a norm
multiplies by its weight before it is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cards import Card
from .jit import tl, triton
from .language import rounded
from .launch import Config, launch
from .quantize import Fp8Rows, Rows, e4m3_row, quantize_ops


@dataclass(frozen=True)
class AfterAttention:
    """Weights of ``after_attention``; ``router_scale`` [D] is in the model's dtype."""

    post_attention_layernorm: Tensor
    pre_feedforward_layernorm: Tensor
    pre_feedforward_layernorm_2: Tensor
    router_scale: Tensor


@dataclass(frozen=True)
class BeforeFeedForward:
    """The stream behind the attention, and what the dense MLP, the experts and the router read of it; all [N, D]."""

    stream: Tensor
    dense: Rows
    experts: Rows
    router: Tensor


@dataclass(frozen=True)
class AfterExperts:
    """Weights of ``after_experts``: of the dense MLP's output, of the experts', of their sum."""

    post_feedforward_layernorm_1: Tensor
    post_feedforward_layernorm_2: Tensor
    post_feedforward_layernorm: Tensor


# ---- plain


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """In float32 with the weight's product, then back to x's dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


def norm_ops(h: Tensor, weight: Tensor | None, eps: float, fp8: bool) -> Rows:
    """h [N, D]; ``fp8``: what has been rounded to h's dtype is quantized."""
    normed = rms_norm(h, weight, eps)
    return quantize_ops(normed) if fp8 else normed


def after_attention_ops(
    h: Tensor, joined: Tensor, weights: AfterAttention, eps: float, fp8_dense: bool, fp8_experts: bool
) -> BeforeFeedForward:
    """Stream and output of the attention [N, D] to the new stream and its three norms."""
    stream = h + rms_norm(joined, weights.post_attention_layernorm, eps)
    return BeforeFeedForward(
        stream,
        norm_ops(stream, weights.pre_feedforward_layernorm, eps, fp8_dense),
        norm_ops(stream, weights.pre_feedforward_layernorm_2, eps, fp8_experts),
        rms_norm(stream, None, eps) * weights.router_scale * h.shape[-1] ** -0.5,
    )


def after_experts_ops(
    h: Tensor,
    dense: Tensor,
    pairs: Tensor,
    weight: Tensor,
    norms: AfterExperts,
    scalar: Tensor,
    eps: float,
    next_norm: Tensor | None,
    fp8: bool,
) -> tuple[Tensor, Rows | None]:
    """The stream behind the layer [N, D], and its norm for the next layer, if ``next_norm`` is given.

    ``pairs`` [N k, D]: row n k + j comes from the j-th best expert of token n, whose ``weight`` is float32 [N, k]; they
    are summed in float32, best first. ``scalar`` [N]: the layer scalar of each row, in the model's dtype.
    """
    outputs = pairs.unflatten(0, weight.shape)
    total = outputs[:, 0] * weight[:, :1]  # float32, which ``weight`` is
    for j in range(1, weight.shape[1]):
        total = total + outputs[:, j] * weight[:, j : j + 1]
    both = rms_norm(dense, norms.post_feedforward_layernorm_1, eps) + rms_norm(
        total.to(h.dtype), norms.post_feedforward_layernorm_2, eps
    )
    stream = (h + rms_norm(both, norms.post_feedforward_layernorm, eps)) * scalar[:, None]
    return stream, None if next_norm is None else norm_ops(stream, next_norm, eps, fp8)


# ---- kernels


def norm_kernel(h: Tensor, weight: Tensor | None, eps: float, fp8: bool, card: Card) -> Rows:
    """As ``norm_ops``."""
    assert h.is_contiguous()
    rows, width = h.shape
    out, scales = empty_rows(h, fp8)
    launch(_norm, (rows,), h, weight, out, scales, eps, config=row_config(width), WIDTH=width)
    return as_rows(out, scales)


def after_attention_kernel(
    h: Tensor, joined: Tensor, weights: AfterAttention, eps: float, fp8_dense: bool, fp8_experts: bool, card: Card
) -> BeforeFeedForward:
    """As ``after_attention_ops``."""
    assert h.is_contiguous() and joined.is_contiguous() and joined.shape == h.shape
    rows, width = h.shape
    stream, router = torch.empty_like(h), torch.empty_like(h)
    dense, experts = empty_rows(h, fp8_dense), empty_rows(h, fp8_experts)
    launch(
        _after_attention,
        (rows,),
        h,
        joined,
        weights.post_attention_layernorm,
        weights.pre_feedforward_layernorm,
        weights.pre_feedforward_layernorm_2,
        weights.router_scale,
        stream,
        *dense,
        *experts,
        router,
        eps,
        width**-0.5,
        config=row_config(width),
        WIDTH=width,
    )
    return BeforeFeedForward(stream, as_rows(*dense), as_rows(*experts), router)


def after_experts_kernel(
    h: Tensor,
    dense: Tensor,
    pairs: Tensor,
    weight: Tensor,
    norms: AfterExperts,
    scalar: Tensor,
    eps: float,
    next_norm: Tensor | None,
    fp8: bool,
    card: Card,
) -> tuple[Tensor, Rows | None]:
    """As ``after_experts_ops``."""
    assert all(x.is_contiguous() for x in (h, dense, pairs, weight, scalar))
    rows, width = h.shape
    stream = torch.empty_like(h)
    out, scales = (None, None) if next_norm is None else empty_rows(h, fp8)
    launch(
        _after_experts,
        (rows,),
        h,
        dense,
        pairs,
        weight,
        norms.post_feedforward_layernorm_1,
        norms.post_feedforward_layernorm_2,
        norms.post_feedforward_layernorm,
        scalar,
        next_norm,
        stream,
        out,
        scales,
        eps,
        config=row_config(width),
        WIDTH=width,
        TOP=weight.shape[1],
    )
    return stream, None if out is None else as_rows(out, scales)


def row_config(width: int) -> Config:
    """A row per program, on every card alike: with 8 warps a thread holds 16 of 2,816 values, in two loads of 16 bytes.

    Fewer warps make the thread's own sum longer, more make the sum over warps longer.
    """
    block = triton.next_power_of_2(width)
    return Config({"BLOCK": block}, num_warps=min(8, max(1, block // 256)))


def empty_rows(like: Tensor, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Room for ``Rows`` of the shape of ``like``: values, or codes and scales."""
    if not fp8:
        return torch.empty_like(like), None
    scales = like.new_empty((like.shape[0], 1), dtype=torch.float32)
    return torch.empty_like(like, dtype=torch.float8_e4m3fn), scales


def as_rows(out: Tensor, scales: Tensor | None) -> Rows:
    return out if scales is None else Fp8Rows(out, scales)


@triton.jit
def _norm(h, weight, out, scales, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = load_row(h, row, at, WIDTH)
    w = load_weight(weight, at, WIDTH)
    store_rows(normed(x, w, eps, WIDTH, h.dtype.element_ty), out, scales, row, at, WIDTH)


@triton.jit
def _after_attention(
    h,
    joined,
    post,
    pre,
    pre_2,
    router_scale,
    stream,
    dense,
    dense_scales,
    experts,
    experts_scales,
    router,
    eps,
    root,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = h.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    added = load_row(joined, row, at, WIDTH)
    x = load_row(h, row, at, WIDTH)
    w = load_weight(post, at, WIDTH)
    w_dense = load_weight(pre, at, WIDTH)  # loads stay in this order: what is needed late is under way early
    w_experts = load_weight(pre_2, at, WIDTH)
    w_router = load_weight(router_scale, at, WIDTH)
    x = rounded(x + normed(added, w, eps, WIDTH, dtype), dtype)
    tl.store(stream + row * WIDTH + at, x.to(dtype), mask=inside)
    bare = x * inverse_rms(x, eps, WIDTH)  # of all three
    z = rounded(rounded(rounded(bare, dtype) * w_router, dtype) * root, dtype)
    tl.store(router + row * WIDTH + at, z.to(dtype), mask=inside)
    store_rows(rounded(bare * w_dense, dtype), dense, dense_scales, row, at, WIDTH)
    store_rows(rounded(bare * w_experts, dtype), experts, experts_scales, row, at, WIDTH)


@triton.jit
def _after_experts(
    h,
    dense,
    pairs,
    weight,
    post_1,
    post_2,
    post,
    scalar,
    next_norm,
    stream,
    out,
    scales,
    eps,
    WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = h.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mixed = load_row(pairs, row * TOP, at, WIDTH) * tl.load(weight + row * TOP)
    for j in tl.static_range(1, TOP):
        mixed += load_row(pairs, row * TOP + j, at, WIDTH) * tl.load(weight + row * TOP + j)
    mixed = rounded(mixed, dtype)
    y = load_row(dense, row, at, WIDTH)
    x = load_row(h, row, at, WIDTH)
    factor = tl.load(scalar + row).to(tl.float32)
    w_1 = load_weight(post_1, at, WIDTH)
    w_2 = load_weight(post_2, at, WIDTH)
    w = load_weight(post, at, WIDTH)
    both = rounded(normed(y, w_1, eps, WIDTH, dtype) + normed(mixed, w_2, eps, WIDTH, dtype), dtype)
    x = rounded(rounded(x + normed(both, w, eps, WIDTH, dtype), dtype) * factor, dtype)
    tl.store(stream + row * WIDTH + at, x.to(dtype), mask=at < WIDTH)
    if next_norm is not None:
        w_next = load_weight(next_norm, at, WIDTH)
        store_rows(normed(x, w_next, eps, WIDTH, dtype), out, scales, row, at, WIDTH)


@triton.jit
def load_row(x, row, at, WIDTH: tl.constexpr):
    """Row ``row`` (int64) of x [N, WIDTH] in float32, zeros behind its end."""
    return tl.load(x + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def load_weight(weight, at, WIDTH: tl.constexpr):
    """A vector [WIDTH] in float32; 1 where there is none."""
    if weight is None:
        return 1.0
    else:
        return tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(x, eps, WIDTH: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)


@triton.jit
def normed(x, w, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """A row of float32, zeros behind its end, as the model's dtype has its norm."""
    return rounded(x * inverse_rms(x, eps, WIDTH) * w, dtype)


@triton.jit
def store_rows(y, out, scales, row, at, WIDTH: tl.constexpr):
    """A row that has been rounded, as it is or, where there are scales, in FP8."""
    if scales is None:
        tl.store(out + row * WIDTH + at, y.to(out.dtype.element_ty), mask=at < WIDTH)
    else:
        code, scale = e4m3_row(y)
        tl.store(out + row * WIDTH + at, code, mask=at < WIDTH)
        tl.store(scales + row, scale)
