"""What ``heads.py`` launches on the 26B model; see ``compiling.py``."""

import torch

from cuda_backend.kernels.cards import Card
from cuda_backend.kernels.heads import heads_kernel

FP8_ONLY = False
HEADS, LENGTH, SLOTS = 16, 256, 256 + 1023


def launches(card: Card) -> None:
    for groups, dim, matrices in ((8, 256, 2), (2, 512, 1)):  # sliding; full, without values of its own
        for batch in (1, 3):

            def half(*shape: int) -> torch.Tensor:
                return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

            weight, turn = torch.empty(dim, device="meta"), half(batch, LENGTH, 1, dim // 2)
            mixed = half(batch, LENGTH, (HEADS + matrices * groups) * dim)
            buffer = half(batch, groups, SLOTS, dim)
            heads_kernel(mixed, weight, weight, turn, turn, HEADS, groups, 1e-6, buffer, buffer, card)
