"""GeGLU: gelu(gate) * up of a gated MLP, and its quantization where the next product is in FP8."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .cards import Card
from .jit import tl, triton
from .language import gelu_tanh, rounded, to_e4m3
from .launch import Config, launch
from .norm import as_rows, empty_rows
from .quantize import Rows, quantize_ops


def geglu_ops(mixed: Tensor, fp8: bool) -> Rows:
    """``mixed`` [N, 2 I], gates before ups, to [N, I]. Both the gelu and the product are rounded to its dtype."""
    gate, up = mixed.chunk(2, -1)
    act = F.gelu(gate, approximate="tanh") * up
    return quantize_ops(act) if fp8 else act


def geglu_kernel(mixed: Tensor, fp8: bool, card: Card) -> Rows:
    """As ``geglu_ops``; a row per program, for its scale needs all of it."""
    rows, width = mixed.shape[0], mixed.shape[1] // 2
    assert mixed.is_contiguous() and mixed.shape[1] == 2 * width
    out, scales = empty_rows(mixed[:, :width], fp8)
    launch(_geglu, (rows,), mixed, out, scales, config=geglu_config(width), WIDTH=width)
    return as_rows(out, scales)


def geglu_config(width: int) -> Config:
    """2,112 is 2,048 and 64: in two parts, lanes beyond the end need not compute a tanh. The same on every card."""
    main = 1 << (width.bit_length() - 1)
    tail = triton.next_power_of_2(width - main) if width > main else 0
    return Config({"MAIN": main, "TAIL": tail}, num_warps=min(8, max(1, main // 256)))


@triton.jit
def _geglu(mixed, out, scales, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    mixed += row * (2 * WIDTH)
    out += row * WIDTH
    at = tl.arange(0, MAIN)
    value = gated(mixed, at, at < WIDTH, WIDTH)
    greatest = tl.max(tl.abs(value), 0)
    if TAIL:
        behind = MAIN + tl.arange(0, TAIL)
        last = gated(mixed, behind, behind < WIDTH, WIDTH)
        greatest = tl.maximum(greatest, tl.max(tl.abs(last), 0))
    scale = 1.0
    if scales is not None:  # as ``quantize.e4m3_row``, of a row in two parts
        scale = tl.div_rn(tl.maximum(greatest, 1e-12), 448.0)
        tl.store(scales + row, scale)
    store_part(out, at, value, scale, WIDTH, scales is not None)
    if TAIL:
        store_part(out, behind, last, scale, WIDTH, scales is not None)


@triton.jit
def gated(mixed, at, inside, WIDTH: tl.constexpr):
    """Some values of one row, float32; zeros outside."""
    dtype: tl.constexpr = mixed.dtype.element_ty
    gate = tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(mixed + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    return rounded(rounded(gelu_tanh(gate), dtype) * up, dtype)


@triton.jit
def store_part(out, at, value, scale, WIDTH: tl.constexpr, FP8: tl.constexpr):
    if FP8:
        tl.store(out + at, to_e4m3(tl.div_rn(value, scale)), mask=at < WIDTH)
    else:
        tl.store(out + at, value.to(out.dtype.element_ty), mask=at < WIDTH)
