"""Where keys and values lie: ragged rows, and a place for the canvas in front of the prefix.

Every layer has two buffers [B, K, C + S, d]. Slots 0..C-1 belong to the canvas and are rewritten by each step; slot
C + p holds position p of the prefix, in sliding layers C + p % (W - 1). So a step neither copies nor moves the prefix:
it writes C slots, in place since nothing else refers to the buffer, and attends to one range. RoPE is part of the
stored keys, hence the order inside the ring does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..config import TextConfig

LEAST_CAPACITY = 64  # prefix slots of a new buffer


@dataclass
class LayerCache:
    """One layer's keys and values. ``ring`` is W - 1 in sliding layers, ``None`` in full ones; ``canvas`` is C."""

    k: mx.array
    v: mx.array
    canvas: int
    ring: int | None

    def slots(self, tokens: int) -> int:
        """Prefix slots that ``tokens`` positions occupy."""
        return tokens if self.ring is None else min(tokens, self.ring)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` positions; the capacity at least doubles, so growth is rare."""
        have, need = self.k.shape[2] - self.canvas, self.slots(tokens)
        if need > have:
            more = self.slots(max(need, 2 * have, LEAST_CAPACITY)) - have
            self.k, self.v = _widen(self.k, more), _widen(self.v, more)

    def attend_canvas(self, q: mx.array, k: mx.array, v: mx.array, visible: Visible) -> mx.array:
        """q [B, H, C, d] over the canvas's own k, v [B, K, C, d] and the visible prefix; [B, H, C, d]."""
        self.k[:, :, : self.canvas] = k
        self.v[:, :, : self.canvas] = v
        end = self.canvas + visible.extent
        return attend(q, self.k[:, :, :end], self.v[:, :, :end], visible.mask)

    def attend_chunk(self, q: mx.array, k: mx.array, v: mx.array, chunk: Chunk) -> mx.array:
        """q [B, H, T, d] of new tokens over the prefix and themselves, causally; the tokens' k, v are stored."""
        if self.ring is None:
            self.put(k, v, chunk)
            span = slice(self.canvas, self.canvas + chunk.total)
            return attend(q, self.k[:, :, span], self.v[:, :, span], chunk.causal)
        span = slice(self.canvas, self.canvas + self.slots(chunk.past))
        keys = mx.concatenate([self.k[:, :, span], k], 2)
        values = mx.concatenate([self.v[:, :, span], v], 2)
        out = attend(q, keys, values, chunk.window)
        self.put(k, v, chunk)
        return out

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
            to, source = slice(self.canvas + slot, self.canvas + slot + size), slice(at, at + size)
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


@dataclass(frozen=True)
class Visible:
    """What a canvas sees of the prefix in one kind of layer: ``extent`` slots, and where rows differ a mask."""

    extent: int
    mask: mx.array | None


def visible_slots(lengths: np.ndarray, canvas: int, limit: int | None) -> Visible:
    """The mask is boolean [B, 1, 1, C + extent], ``None`` when every row fills every slot."""
    held = lengths if limit is None else np.minimum(lengths, limit)
    extent = int(held.max())
    if (held == extent).all():
        return Visible(extent, None)
    seen = np.arange(canvas + extent) < canvas + held[:, None]
    return Visible(extent, mx.array(seen)[:, None, None])


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
        layers = [LayerCache(x.k[at], x.v[at], x.canvas, x.ring) for x in self.layers]
        return MLXCache(layers, self.lengths[list(rows)])

    def concat(self, other: MLXCache) -> MLXCache:
        """A copy of the rows of both."""
        return MLXCache(
            [_stack(a, b) for a, b in zip(self.layers, other.layers, strict=True)],
            np.concatenate([self.lengths, other.lengths]),
        )


def empty_cache(config: TextConfig, rows: int, canvas: int, dtype: mx.Dtype) -> MLXCache:
    layers = []
    for i, (heads, dim) in enumerate(zip(config.num_key_value_heads, config.head_dims, strict=True)):
        ring = None if config.full(i) else config.window_keys
        shape = (rows, heads, canvas, dim)
        layers.append(LayerCache(mx.zeros(shape, dtype), mx.zeros(shape, dtype), canvas, ring))
    return MLXCache(layers, np.zeros(rows, np.int64))


def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
    """Attention with score scale 1; query head h reads head h // (H / K)."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)


def _widen(buffer: mx.array, more: int) -> mx.array:
    rows, heads, _, dim = buffer.shape
    return mx.concatenate([buffer, mx.zeros((rows, heads, more, dim), buffer.dtype)], 2)


def _stack(a: LayerCache, b: LayerCache) -> LayerCache:
    slots = max(a.k.shape[2], b.k.shape[2])

    def both(one: mx.array, two: mx.array) -> mx.array:
        return mx.concatenate([_widen(x, slots - x.shape[2]) for x in (one, two)], 0)

    return LayerCache(both(a.k, b.k), both(a.v, b.v), a.canvas, a.ring)
