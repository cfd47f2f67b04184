"""The product of FP8 activations with an FP8 weight (W8A8): one scale per token, one per output column.

Codes are multiplied and summed in float32, the sum is scaled and rounded once. torch has this product
(``torch._scaled_mm`` with scales per row); ``_fp8_linear`` is its twin in Triton, for cards where torch's cannot serve.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mlx_diffgemma.errors import BackendError

from .cards import Card
from .jit import tl, triton
from .language import dot, narrowed
from .launch import Config, launch
from .quantize import Fp8Rows

STEP = 16  # both sizes of a weight must be multiples of it: torch's product reads 16 bytes at a time

# Who multiplies, per card. Nobody has timed the two against each other yet, and only a measurement may change a row;
# but 89 stays where it is for torch < 2.12, whose row-wise product on that card does not keep to the current stream
# (pytorch issue 177651), so that a CUDA graph cannot hold it. torch's path on the others: cuBLASLt or CUTLASS on 90,
# CUTLASS on 100 and 120 (from torch 2.8).
TORCHS = {89: False, 90: True, 100: True, 120: True}


def tile(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps, num_stages)


# Tiles of the twin per card, in order of size; chosen for the shared memory they take, not timed. On 90 and 100 a stage
# is a buffer: 128, 96 and 80 KiB, of the last two two programs fit a processor. On 89 and 120 it is one buffer fewer:
# 64, 48 and 32 KiB of the 99 there are.
LARGE = (tile(128, 128, 128, 8, 4), tile(128, 64, 128, 4, 4), tile(64, 64, 128, 4, 5))
SMALL = (tile(128, 128, 128, 8, 3), tile(128, 64, 128, 4, 3), tile(64, 64, 128, 4, 3))
TILES = {89: SMALL, 90: LARGE, 100: LARGE, 120: SMALL}


def fits(out: int, inner: int) -> bool:
    """Whether a weight [out, inner] can be multiplied in FP8."""
    return out > 0 and inner > 0 and out % STEP == 0 and inner % STEP == 0


def fp8_linear_ops(x: Fp8Rows, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x [N, in] times the transposed ``codes`` [out, in] (e4m3, or their bytes): [N, out] in ``dtype``.

    ``scales`` [out] or [out, 1] belong to the columns of the result.
    """
    total = x.codes.float() @ codes.view(torch.float8_e4m3fn).float().T
    return (total * x.scales * scales.float().view(1, -1)).to(dtype)


def fp8_linear(x: Fp8Rows, codes: Tensor, scales: Tensor, dtype: torch.dtype, card: Card) -> Tensor:
    """As ``fp8_linear_ops``, by whichever the table has for the card."""
    if not fits(*codes.shape):
        raise BackendError(f"an FP8 product needs sizes that are multiples of {STEP}, not {tuple(codes.shape)}")
    return implementation(x, dtype, card)(x, codes, scales, dtype, card)


def implementation(x: Fp8Rows, dtype: torch.dtype, card: Card) -> Callable[..., Tensor]:
    """On a GPU torch's is asked for bfloat16 alone, which is all that older ones give; on a CPU it gives any dtype."""
    return fp8_linear_torch if TORCHS[card.sm] and (dtype == torch.bfloat16 or x.codes.is_cpu) else fp8_linear_kernel


def fp8_linear_torch(x: Fp8Rows, codes: Tensor, scales: Tensor, dtype: torch.dtype, card: Card) -> Tensor:
    """torch's own: A [N, in] by rows, B [in, out] by columns, scales float32 [N, 1] and [1, out]."""
    weight = codes.view(torch.float8_e4m3fn)
    columns = scales.float().view(1, -1)
    # the fast accumulator of Hopper's tensor cores has 14 bits of mantissa
    return torch._scaled_mm(x.codes, weight.t(), x.scales, columns, out_dtype=dtype, use_fast_accum=False)


def fp8_linear_kernel(x: Fp8Rows, codes: Tensor, scales: Tensor, dtype: torch.dtype, card: Card) -> Tensor:
    """The twin; sizes need not be multiples of anything."""
    weight = codes.view(torch.float8_e4m3fn)
    assert x.codes.is_contiguous() and x.scales.is_contiguous() and weight.is_contiguous()
    (rows, depth), width = x.shape, weight.shape[0]
    assert weight.shape[1] == depth and scales.numel() == width and scales.is_contiguous()
    out = x.codes.new_empty((rows, width), dtype=dtype)
    config = fp8_config(rows, width, card)
    grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(width, config["BLOCK_N"]),)
    launch(_fp8_linear, grid, x.codes, x.scales, weight, scales, out, rows, width, depth, config=config)
    return out


def fp8_config(rows: int, width: int, card: Card) -> Config:
    """The largest tile that gives work to three quarters of the processors, else the smallest."""
    tiles = TILES[card.sm]
    for config in tiles[:-1]:
        count = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(width, config["BLOCK_N"])
        if 4 * count >= 3 * card.processors:
            return config
    return tiles[-1]


@triton.jit
def _fp8_linear(
    x,
    x_scales,
    weight,
    w_scales,
    out,
    rows,
    width,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M  # tiles of the same columns run together: few rows
    column = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_rows, in_columns = first + m < rows, column + n < width
    left = x + first * depth + m[:, None] * depth + k[None, :]
    right = weight + column * depth + n[None, :] * depth + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = k < depth - start
        a = tl.load(left + start, mask=in_rows[:, None] & inside[None, :], other=0.0)
        b = tl.load(right + start, mask=inside[:, None] & in_columns[None, :], other=0.0)
        acc = dot(a, b, acc)
    acc *= tl.load(x_scales + first + m, mask=in_rows, other=0.0)[:, None]
    acc *= tl.load(w_scales + column + n, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    there = out + first * width + column + m[:, None] * width + n[None, :]
    tl.store(there, narrowed(acc, out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])
