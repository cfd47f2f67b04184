"""The noise: Philox4x32-10 over (seed; position, step, block, attempt and purpose), one 32-bit word per position.

Counter-based, so every backend draws the same bits for a position, whatever the batch, the masks or the step before.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and Random123's vectors.
This NumPy version is the specification; ``noise.py`` of each backend says the same in its own operations.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np

M0, M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
W0, W1 = 0x9E3779B9, 0xBB67AE85  # key increments
ROUNDS = 10
INIT, DRAW, RENOISE = 0, 1, 2  # purposes: start token, inverse-CDF draw, token of a rejected position
MASK = 0xFFFFFFFF


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """``counter`` uint32 [..., 4] and a two-word key give uint32 [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * np.uint64(M0), c2 * np.uint64(M1)
        c0 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c2 = (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & np.uint64(MASK), p0 & np.uint64(MASK)
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def key_of(seed: int) -> tuple[int, int]:
    """The Philox key of a seed: its low and high 32 bits."""
    return seed & MASK, (seed >> 32) & MASK


def bits(seed: int, *, length: int, steps: int, block: int, attempt: int, purpose: int) -> np.ndarray:
    """uint32 [steps, length]: word 0 of every (position, step) of a block."""
    counter = np.zeros((steps, length, 4), np.uint32)
    counter[..., 0] = np.arange(length)
    counter[..., 1] = np.arange(steps)[:, None]
    counter[..., 2] = block
    counter[..., 3] = (attempt << 2) | purpose
    return philox(counter, key_of(seed))[..., 0]


def uniform(words: np.ndarray) -> np.ndarray:
    """float32 in [0, 1), from the upper 24 bits."""
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def token(words: np.ndarray, vocab_size: int) -> np.ndarray:
    """int32 ids in [0, V): the upper word of bits x V. Off from uniform by less than V / 2^32."""
    return ((words.astype(np.uint64) * np.uint64(vocab_size)) >> np.uint64(32)).astype(np.int32)


@dataclass(frozen=True)
class BlockNoise:
    """All noise of one row's block: step 0 reads ``start``, step s draws by ``draw[s]``, renoises to ``renoise[s]``."""

    start: np.ndarray  # int32 [C]
    draw: np.ndarray  # float32 [N, C]
    renoise: np.ndarray  # int32 [N, C]


def block_noise(seed: int, *, block: int, attempt: int, steps: int, length: int, vocab_size: int) -> BlockNoise:
    def words(count: int, purpose: int) -> np.ndarray:
        return bits(seed, length=length, steps=count, block=block, attempt=attempt, purpose=purpose)

    return BlockNoise(
        start=token(words(1, INIT)[0], vocab_size),
        draw=uniform(words(steps, DRAW)),
        renoise=token(words(steps, RENOISE), vocab_size),
    )


def fresh_seed() -> int:
    """A 64-bit seed for a call that names none; it is reported in the result's stats."""
    return secrets.randbits(63)
