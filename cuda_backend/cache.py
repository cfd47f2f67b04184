"""Keys and values: ragged, each row from position 0 in its own slots, read in place by every denoising step.

A layer has buffers [B, K, C + capacity, d]. Slots 0 .. C - 1 belong to the canvas, which writes its own keys there at
each step; the prefix follows: position p lies in slot C + p of a full layer, and in C + p mod (W - 1) of a sliding
layer, a ring. So one attention call reads one slice, and nothing is joined or moved. Keys are stored turned (RoPE), so
the order of a ring does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlx_diffgemma.config import ModelConfig

SMALLEST = 64  # slots of a new buffer; from there it doubles


@dataclass(frozen=True)
class Prefix:
    """What a canvas sees during one block, per layer; made once, at its beginning."""

    keys: list[Tensor]  # views [B, K, C + extent, d]
    values: list[Tensor]
    visible: list[Tensor | None]  # bool [B, 1, 1, C + extent]; None where all rows are equally long
    turns: list[tuple[Tensor, Tensor]]  # cos and sin of the canvas's positions


@dataclass(frozen=True)
class Places:
    """Which tokens of a chunk a layer keeps, and where: three int64 index arrays of equal length."""

    rows: Tensor
    tokens: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Chunk:
    """A piece of an encode: how its tokens see the past and each other. Masks are bool [B or 1, 1, T, keys]."""

    positions: Tensor  # int64 [B or 1, T]
    full: Tensor  # over slots 0 .. extent, the chunk included
    sliding: Tensor  # over the ring, then the chunk
    ring: int  # slots of the ring in use before the chunk
    extent: int  # positions in use after the chunk
    full_places: Places
    ring_places: Places


class TorchCache:
    """See the module. ``scores`` float32 [B, L] is set by an encode that was asked to."""

    def __init__(self, config: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.lengths = np.zeros(rows, np.int64)
        self.scores: np.ndarray | None = None
        text, canvas = config.text, config.canvas_length
        shapes = zip(text.num_key_value_heads, text.head_dims, strict=True)
        empty = [torch.zeros(rows, heads, canvas, dim, device=device, dtype=dtype) for heads, dim in shapes]
        self.layers = [(k, k.clone()) for k in empty]

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)

    def select(self, rows: Sequence[int]) -> TorchCache:
        """A copy of these rows, in this order."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            layers = [(k.index_select(0, index), v.index_select(0, index)) for k, v in self.layers]
        return self._like(layers, self.lengths[list(rows)])

    def concat(self, other: TorchCache) -> TorchCache:
        """A cache with the rows of both, as wide as the wider one."""
        with torch.inference_mode():
            layers = [
                (torch.cat(widened((mine[0], others[0]))), torch.cat(widened((mine[1], others[1]))))
                for mine, others in zip(self.layers, other.layers, strict=True)
            ]
        return self._like(layers, np.concatenate([self.lengths, other.lengths]))

    def _like(self, layers: list[tuple[Tensor, Tensor]], lengths: np.ndarray) -> TorchCache:
        new = TorchCache(self.config, 0, self.device, self.dtype)
        new.layers, new.lengths = layers, lengths.copy()
        return new

    # ---- reading

    def prefix(self, turns: list[tuple[Tensor, Tensor]]) -> Prefix:
        """The views and masks of one block behind what is cached now."""
        canvas, text = self.config.canvas_length, self.config.text
        held = {True: self.lengths, False: np.minimum(self.lengths, text.window_keys)}
        extents = {full: int(lengths.max(initial=0)) for full, lengths in held.items()}
        masks = {full: self._visible(lengths, extents[full]) for full, lengths in held.items()}
        kinds = [text.full(i) for i in range(text.num_hidden_layers)]
        keys, values = (
            [pair[side][:, :, : canvas + extents[full]] for pair, full in zip(self.layers, kinds, strict=True)]
            for side in (0, 1)
        )
        return Prefix(keys, values, [masks[full] for full in kinds], turns)

    def _visible(self, lengths: np.ndarray, extent: int) -> Tensor | None:
        if (lengths == extent).all():
            return None
        canvas = self.config.canvas_length
        mask = np.arange(-canvas, extent) < lengths[:, None]
        return torch.from_numpy(mask[:, None, None]).to(self.device)

    # ---- writing

    def chunk(self, width: int, counts: np.ndarray) -> Chunk:
        """Prepare to read ``width`` more tokens, of which the first ``counts`` [B] of each row are real; make room.

        A padding token attends like any other, so that no row of the softmax is empty, but it is never stored.
        """
        text, past = self.config.text, self.lengths
        ring, extent = int(min(past.max(), text.window_keys)), int((past + counts).max())
        self._reserve(extent)
        shared = past[:1] if (past == past[0]).all() else past
        before = torch.from_numpy(shared).to(self.device)[:, None]  # [B or 1, 1]
        positions = before + torch.arange(width, device=self.device)
        q = positions[:, None, :, None]
        slots = torch.arange(ring, device=self.device)
        newest = before - 1
        held = newest - (newest - slots).remainder(text.window_keys)  # the position in each slot of the ring
        in_ring = (held[:, None, None] >= 0) & (held[:, None, None] > q - text.sliding_window)
        in_chunk = (positions[:, None, None] <= q) & (positions[:, None, None] > q - text.sliding_window)
        return Chunk(
            positions=positions,
            full=torch.arange(extent, device=self.device) <= q,
            sliding=torch.cat([in_ring, in_chunk], -1),
            ring=ring,
            extent=extent,
            full_places=self._places(width, counts, None),
            ring_places=self._places(width, counts, text.window_keys),
        )

    def _places(self, width: int, counts: np.ndarray, ring: int | None) -> Places:
        token, canvas = np.arange(width), self.config.canvas_length
        kept = token < counts[:, None]
        if ring is not None:
            kept &= token >= counts[:, None] - ring  # older ones would be overwritten at once
        rows, tokens = np.nonzero(kept)
        slots = self.lengths[rows] + tokens
        slots = canvas + (slots if ring is None else slots % ring)
        return Places(*(torch.from_numpy(index).to(self.device) for index in (rows, tokens, slots)))

    def extend(self, layer: int, k: Tensor, v: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Store a chunk's k, v [B, K, T, d]; the keys, values and mask that its queries see come back."""
        canvas, full = self.config.canvas_length, self.config.text.full(layer)
        places = chunk.full_places if full else chunk.ring_places
        seen = []
        for buffer, new in zip(self.layers[layer], (k, v), strict=True):
            if not full:  # joined before the ring moves on
                seen.append(torch.cat([buffer[:, :, canvas : canvas + chunk.ring], new], 2))
            buffer[places.rows, :, places.slots] = new[places.rows, :, places.tokens]
            if full:
                seen.append(buffer[:, :, canvas : canvas + chunk.extent])
        return seen[0], seen[1], chunk.full if full else chunk.sliding

    def _reserve(self, extent: int) -> None:
        """Room for ``extent`` positions: by doubling, so that few blocks copy; a ring stops at W - 1."""
        canvas, text = self.config.canvas_length, self.config.text
        for i, (k, v) in enumerate(self.layers):
            needed = extent if text.full(i) else min(extent, text.window_keys)
            capacity = k.shape[2] - canvas
            if needed <= capacity:
                continue
            capacity = max(SMALLEST, 2 * capacity, needed)
            capacity = capacity if text.full(i) else min(capacity, text.window_keys)
            self.layers[i] = (padded(k, canvas + capacity), padded(v, canvas + capacity))


def padded(x: Tensor, slots: int) -> Tensor:
    """x [B, K, S, d] with zero slots behind; zeros, for a masked key still multiplies a weight of 0."""
    new = x.new_zeros((*x.shape[:2], slots, x.shape[3]))
    new[:, :, : x.shape[2]] = x
    return new


def widened(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Both with as many slots as the one with more."""
    slots = max(x.shape[2] for x in pair)
    return tuple(x if x.shape[2] == slots else padded(x, slots) for x in pair)
