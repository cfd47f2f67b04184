"""Where keys and values lie: ragged rows of what has been read so far.

Every layer has two buffers [B, K, S, d]. Slot p holds position p, in sliding layers slot p % (W - 1); S is one of four
sizes per doubling, and at least doubles when it grows. A canvas's own keys and values never come here: a step attends
to two ranges, so it neither copies, moves nor writes the prefix, and a compiled step can have it as an argument. RoPE
is part of the stored keys, hence the order inside the ring does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..config import TextConfig
from .kernels.attention import Visible

LEAST_CAPACITY = 64  # prefix slots of a new buffer


@dataclass
class LayerCache:
    """One layer's keys and values. ``ring`` is W - 1 in sliding layers, ``None`` in full ones."""

    k: mx.array
    v: mx.array
    ring: int | None

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    def slots(self, tokens: int) -> int:
        """Prefix slots that ``tokens`` positions occupy."""
        return tokens if self.ring is None else min(tokens, self.ring)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` positions; the capacity at least doubles, so growth is rare."""
        have, need = self.capacity, self.slots(rounded_up(tokens))
        if need > have:
            more = self.slots(rounded_up(max(need, 2 * have))) - have
            self.k, self.v = _widen(self.k, more), _widen(self.v, more)

    def attend_chunk(self, q: mx.array, k: mx.array, v: mx.array, chunk: Chunk) -> mx.array:
        """q [B, H, T, d] of new tokens over the prefix and themselves, causally: [B, T, H d]. k and v are stored."""
        if self.ring is None:
            self.put(k, v, chunk)
            span = slice(0, chunk.total)
            return joined(attend(q, self.k[:, :, span], self.v[:, :, span], chunk.causal))
        span = slice(0, self.slots(chunk.past))
        keys = mx.concatenate([self.k[:, :, span], k], 2)
        values = mx.concatenate([self.v[:, :, span], v], 2)
        out = attend(q, keys, values, chunk.window)
        self.put(k, v, chunk)
        return joined(out)

    def put(self, k: mx.array, v: mx.array, chunk: Chunk) -> None:
        """Store the tokens of a chunk, padding left out, the ring's overwritten positions too."""
        if chunk.uniform:
            self._put_rows(slice(None), k, v, int(chunk.lengths[0]), int(chunk.counts[0]))
            return
        for row, (start, count) in enumerate(zip(chunk.lengths.tolist(), chunk.counts.tolist(), strict=True)):
            self._put_rows(slice(row, row + 1), k, v, start, count)

    def _put_rows(self, rows: slice, k: mx.array, v: mx.array, start: int, count: int) -> None:
        at = count - self.slots(count)
        while at < count:
            slot = start + at if self.ring is None else (start + at) % self.ring
            size = count - at if self.ring is None else min(count - at, self.ring - slot)
            to, source = slice(slot, slot + size), slice(at, at + size)
            self.k[rows, :, to] = k[rows, :, source]
            self.v[rows, :, to] = v[rows, :, source]
            at += size


@dataclass(frozen=True)
class Chunk:
    """Some new tokens per row, and who sees whom. ``lengths``, ``counts``: int64 [B], before it and of it.

    ``past`` and ``total`` are the longest row before and after; ``causal`` and ``window`` are the masks of full and of
    sliding layers, boolean [B or 1, 1, T, keys] or "causal".
    """

    lengths: np.ndarray
    counts: np.ndarray
    past: int
    total: int
    uniform: bool
    causal: mx.array | str
    window: mx.array


def plan_chunk(lengths: np.ndarray, counts: np.ndarray, width: int, window: int) -> Chunk:
    """Masks for ``counts`` [B] of ``width`` new tokens behind ``lengths`` [B]. ``window`` is W, own token included."""
    uniform = bool((lengths == lengths[0]).all() and (counts == width).all())
    past, total = int(lengths.max()), int((lengths + counts).max())
    starts = lengths[:1] if uniform else lengths
    q = starts[:, None, None] + np.arange(width)[:, None]
    slots = min(past, window - 1)
    own = starts[:, None, None] + np.arange(width)
    keys = np.concatenate([ring_positions(starts, slots, window - 1)[:, None], own], -1)
    near = (keys >= 0) & (keys <= q) & (keys > q - window)
    causal = "causal" if uniform else mx.array(np.arange(total) <= q)[:, None]
    return Chunk(lengths, counts, past, total, uniform, causal, mx.array(near)[:, None])


def ring_positions(lengths: np.ndarray, slots: int, ring: int) -> np.ndarray:
    """int64 [B, slots]: the position that each slot holds, the last one written there, or -1."""
    slot, last = np.arange(slots), lengths[:, None] - 1
    found = last - (last - slot) % ring
    return np.where((found >= 0) & (last >= 0), found, -1)


def visible_slots(lengths: np.ndarray, limit: int | None, *, rounded: bool = False) -> Visible:
    """What a canvas sees behind prefixes of ``lengths`` [B], at most ``limit`` slots of each.

    ``rounded``: the extent is rounded up as the buffers are, so that lengths close to each other look alike to a
    compiled step. It does not depend on how large a buffer once had to be.
    """
    held = lengths if limit is None else np.minimum(lengths, limit)
    extent = int(held.max())
    if rounded:
        extent = rounded_up(extent) if limit is None else min(rounded_up(extent), limit)
    return Visible(extent, mx.array(held.astype(np.int32)), bool((held == extent).all()))


def rounded_up(extent: int) -> int:
    """To one of four sizes per doubling: at most a quarter is read in vain."""
    step = max(LEAST_CAPACITY, (1 << extent.bit_length()) // 8)
    return -(-extent // step) * step


@dataclass
class MLXCache:
    """The cache behind the seam. ``lengths`` int64 [B]; ``scores`` as in ``backend.Cache``."""

    layers: list[LayerCache]
    lengths: np.ndarray
    scores: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        for layer in self.layers:
            layer.reserve(tokens)

    def select(self, rows: Sequence[int]) -> MLXCache:
        """A copy of these rows, in this order."""
        at = mx.array(list(rows), dtype=mx.int32)
        layers = [LayerCache(x.k[at], x.v[at], x.ring) for x in self.layers]
        return MLXCache(layers, self.lengths[list(rows)])

    def concat(self, other: MLXCache) -> MLXCache:
        """A copy of the rows of both."""
        return MLXCache(
            [_stack(a, b) for a, b in zip(self.layers, other.layers, strict=True)],
            np.concatenate([self.lengths, other.lengths]),
        )


def empty_cache(config: TextConfig, rows: int, dtype: mx.Dtype) -> MLXCache:
    layers = []
    for i, (heads, dim) in enumerate(zip(config.num_key_value_heads, config.head_dims, strict=True)):
        ring = None if config.full(i) else config.window_keys
        shape = (rows, heads, LEAST_CAPACITY if ring is None else min(LEAST_CAPACITY, ring), dim)
        layers.append(LayerCache(mx.zeros(shape, dtype), mx.zeros(shape, dtype), ring))
    return MLXCache(layers, np.zeros(rows, np.int64))


def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
    """Attention with score scale 1; query head h reads head h // (H / K)."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)


def joined(heads: mx.array) -> mx.array:
    """[B, H, T, d] to [B, T, H d]."""
    return heads.swapaxes(1, 2).flatten(2)


def _widen(buffer: mx.array, more: int) -> mx.array:
    rows, heads, _, dim = buffer.shape
    return mx.concatenate([buffer, mx.zeros((rows, heads, more, dim), buffer.dtype)], 2)


def _stack(a: LayerCache, b: LayerCache) -> LayerCache:
    slots = max(a.capacity, b.capacity)

    def both(one: mx.array, two: mx.array) -> mx.array:
        return mx.concatenate([_widen(x, slots - x.shape[2]) for x in (one, two)], 0)

    return LayerCache(both(a.k, b.k), both(a.v, b.v), a.ring)
