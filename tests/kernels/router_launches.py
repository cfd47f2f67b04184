"""What ``router.py`` launches on the 26B model; see ``compiling.py``."""

import torch

from cuda_backend.kernels.cards import Card
from cuda_backend.kernels.router import route_kernel

FP8_ONLY = False


def launches(card: Card) -> None:
    scale = torch.empty(128, dtype=torch.bfloat16, device="meta")
    for tokens in (1, 256, 512, 8192):
        route_kernel(torch.empty(tokens, 128, dtype=torch.bfloat16, device="meta"), scale, 8, card)
