"""What ``moe.py`` launches on the 26B model; see ``compiling.py``."""

from __future__ import annotations

import torch

from cuda_backend.kernels.cards import Card
from cuda_backend.kernels.moe import experts_kernel
from cuda_backend.kernels.quantize import Fp8Rows, Rows
from cuda_backend.kernels.router import Routes
from mlx_diffgemma.formats.encoding import Encoding
from tests.kernels.stored import ENCODINGS, FP8, empty

FP8_ONLY = False
EXPERTS, TOP, WIDTH, INNER = 128, 8, 2816, 704
CANVAS = 256


def run(tokens: int, encoding: Encoding | None, card: Card, fp8_rows: bool = False) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    routes = Routes(meta(tokens, TOP, dtype=torch.float32), meta(tokens, TOP), meta(tokens * TOP), meta(EXPERTS))
    x: Rows = meta(tokens, WIDTH, dtype=torch.bfloat16)
    if fp8_rows:
        x = Fp8Rows(meta(tokens, WIDTH, dtype=torch.float8_e4m3fn), meta(tokens, 1, dtype=torch.float32))
    gate_up, down = (empty((EXPERTS, *shape), encoding) for shape in ((2 * INNER, WIDTH), (WIDTH, INNER)))
    experts_kernel(x, routes, gate_up, down, torch.bfloat16, card)


def launches(card: Card) -> None:
    for encoding in (None, *ENCODINGS):
        run(CANVAS, encoding, card)
    for tokens in (1, 2 * CANVAS, 16 * CANVAS):  # other tiles
        run(tokens, ENCODINGS[1], card)
    for encoding in (None, FP8):
        run(16 * CANVAS, encoding, card)
    if card.fp8:
        for tokens in (1, CANVAS, 2 * CANVAS, 16 * CANVAS):
            run(tokens, FP8, card, fp8_rows=True)
