"""The noise of ``mlx_diffgemma.sampling.noise``, bit for bit, made on the device for a whole batch at once.

torch has no unsigned 64-bit arithmetic, but the low 64 bits of a product do not depend on the sign, so 32-bit words
are held in int64 and the high word is masked after the shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlx_diffgemma.backend import CanvasSpec
from mlx_diffgemma.sampling.noise import DRAW, INIT, M0, M1, MASK, RENOISE, ROUNDS, W0, W1, key_of


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four counter words and two key words, int64 tensors of values below 2^32 that broadcast; four words come back."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * M0, c2 * M1
        c0, c1 = (p1 >> 32) & MASK ^ c1 ^ k0, p1 & MASK
        c2, c3 = (p0 >> 32) & MASK ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c0, c1, c2, c3


def uniform(words: Tensor) -> Tensor:
    """float32 in [0, 1), from the upper 24 bits."""
    return (words >> 8).float() * 2**-24


def token(words: Tensor, vocab_size: int) -> Tensor:
    """int32 ids in [0, V)."""
    return ((words * vocab_size) >> 32).int()


@dataclass(frozen=True)
class BatchNoise:
    """All noise of one block of a batch; see ``mlx_diffgemma.sampling.noise.BlockNoise``."""

    start: Tensor  # int32 [B, C]
    draw: Tensor  # float32 [N, B, C]
    renoise: Tensor  # int32 [N, B, C]


def batch_noise(
    specs: Sequence[CanvasSpec], *, steps: int, length: int, vocab_size: int, device: torch.device
) -> BatchNoise:
    def column(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)[:, None]

    low, high = zip(*(key_of(spec.seed) for spec in specs), strict=True)
    key = column(low), column(high)
    block, attempt = column([spec.block for spec in specs]), column([spec.attempt << 2 for spec in specs])
    position = torch.arange(length, device=device)

    # One call for all three: the start, then the draws of all steps, then what rejected positions become.
    step = torch.cat([torch.arange(n, device=device) for n in (1, steps, steps)])[:, None, None]
    purpose = torch.tensor([INIT] + [DRAW] * steps + [RENOISE] * steps, device=device)[:, None, None]
    words = philox((position, step, block, attempt | purpose), key)[0]
    return BatchNoise(
        start=token(words[0], vocab_size),
        draw=uniform(words[1 : 1 + steps]),
        renoise=token(words[1 + steps :], vocab_size),
    )
