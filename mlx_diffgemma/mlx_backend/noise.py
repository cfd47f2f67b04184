"""Philox4x32-10 in MLX operations: the same bits as ``sampling.noise``, for all rows of a block at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..backend import CanvasSpec
from ..sampling.noise import DRAW, INIT, M0, M1, MASK, RENOISE, ROUNDS, W0, W1, key_of


@dataclass(frozen=True)
class BlockNoise:
    """All noise of a block: ``start`` int32 [B, C], ``draw`` float32 [B, N, C], ``renoise`` int32 [B, N, C]."""

    start: mx.array
    draw: mx.array
    renoise: mx.array


def philox(counter: tuple[mx.array, mx.array, mx.array, mx.array], key: tuple[mx.array, mx.array]) -> mx.array:
    """Word 0 of Philox4x32-10, uint32. Counter and key words are uint64 arrays below 2^32 that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    mask, half = _word(MASK), _word(32)
    for _ in range(ROUNDS):
        p0, p1 = c0 * _word(M0), c2 * _word(M1)
        c0, c1 = (p1 >> half) ^ c1 ^ k0, p1 & mask
        c2, c3 = (p0 >> half) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + _word(W0)) & mask, (k1 + _word(W1)) & mask
    return c0.astype(mx.uint32)


def bits(specs: Sequence[CanvasSpec], *, length: int, steps: int, purpose: int) -> mx.array:
    """uint32 [B, steps, length]: word 0 of every row, step and position."""

    def column(values: list[int]) -> mx.array:
        return mx.array(values, dtype=mx.uint64)[:, None, None]

    counter = (
        mx.arange(length, dtype=mx.uint64)[None, None],
        mx.arange(steps, dtype=mx.uint64)[None, :, None],
        column([spec.block for spec in specs]),
        column([(spec.attempt << 2) | purpose for spec in specs]),
    )
    keys = [key_of(spec.seed) for spec in specs]
    return philox(counter, (column([low for low, _ in keys]), column([high for _, high in keys])))


def uniform(words: mx.array) -> mx.array:
    """float32 in [0, 1), from the upper 24 bits."""
    return (words >> mx.array(8, mx.uint32)).astype(mx.float32) * 2**-24


def token(words: mx.array, vocab_size: int) -> mx.array:
    """int32 ids in [0, V): the upper word of bits x V."""
    return ((words.astype(mx.uint64) * _word(vocab_size)) >> _word(32)).astype(mx.int32)


def block_noise(specs: Sequence[CanvasSpec], *, steps: int, length: int, vocab_size: int) -> BlockNoise:
    """The noise of one block for every row; ``steps`` is the largest step cap among them."""
    return BlockNoise(
        start=token(bits(specs, length=length, steps=1, purpose=INIT)[:, 0], vocab_size),
        draw=uniform(bits(specs, length=length, steps=steps, purpose=DRAW)),
        renoise=token(bits(specs, length=length, steps=steps, purpose=RENOISE), vocab_size),
    )


def _word(value: int) -> mx.array:
    return mx.array(value, dtype=mx.uint64)
