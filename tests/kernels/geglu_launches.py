"""What ``geglu.py`` launches on the 26B model; see ``compiling.py``."""

import torch

from cuda_backend.kernels.cards import Card
from cuda_backend.kernels.geglu import geglu_kernel

FP8_ONLY = False


def launches(card: Card) -> None:
    mixed = torch.empty(256, 2 * 2112, dtype=torch.bfloat16, device="meta")
    for fp8 in (False, True) if card.fp8 else (False,):
        geglu_kernel(mixed, fp8, card)
