"""A product with a packed weight that is unpacked on the way: for rows too few to pay for unpacking it to memory first.

Many rows are better served by ``weight.dense`` and the vendor's product: a weight is unpacked here once for every tile
of tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..linear import Quantized
from .cards import Card
from .jit import tl, triton
from .language import narrowed
from .launch import launch
from .unpack import configuration, operand, product, scaled

TILES = ((128, 128), (64, 128), (64, 64), (64, 32))  # rows of the weight and of x, from the cheapest a value


def packed_linear_ops(x: Tensor, weight: Quantized) -> Tensor:
    """x [N, in] times the transposed weight [out, in]: [N, out], of the dtype of x."""
    return F.linear(x, weight.dense(x.dtype))


def packed_linear_kernel(x: Tensor, weight: Quantized, card: Card) -> Tensor:
    """As ``packed_linear_ops``, of contiguous tensors and a weight that is not ``unsupported``."""
    rows, (columns, width) = len(x), weight.shape
    out = x.new_empty((rows, columns))
    read = operand(weight, x, card)
    config = configuration(read, x, *tile(rows, columns, card), card)
    across = triton.cdiv(rows, config["TOKENS"])
    launch(
        _linear,
        (across * triton.cdiv(columns, config["OUT"]),),
        x,
        *read.tensors,
        out,
        rows,
        columns,
        config=config,
        WIDTH=width,
        **read.constants,
    )
    return out


def tile(rows: int, columns: int, card: Card) -> tuple[int, int]:
    """The largest tile with which each multiprocessor has one, for the fewer tiles, the less is unpacked twice."""
    fitting = [(out, tokens) for out, tokens in TILES if tokens < 2 * rows] or [(64, 16)]
    busy = (size for size in fitting if triton.cdiv(columns, size[0]) * triton.cdiv(rows, size[1]) >= card.processors)
    return next(busy, fitting[-1])


@triton.jit
def _linear(
    x,
    weight,
    scales,
    biases,
    row_scale,
    out,
    count,
    columns,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile; tiles of the same rows of the weight are neighbours, and all but the first find them in the cache."""
    across = tl.cdiv(count, TOKENS)
    token = (tl.program_id(0) % across * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = token < count
    column = tl.program_id(0) // across * OUT + tl.arange(0, OUT)
    rows = tl.minimum(column, columns - 1).to(tl.int64)  # behind the edge, the last one again
    acc = product(x, token, inside, weight, scales, biases, rows, WIDTH, VALUE, SCALE, GROUP, OUT, TOKENS, BLOCK_K)
    acc = scaled(acc, row_scale, rows, None, token, inside)
    kept = inside[None, :] & (column < columns)[:, None]
    tl.store(out + token[None, :] * columns + column[:, None], narrowed(acc, out.dtype.element_ty), mask=kept)
