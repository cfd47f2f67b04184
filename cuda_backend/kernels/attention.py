"""Attention over the cache where it lies: a canvas over everything, a chunk of new tokens causally. Both in one kernel.

Buffers of the cache are [B, K, C + capacity, d]; slots 0 .. C - 1 belong to the canvas, the prefix follows. No keys are
copied or repeated, no mask is stored; how much of the prefix counts is read from the device. Scores are not scaled. The
softmax is float32, its weights are rounded to the model's dtype before they meet the values, as SDPA does it.

The query heads of one key-value head are stacked, token by token, so a row tile reads each key once for all of them. A
head dimension of 512 does not fit into registers: each program computes a half of the columns and all of the scores.
Where row tiles are fewer than processors the keys are split too, into parts that a second kernel adds up in order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_plan import splits_for, tile_for
from .cards import Card
from .jit import tl, triton
from .language import dot, narrowed
from .launch import Config, launch

# ---- canvas


def canvas_attention_ops(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None) -> Tensor:
    """Every query sees the canvas's slots and the first ``lengths`` of the prefix's, or all where that is None.

    q [B, C, H, d]; keys, values [B, K, C + capacity, d]; lengths int32 [B]. Returns [B, C, H d].
    """
    rows, canvas, heads, dim = q.shape
    visible = None
    if lengths is not None:
        visible = torch.arange(keys.shape[2], device=q.device) < canvas + lengths[:, None, None, None]
    stacked = q.transpose(1, 2).reshape(rows, keys.shape[1], -1, dim)
    out = F.scaled_dot_product_attention(stacked, keys, values, attn_mask=visible, scale=1.0)
    return out.view(rows, heads, canvas, dim).transpose(1, 2).reshape(rows, canvas, -1)


def canvas_attention_kernel(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    card: Card,
    *,
    splits: int | None = None,
    config: Config | None = None,
) -> Tensor:
    """As ``canvas_attention_ops``. ``splits`` and ``config`` are chosen by the shapes, never by the lengths."""
    if lengths is None:
        lengths = q.new_full((len(q),), keys.shape[2] - q.shape[1], dtype=torch.int32)
    return _attention(q, None, None, keys, values, lengths, None, q.shape[1], card, splits, config)


# ---- chunk


def chunk_attention_ops(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    keys: Tensor,
    values: Tensor,
    before: Tensor,
    window: int | None,
    canvas: int,
) -> Tensor:
    """Token t at position before + t sees itself, earlier ones and what is cached, ``window`` positions at most.

    q [B, T, H, d]; own_k, own_v [B, K, T, d], not yet cached; keys, values [B, K, C + capacity, d]; before int32 [B].
    With a window the cache is a ring of window - 1 slots, without one slot C + p holds position p. Returns [B, T, H d].
    """
    rows, length, heads, dim = q.shape
    groups = own_k.shape[1]
    ring = None if window is None else window - 1
    cached_k, cached_v = (x[:, :, canvas:][:, :, :ring] for x in (keys, values))
    token = torch.arange(length, device=q.device)
    newest = before[:, None].long() - 1
    held = torch.arange(cached_k.shape[2], device=q.device).expand(rows, -1)  # the position in each slot
    if ring is not None:
        held = newest - (newest - held).remainder(ring)
    in_cache = ((held >= 0) & (held <= newest))[:, None].expand(-1, length, -1)
    in_chunk = token <= token[:, None]
    if window is not None:
        in_cache = in_cache & (held[:, None] > (newest + 1 + token)[:, :, None] - window)
        in_chunk = in_chunk & (token > token[:, None] - window)
    visible = torch.cat([in_cache, in_chunk.expand(rows, -1, -1)], -1).repeat_interleave(groups, 0)[:, None]
    k, v = torch.cat([cached_k, own_k], 2), torch.cat([cached_v, own_v], 2)
    stacked = q.transpose(1, 2).reshape(rows * groups, -1, length, dim)
    k, v = (x.flatten(0, 1)[:, None].expand(-1, heads // groups, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(stacked, k, v, attn_mask=visible, scale=1.0)
    return out.reshape(rows, heads, length, dim).transpose(1, 2).reshape(rows, length, -1)


def chunk_attention_kernel(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    keys: Tensor,
    values: Tensor,
    before: Tensor,
    window: int | None,
    canvas: int,
    card: Card,
    *,
    splits: int | None = None,
    config: Config | None = None,
) -> Tensor:
    """As ``chunk_attention_ops``. ``splits`` and ``config`` are chosen by the shapes, never by ``before``."""
    return _attention(q, own_k, own_v, keys, values, before, window, canvas, card, splits, config)


# ---- starting the kernel


def _attention(
    q: Tensor,
    own_k: Tensor | None,
    own_v: Tensor | None,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    window: int | None,
    canvas: int,
    card: Card,
    splits: int | None,
    config: Config | None,
) -> Tensor:
    rows, length, heads, dim = q.shape
    groups, slots = keys.shape[1:3]
    assert keys.stride() == values.stride() and keys.stride()[2:] == (dim, 1) and slots * dim < 2**31
    assert q.stride(3) == 1 and dim == triton.next_power_of_2(dim) and (window is None or window > 1)
    own: tuple[int, ...] = (0, 0, 0)
    if own_k is not None and own_v is not None:
        own = own_k.stride()[:3]
        assert own_k.stride() == own_v.stride() and own_k.stride(3) == 1 and length * own[2] < 2**31
    if config is None:
        config = tile_for(card, dim, q.element_size())
    columns = min(config["COLUMNS"], dim)
    programs = triton.cdiv(length * heads // groups, config["ROWS"]) * (dim // columns)
    if splits is None:
        extent = slots if own_k is None else length + min(slots - canvas, window or slots)
        splits = splits_for(programs * rows * groups, triton.cdiv(extent, config["KEYS"]), card.processors)
    out = q.new_empty((rows, length, heads * dim))
    part, stats = out, None
    if splits > 1:
        part = q.new_empty((splits, *out.shape), dtype=torch.float32)
        stats = q.new_empty((2, splits, rows * length * heads), dtype=torch.float32)
    launch(
        *(_attend, (programs, rows * groups, splits)),
        *(q, own_k, own_v, keys, values, counts, part, stats),
        *(*q.stride()[:3], *own, *keys.stride()[:2]),
        *(canvas, length, rows * length * heads),
        config=config,
        GROUPS=groups,
        STACKED=heads // groups,
        HEAD_DIM=dim,
        COLUMNS=columns,
        SPLITS=splits,
        WINDOW=window or 0,
        CAUSAL=own_k is not None,
    )
    if stats is not None:
        _merge_parts(part, stats, out, dim)
    return out


def _merge_parts(part: Tensor, stats: Tensor, out: Tensor, dim: int) -> None:
    """out = the parts [splits, B, T, H d] with ``stats`` [2, splits, B T H], their maxima and sums."""
    splits, count = stats.shape[1:]
    config = Config({"ROWS": max(1, 2048 // dim)}, num_warps=4)
    grid = (triton.cdiv(count, config["ROWS"]),)
    launch(_merge, grid, part, stats, out, count, config=config, HEAD_DIM=dim, SPLITS=splits)


# ---- kernels


@triton.jit
def _attend(
    q,
    own_keys,
    own_values,
    keys,
    values,
    counts,
    out,
    stats,
    q_batch,
    q_token,
    q_head,
    own_batch,
    own_head,
    own_token,
    cache_batch,
    cache_head,
    canvas,
    length,
    total,
    GROUPS: tl.constexpr,
    STACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One row tile of one batch row and key-value head, over one split of its keys, for COLUMNS of the values.

    Row i of the stack is query head i % STACKED of token i / STACKED. ``out`` [SPLITS, B, T, H, d]. The tiles of keys
    are numbered through: those of the cache, from the first that the tile's first token sees, then the chunk's own.
    """
    parts: tl.constexpr = HEAD_DIM // COLUMNS
    tile = tl.num_programs(0) // parts - 1 - tl.program_id(0) // parts  # the longest of a causal pass start first
    batch, group = (tl.program_id(1) // GROUPS).to(tl.int64), (tl.program_id(1) % GROUPS).to(tl.int64)
    split = tl.program_id(2)
    at = tile * ROWS + tl.arange(0, ROWS)
    inside = at < length * STACKED
    token = tl.minimum(at // STACKED, length - 1)
    head = group * STACKED + at % STACKED
    element = tl.arange(0, HEAD_DIM)
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    address = batch * q_batch + token.to(tl.int64) * q_token + head * q_head
    query = tl.load(q + address[:, None] + element[None, :], mask=inside[:, None], other=0.0)

    count = tl.load(counts + batch)
    low, seen, own_low, own_seen = _seen(count, tile, canvas, length, ROWS, STACKED, WINDOW, CAUSAL)
    first = batch * cache_batch + group * cache_head + (canvas * HEAD_DIM if CAUSAL else 0)
    keys, values = keys + first, values + first
    tiles = tl.cdiv(seen, KEYS)
    every = tiles + tl.cdiv(own_seen, KEYS)
    share = tl.cdiv(every, SPLITS)
    begin, end = split * share, tl.minimum((split + 1) * share, every)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    spot = count + token
    whole = 0  # tiles of which every query sees every key
    if not WINDOW:
        whole = seen // KEYS
        top, norm, acc = _walk(
            query, keys, values, top, norm, acc, begin, tl.minimum(end, whole), HEAD_DIM, low, seen, spot, column,
            HEAD_DIM, KEYS, MASKED=False, CAUSAL=False, WINDOW=0, RING=0,
        )  # fmt: skip
    top, norm, acc = _walk(
        query, keys, values, top, norm, acc, tl.maximum(begin, whole), tl.minimum(end, tiles), HEAD_DIM, low, seen,
        spot, column, HEAD_DIM, KEYS, MASKED=True, CAUSAL=False, WINDOW=WINDOW, RING=WINDOW - 1 if WINDOW else 0,
    )  # fmt: skip
    if CAUSAL:
        own = batch * own_batch + group * own_head + own_low * own_token
        top, norm, acc = _walk(
            query, own_keys + own, own_values + own, top, norm, acc, tl.maximum(begin, tiles) - tiles, end - tiles,
            own_token, count + own_low, own_seen, spot, column,
            HEAD_DIM, KEYS, MASKED=True, CAUSAL=True, WINDOW=WINDOW, RING=0,
        )  # fmt: skip

    line = (batch * length + token) * (GROUPS * STACKED) + head
    place = out + line[:, None] * HEAD_DIM + column[None, :]
    if SPLITS == 1:
        tl.store(place, narrowed(acc / norm[:, None], out.dtype.element_ty), mask=inside[:, None])
    else:
        some = begin < end  # else the part is never read: its maximum is -inf
        tl.store(place + split.to(tl.int64) * total * HEAD_DIM, acc, mask=inside[:, None] & some)
        if tl.program_id(0) % parts == 0:
            _note(stats, split, SPLITS, total, line, inside, top, norm)


@triton.jit
def _note(stats, split, SPLITS: tl.constexpr, total, line, inside, top, norm):
    """Maxima and sums of one split: its rows of ``stats`` [2, SPLITS, total]."""
    tl.store(stats + split * total + line, top, mask=inside)
    tl.store(stats + (SPLITS + split) * total + line, norm, mask=inside)


@triton.jit
def _seen(count, tile, canvas, length, ROWS, STACKED, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """What one row tile sees of the cache and of its own tokens: from where, and how many. ``count`` are cached."""
    if not CAUSAL:
        return 0, canvas + count, 0, 0
    first = tile * ROWS // STACKED
    last = tl.minimum((tile * ROWS + ROWS - 1) // STACKED, length - 1)
    if not WINDOW:
        return 0, count, 0, last + 1
    low = tl.maximum(count + first - WINDOW + 1, 0)
    own_low = tl.maximum(first - WINDOW + 1, 0)
    return low, tl.maximum(count - low, 0), own_low, last + 1 - own_low


@triton.jit
def _walk(
    query,
    keys,
    values,
    top,
    norm,
    acc,
    begin,
    end,
    stride,
    low,
    seen,
    spot,
    column,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
):
    """Tiles ``begin`` to ``end`` of the keys at positions low .. low + seen - 1, for queries at positions ``spot``.

    ``top`` is the greatest score so far, times log2 e; ``norm`` the sum of 2^(score log2 e - top), in float32;
    ``acc`` the values so weighted. The product with log2 e and the difference are one fused operation on a GPU.
    """
    log2e: tl.constexpr = 1.4426950408889634
    element = tl.arange(0, HEAD_DIM)
    for tile in range(begin, end):
        at = tile * KEYS + tl.arange(0, KEYS)
        slot = (low + at) % RING if RING else at
        if MASKED:
            k = tl.load(keys + (slot * stride)[:, None] + element[None, :], mask=(at < seen)[:, None], other=0.0)
        else:
            k = tl.load(keys + (slot * stride)[:, None] + element[None, :])
        score = dot(query, tl.trans(k), tl.zeros((query.shape[0], KEYS), tl.float32))
        if MASKED:
            visible = (at < seen)[None, :]
            if CAUSAL:
                visible = visible & ((low + at)[None, :] <= spot[:, None])
            if WINDOW:
                visible = visible & ((low + at)[None, :] > spot[:, None] - WINDOW)
            score = tl.where(visible, score, float("-inf"))
        greatest = tl.maximum(top, tl.max(score, 1) * log2e)
        base = tl.where(greatest == float("-inf"), 0.0, greatest) if MASKED else greatest  # nothing seen yet: no NaN
        weight = tl.exp2(score * log2e - base[:, None])
        shrink = tl.exp2(top - base)
        norm = norm * shrink + tl.sum(weight, 1)
        if MASKED:
            v = tl.load(values + (slot * stride)[:, None] + column[None, :], mask=(at < seen)[:, None], other=0.0)
        else:
            v = tl.load(values + (slot * stride)[:, None] + column[None, :])
        acc = dot(narrowed(weight, v.dtype), v, acc * shrink[:, None])
        top = greatest
    return top, norm, acc


@triton.jit
def _merge(part, stats, out, count, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Rows [count, d] of ``out`` from [SPLITS, count, d]: always in the same order."""
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = line < count
    element = tl.arange(0, HEAD_DIM)
    top = tl.load(stats + line, mask=inside, other=0.0)
    for split in range(1, SPLITS):
        top = tl.maximum(top, tl.load(stats + split * count + line, mask=inside, other=0.0))
    norm = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for split in range(SPLITS):
        weight = tl.exp2(tl.load(stats + split * count + line, mask=inside, other=0.0) - top)
        norm += weight * tl.load(stats + (SPLITS + split) * count + line, mask=inside, other=1.0)
        place = part + (split * count + line)[:, None] * HEAD_DIM + element[None, :]
        acc += weight[:, None] * tl.load(place, mask=(inside & (weight > 0))[:, None], other=0.0)
    place = out + line[:, None] * HEAD_DIM + element[None, :]
    tl.store(place, narrowed(acc / norm[:, None], out.dtype.element_ty), mask=inside[:, None])
