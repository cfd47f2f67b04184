"""Keys and values: ragged, each row from position 0 in its own slots, read in place by every denoising step.

A layer has buffers [B, K, C + capacity, d]. Slots 0 .. C - 1 belong to the canvas, which writes its own keys there at
each step; the prefix follows: position p lies in slot C + p of a full layer, and in C + p mod (W - 1) of a sliding
layer, a ring. So one attention call reads one slice, and nothing is joined or moved. Keys are stored turned (RoPE), so
the order of a ring does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mlx_diffgemma.config import ModelConfig

SMALLEST = 64  # slots of a new buffer; from there it doubles
LEAST = {
    "cpu": 64,
    "meta": 64,
    "cuda": 4096,
}  # the same of a whole one: most conversations fit, and find the graphs of the last


Turns = dict[bool, tuple[Tensor, Tensor]]  # cos and sin [B or 1, T, 1, d / 2] of full layers and of sliding ones


@dataclass(frozen=True)
class Prefix:
    """What a canvas sees during one block; made once, at its beginning. Dictionaries are by whether a layer is full."""

    keys: list[Tensor] = field(metadata={"shared": True})  # views [B, K, C + slots, d], by layer
    values: list[Tensor] = field(metadata={"shared": True})
    lengths: dict[bool, Tensor | None]  # int32 [B], slots behind the canvas that hold a token; None where all do
    turns: Turns  # of the canvas's positions


@dataclass(frozen=True)
class Chunk:
    """Tokens that join the cache together: where they stand, and where their keys and values go.

    A token that is not kept, padding or one that the ring would overwrite at once, goes to slot 0: the canvas writes
    its own keys there before it looks. So no shape depends on how many are kept.
    """

    positions: Tensor  # int64 [B or 1, T]
    rows: Tensor  # int64 [B, 1], 0 .. B - 1
    before: Tensor  # int32 [B], tokens cached before the chunk
    full_slots: Tensor  # int64 [B, T]
    ring_slots: Tensor  # int64 [B, T]
    held: tuple[int, int]  # most slots in use before the chunk: of a full layer, of a ring


class TorchCache:
    """See the module. ``scores`` float32 [B, L] is set by an encode that was asked to.

    ``whole``: hand out whole buffers, whose shapes do not change from block to block, as a CUDA graph needs them, and
    have few sizes of them; else only the slots in use, so that plain operations read no more than there is.
    """

    def __init__(
        self, config: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype, *, whole: bool = False
    ):
        self.config, self.device, self.dtype, self.whole = config, device, dtype, whole
        self.lengths = np.zeros(rows, np.int64)
        self.scores: np.ndarray | None = None
        self.owed = False  # tokens are counted in ``lengths`` whose keys and values the next step will bring
        text, canvas = config.text, config.canvas_length
        shapes = zip(text.num_key_value_heads, text.head_dims, strict=True)
        empty = [torch.zeros(rows, heads, canvas, dim, device=device, dtype=dtype) for heads, dim in shapes]
        self.layers = [(k, k.clone()) for k in empty]

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)

    def select(self, rows: Sequence[int]) -> TorchCache:
        """A copy of these rows, in this order."""
        assert not self.owed, "the first step of the block has not been taken"
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            layers = [(k.index_select(0, index), v.index_select(0, index)) for k, v in self.layers]
        return self._like(layers, self.lengths[list(rows)])

    def concat(self, other: TorchCache) -> TorchCache:
        """A cache with the rows of both, as wide as the wider one."""
        assert not self.owed and not other.owed, "the first step of the block has not been taken"
        with torch.inference_mode():
            layers = [
                (torch.cat(widened((mine[0], others[0]))), torch.cat(widened((mine[1], others[1]))))
                for mine, others in zip(self.layers, other.layers, strict=True)
            ]
        return self._like(layers, np.concatenate([self.lengths, other.lengths]))

    def _like(self, layers: list[tuple[Tensor, Tensor]], lengths: np.ndarray) -> TorchCache:
        new = TorchCache(self.config, 0, self.device, self.dtype, whole=self.whole)
        new.layers, new.lengths = layers, lengths.copy()
        return new

    # ---- reading

    def prefix(self, turns: Turns) -> Prefix:
        """The views of one block behind what is cached now."""
        text = self.config.text
        held = {True: self.lengths, False: np.minimum(self.lengths, text.window_keys)}
        extents = {full: int(lengths.max(initial=0)) for full, lengths in held.items()}
        counts = {full: self._counts(lengths, extents[full]) for full, lengths in held.items()}
        views = [self._view(i, extents[text.full(i)]) for i in range(text.num_hidden_layers)]
        return Prefix([k for k, _ in views], [v for _, v in views], counts, turns)

    def _counts(self, lengths: np.ndarray, extent: int) -> Tensor | None:
        if not self.whole and (lengths == extent).all():
            return None
        return torch.from_numpy(lengths.astype(np.int32)).to(self.device)

    def _view(self, layer: int, extent: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer up to ``extent`` slots behind the canvas; all of them where shapes are fixed."""
        k, v = self.layers[layer]
        end = k.shape[2] if self.whole else self.config.canvas_length + extent
        return k[:, :, :end], v[:, :, :end]

    def seen(self, layer: int, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """What a chunk finds in the cache."""
        return self._view(layer, chunk.held[0 if self.config.text.full(layer) else 1])

    # ---- writing

    def chunk(self, width: int, counts: np.ndarray) -> Chunk:
        """Prepare to read ``width`` more tokens, of which the first ``counts`` [B] of each row are real; make room."""
        text, past = self.config.text, self.lengths
        self.reserve(int((past + counts).max()))
        shared = past[:1] if (past == past[0]).all() and not self.whole else past
        before = torch.from_numpy(shared).to(self.device)[:, None]  # [B or 1, 1]
        return Chunk(
            positions=before + torch.arange(width, device=self.device),
            rows=torch.arange(len(past), device=self.device)[:, None],
            before=torch.from_numpy(past.astype(np.int32)).to(self.device),
            full_slots=self._slots(width, counts, None),
            ring_slots=self._slots(width, counts, text.window_keys),
            held=(int(past.max()), int(min(past.max(), text.window_keys))),
        )

    def _slots(self, width: int, counts: np.ndarray, ring: int | None) -> Tensor:
        token = np.arange(width)
        kept = token < counts[:, None]
        slots = self.lengths[:, None] + token
        if ring is not None:
            kept &= token >= counts[:, None] - ring  # older ones would be overwritten at once
            slots = slots % ring
        return torch.from_numpy(np.where(kept, self.config.canvas_length + slots, 0)).to(self.device)

    def scratch(self, layer: int, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Room for a chunk's own keys and values [B, K, T, d], until it has attended."""
        k = self.layers[layer][0]
        shape = (*k.shape[:2], chunk.full_slots.shape[1], k.shape[3])
        return k.new_empty(shape), k.new_empty(shape)

    def store(self, layer: int, k: Tensor, v: Tensor, chunk: Chunk) -> None:
        """A chunk's k, v [B, K, T, d] to their slots."""
        slots = chunk.full_slots if self.config.text.full(layer) else chunk.ring_slots
        for buffer, new in zip(self.layers[layer], (k, v), strict=True):
            buffer[chunk.rows, :, slots] = new.transpose(1, 2)

    def reserve(self, extent: int) -> None:
        """Room for ``extent`` positions."""
        canvas, text = self.config.canvas_length, self.config.text
        for i, (k, v) in enumerate(self.layers):
            limit = None if text.full(i) else text.window_keys
            held = k.shape[2] - canvas
            slots = capacity(held, extent, limit, self.whole, self.device.type)
            if slots > held:
                self.layers[i] = (padded(k, canvas + slots), padded(v, canvas + slots))

    def twin(self) -> TorchCache:
        """Another cache with the same buffers."""
        return self._like(list(self.layers), self.lengths)


def capacity(held: int, extent: int, limit: int | None, whole: bool, device: str) -> int:
    """Slots of a buffer that has ``held`` and needs ``extent``: it doubles, so that few blocks copy.

    Those of ``whole`` ones are powers of two. A ring stops at ``limit``.
    """
    needed = extent if limit is None else min(extent, limit)
    if needed <= held:
        return held
    slots = max(LEAST[device] if whole else SMALLEST, 2 * held, needed)
    slots = 1 << (slots - 1).bit_length() if whole else slots
    return slots if limit is None else min(slots, limit)


def padded(x: Tensor, slots: int) -> Tensor:
    """x [B, K, S, d] with zero slots behind; zeros, for a masked key still multiplies a weight of 0."""
    new = x.new_zeros((*x.shape[:2], slots, x.shape[3]))
    new[:, :, : x.shape[2]] = x
    return new


def widened(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Both with as many slots as the one with more."""
    slots = max(x.shape[2] for x in pair)
    return tuple(x if x.shape[2] == slots else padded(x, slots) for x in pair)
