"""What ``quantize.py`` launches on the 26B model; see ``compiling.py``."""

import torch

from cuda_backend.kernels.cards import Card
from cuda_backend.kernels.quantize import quantize_kernel

FP8_ONLY = True  # nothing of it runs on a card without FP8


def launches(card: Card) -> None:
    for width in (4096, 8192):  # attention's heads, joined
        quantize_kernel(torch.empty(256, width, dtype=torch.bfloat16, device="meta"), card)
