"""What ``attention.py`` launches on the 26B model; see ``compiling.py``."""

from __future__ import annotations

import torch

from cuda_backend.kernels.attention import canvas_attention_kernel, chunk_attention_kernel
from cuda_backend.kernels.cards import Card

FP8_ONLY = False
CANVAS, HEADS = 256, 16
SLIDING, FULL = (8, 256, 1024), (2, 512, None)  # key-value heads, head dimension, window


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(card: Card) -> None:
    for groups, dim, window in (SLIDING, FULL):
        for capacity in (1023, 8192, 262144) if window is None else (64, 1023):
            for rows in (1, 16):
                start(card, rows, groups, dim, window, capacity, (CANVAS, 2048))
    start(card, 1, 2, 512, None, 1023, (CANVAS,), torch.float32)


def start(
    card: Card,
    rows: int,
    groups: int,
    dim: int,
    window: int | None,
    capacity: int,
    chunks: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    keys, values = (empty(rows, groups, CANVAS + capacity, dim, dtype=dtype) for _ in range(2))
    counts = empty(rows, dtype=torch.int32)
    canvas_attention_kernel(empty(rows, CANVAS, HEADS, dim, dtype=dtype), keys, values, counts, card)
    for length in chunks:
        q = empty(rows, length, HEADS, dim, dtype=dtype)
        own_k, own_v = (empty(rows, length, groups, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
        chunk_attention_kernel(q, own_k, own_v, keys, values, counts, window, CANVAS, card)
