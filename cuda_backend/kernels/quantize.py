"""Activations in FP8: e4m3 with one float32 scale per token, found from the token itself (W8A8 "dynamic").

scale = max |x| / 448, codes = round(x / scale): compressed-tensors, strategy "token"; the numbers that vLLM multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cards import Card
from .jit import tl, triton
from .language import to_e4m3
from .launch import Config, launch

LARGEST = 448.0
LEAST = 1e-12  # of a row's greatest value, so that a row of zeros has a scale


@dataclass(frozen=True)
class Fp8Rows:
    """Rows [N, D] as ``codes`` (float8_e4m3fn) times ``scales`` (float32 [N, 1])."""

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scales).to(dtype)


Rows = Tensor | Fp8Rows  # what a product reads: [N, D]


def quantize_ops(x: Tensor) -> Fp8Rows:
    """x [N, D] in any float dtype."""
    wide = x.float()
    greatest = wide.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    scales = greatest / greatest.new_full((), LARGEST)  # by a number, CUDA would multiply with its reciprocal
    return Fp8Rows((wide / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales)


def quantize_kernel(x: Tensor, card: Card) -> Fp8Rows:
    """As ``quantize_ops``; x is contiguous."""
    rows, width = x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = x.new_empty((rows, 1), dtype=torch.float32)
    config = Config({"BLOCK": triton.next_power_of_2(width)}, num_warps=4)
    launch(_quantize, (rows,), x, codes, scales, width, config=config)
    return Fp8Rows(codes, scales)


@triton.jit
def _quantize(x, codes, scales, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    code, scale = e4m3_row(value)
    tl.store(codes + row * width + at, code, mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def e4m3_row(value):
    """A row of float32, zeros behind its end -> codes and their scale."""
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(value), 0), 1e-12), 448.0)
    return to_e4m3(tl.div_rn(value, scale)), scale
