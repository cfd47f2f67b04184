"""What ``norm.py`` launches on the 26B model; see ``compiling.py``."""

import itertools

import torch

from cuda_backend.kernels.cards import Card
from cuda_backend.kernels.norm import (
    AfterAttention,
    AfterExperts,
    after_attention_kernel,
    after_experts_kernel,
    norm_kernel,
)

FP8_ONLY = False
WIDTH, ROWS, TOP, EPS = 2816, 256, 8, 1e-6


def launches(card: Card) -> None:
    def rows(count: int) -> torch.Tensor:
        return torch.empty(count, WIDTH, dtype=torch.bfloat16, device="meta")

    h, weight = rows(ROWS), torch.empty(WIDTH, device="meta")
    odds = torch.empty(ROWS, TOP, device="meta")
    scalar = torch.empty(ROWS, dtype=torch.bfloat16, device="meta")
    after = AfterAttention(weight, weight, weight, weight.to(torch.bfloat16))
    choices = (False, True) if card.fp8 else (False,)
    norm_kernel(h, None, EPS, False, card)
    for fp8 in choices:
        norm_kernel(h, weight, EPS, fp8, card)
        for following in (weight, None):
            norms = AfterExperts(weight, weight, weight)
            after_experts_kernel(h, h, rows(ROWS * TOP), odds, norms, scalar, EPS, following, fp8, card)
    for dense, experts in itertools.product(choices, choices):
        after_attention_kernel(h, h, after, EPS, dense, experts, card)
