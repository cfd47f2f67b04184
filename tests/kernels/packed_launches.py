"""What ``packed.py`` launches on the 26B model; see ``compiling.py``."""

from __future__ import annotations

import torch

from cuda_backend.kernels.cards import Card
from cuda_backend.kernels.packed import packed_linear_kernel
from cuda_backend.linear import Quantized
from mlx_diffgemma.formats.encoding import Encoding
from tests.kernels.stored import ENCODINGS, empty

FP8_ONLY = False
SHAPES = ((8192, 2816), (2816, 4096), (4224, 2816), (2816, 2112))  # queries, keys and values; output; dense MLP


def run(rows: int, shape: tuple[int, int], encoding: Encoding, card: Card) -> None:
    weight = empty(shape, encoding)
    assert isinstance(weight, Quantized)
    packed_linear_kernel(torch.empty(rows, shape[1], dtype=torch.bfloat16, device="meta"), weight, card)


def launches(card: Card) -> None:
    for encoding in ENCODINGS:
        run(256, SHAPES[0], encoding, card)
    for shape in SHAPES[1:]:
        for rows in (1, 256, 512):
            run(rows, shape, ENCODINGS[1], card)
    run(4096, SHAPES[0], ENCODINGS[1], card)
    run(4096, SHAPES[0], ENCODINGS[0], card)
