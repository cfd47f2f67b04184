"""Queries, keys and values out of one product: normed head by head, turned (RoPE), keys and values to where they stay.

The norm is rounded to the model's dtype, and every product and sum of the rotation as well: so does plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cards import Card
from .jit import tl, triton
from .language import rounded
from .launch import Config, launch
from .norm import rms_norm


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [B, T, H, d]: element i pairs with i + d / 2; cos and sin [B or 1, T, 1, d / 2] are the same for both."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def heads_ops(
    mixed: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    groups: int,
    eps: float,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Queries [B, T, H, d] of ``mixed`` [B, T, (H + 2 K) d], or [B, T, (H + K) d] where the values are the raw keys.

    Keys and values go to the first T slots of ``keys`` and ``values`` [B, K, S, d]. The norms' weights are float32 [d];
    cos and sin [B or 1, T, 1, d / 2] are in the dtype of ``mixed``.
    """
    length = mixed.shape[1]
    split = mixed.unflatten(-1, (-1, keys.shape[-1]))
    q, k, v = split[:, :, :heads], split[:, :, heads : heads + groups], split[:, :, -groups:]
    keys[:, :, :length] = rotate(rms_norm(k, k_norm, eps), cos, sin).transpose(1, 2)
    values[:, :, :length] = rms_norm(v, None, eps).transpose(1, 2)
    return rotate(rms_norm(q, q_norm, eps), cos, sin)


def heads_kernel(
    mixed: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    groups: int,
    eps: float,
    keys: Tensor,
    values: Tensor,
    card: Card,
) -> Tensor:
    """As ``heads_ops``. Each program takes a row, and some heads of one kind: queries, keys or values."""
    batch, length, width = mixed.shape
    dim = keys.shape[-1]
    assert width in ((heads + groups) * dim, (heads + 2 * groups) * dim) and dim % 2 == 0
    assert mixed.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    assert cos.shape == sin.shape and cos.shape[1:] == (length, 1, dim // 2) and len(cos) in (1, batch)
    assert keys.stride(3) == values.stride(3) == 1
    config = heads_config(dim)
    own_values = width == (heads + 2 * groups) * dim
    parts = triton.cdiv(heads, config["PER"]) + (1 + own_values) * triton.cdiv(groups, config["PER"])
    q = mixed.new_empty(batch, length, heads, dim)
    launch(
        _heads,
        (batch * length, parts),
        mixed,
        q_norm,
        k_norm,
        cos,
        sin,
        q,
        keys,
        values,
        length,
        0 if len(cos) == 1 else length,
        *keys.stride()[:3],
        *values.stride()[:3],
        eps,
        config=config,
        HEADS=heads,
        GROUPS=groups,
        HALF=dim // 2,
        OWN_VALUES=own_values,
    )
    return q


def heads_config(dim: int) -> Config:
    """Halves of heads as a tile of 1,024 values, which 4 warps hold whole heads each of: no sum crosses a warp.

    So it is for heads of 256 (half a warp reads a half of 128) and 512; the same on every card.
    """
    half = triton.next_power_of_2(dim // 2)
    return Config({"PER": max(1, 1024 // half), "BLOCK": half}, num_warps=4)


@triton.jit
def _heads(
    mixed,
    q_norm,
    k_norm,
    cos,
    sin,
    q,
    keys,
    values,
    length,
    turn_length,
    keys_row,
    keys_head,
    keys_slot,
    values_row,
    values_head,
    values_slot,
    eps,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    OWN_VALUES: tl.constexpr,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # of all tokens
    part = tl.program_id(1)
    batch = row // length
    token = row % length
    q_parts: tl.constexpr = (HEADS + PER - 1) // PER
    k_parts: tl.constexpr = (GROUPS + PER - 1) // PER
    at = tl.arange(0, BLOCK)
    tile = tl.zeros((PER, 1), tl.int32) + at[None, :]  # what all heads share is read by each: no exchange of threads
    turn = (batch * turn_length + token) * HALF + tile
    source = mixed + row * (HEADS + GROUPS * (2 if OWN_VALUES else 1)) * (2 * HALF)
    if part < q_parts:
        head = part * PER + tl.arange(0, PER)
        inside = (head < HEADS)[:, None] & (at < HALF)[None, :]
        a, b = load_halves(source, head, at, inside, HALF)
        a, b = turned(a, b, q_norm + tile, cos + turn, sin + turn, inside, eps, HALF, q.dtype.element_ty)
        store_halves(q + row * HEADS * (2 * HALF), head * (2 * HALF), at, inside, a, b, HALF)
    else:
        values_only = part >= q_parts + k_parts  # never where the values are the raw keys
        head = (part - tl.where(values_only, q_parts + k_parts, q_parts)) * PER + tl.arange(0, PER)
        inside = (head < GROUPS)[:, None] & (at < HALF)[None, :]
        a, b = load_halves(source, head + tl.where(values_only, HEADS + GROUPS, HEADS), at, inside, HALF)
        if values_only or not OWN_VALUES:
            v, w = normed_halves(a, b, 1.0, 1.0, eps, HALF, values.dtype.element_ty)
            there = values + batch * values_row + token * values_slot
            store_halves(there, head.to(tl.int64) * values_head, at, inside, v, w, HALF)
        if not values_only:
            a, b = turned(a, b, k_norm + tile, cos + turn, sin + turn, inside, eps, HALF, keys.dtype.element_ty)
            there = keys + batch * keys_row + token * keys_slot
            store_halves(there, head.to(tl.int64) * keys_head, at, inside, a, b, HALF)


@triton.jit
def turned(a, b, weight, cos, sin, inside, eps, HALF: tl.constexpr, dtype: tl.constexpr):
    """Both halves [PER, BLOCK] normed with a weight and turned; ``weight``, ``cos``, ``sin`` are tiles of pointers."""
    w_a = tl.load(weight, mask=inside, other=0.0)
    w_b = tl.load(weight + HALF, mask=inside, other=0.0)
    c = tl.load(cos, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin, mask=inside, other=0.0).to(tl.float32)
    a, b = normed_halves(a, b, w_a, w_b, eps, HALF, dtype)
    return (
        rounded(rounded(a * c, dtype) - rounded(b * s, dtype), dtype),
        rounded(rounded(b * c, dtype) + rounded(a * s, dtype), dtype),
    )


@triton.jit
def normed_halves(a, b, w_a, w_b, eps, HALF: tl.constexpr, dtype: tl.constexpr):
    scale = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
    return rounded(a * scale * w_a, dtype), rounded(b * scale * w_b, dtype)


@triton.jit
def load_halves(source, head, at, inside, HALF: tl.constexpr):
    """The heads of one token as their first and second halves, float32 [PER, BLOCK], zeros outside."""
    here = source + head[:, None] * (2 * HALF) + at[None, :]
    a = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(here + HALF, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_halves(there, head_offset, at, inside, a, b, HALF: tl.constexpr):
    here = there + head_offset[:, None] + at[None, :]
    tl.store(here, a.to(there.dtype.element_ty), mask=inside)
    tl.store(here + HALF, b.to(there.dtype.element_ty), mask=inside)
