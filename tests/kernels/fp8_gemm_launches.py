"""What ``fp8_gemm.py`` launches on the 26B model, for every card's tiles; see ``compiling.py``."""

import torch

from cuda_backend.kernels.cards import Card
from cuda_backend.kernels.fp8_gemm import fp8_linear_kernel
from cuda_backend.kernels.quantize import Fp8Rows

FP8_ONLY = True
WIDTH = 2816
SHAPES = (  # [out, in]: queries, keys and values of both kinds, outputs of both kinds, gate and up, down
    (8192, WIDTH),
    (9216, WIDTH),
    (WIDTH, 4096),
    (WIDTH, 8192),
    (4224, WIDTH),
    (WIDTH, 2112),
)


def launches(card: Card) -> None:
    for rows in (256, 512, 16 * 256):
        for out, inner in SHAPES:
            x = Fp8Rows(
                torch.empty(rows, inner, dtype=torch.float8_e4m3fn, device="meta"),
                torch.empty(rows, 1, device="meta"),
            )
            weight = torch.empty(out, inner, dtype=torch.float8_e4m3fn, device="meta")
            fp8_linear_kernel(x, weight, torch.empty(out, 1, device="meta"), torch.bfloat16, card)
