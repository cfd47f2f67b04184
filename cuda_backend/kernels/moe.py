"""The experts: two products over pairs sorted by expert, the first with GeGLU behind it, each reading a weight once.

A canvas brings each of 128 experts about 16 rows, so the time is that of reading the experts. A tile of tokens belongs
to one expert; how many each has is known on the device only, so a program finds its own from ``ends``, and the grid is
as large as any routing can need: what is too much leaves at once. Programs go through all tiles of tokens before the
next rows of the weights, so those that leave are scattered among those that read, and where an expert has two tiles
both read its weight at one time, once from memory. With many tokens they do so in groups of ``TOGETHER`` tiles, and
find their activations in the L2 cache as well.

With activations in FP8 they are quantized again between the products, by ``quantize``: a launch of its own of some
3 MB. The second product could do it on loading, but would repeat it for every tile of rows, 22 times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import Dense, Quantized, Weight, grouped_linear
from .cards import Card
from .jit import tl, triton
from .language import gelu_tanh, narrowed, rounded
from .launch import launch
from .quantize import Fp8Rows, Rows, quantize_kernel, quantize_ops
from .router import Routes
from .unpack import Operand, configuration, operand, product, scaled

OUT = 128  # rows of a weight in one tile; of gate and up, half each
TOGETHER = 16  # tiles of tokens, where there are many rows for each expert


def experts_ops(x: Rows, routes: Routes, gate_up: Weight, down: Weight, dtype: torch.dtype) -> Tensor:
    """Each pair's token through its expert: [N * k, D] in the order of pairs, not weighted, of ``dtype``.

    Args:
        x: [N, D] of ``dtype``, or in FP8; then what goes into ``down`` is quantized as well, per pair.
        gate_up: [E, 2 M, D], gate before up; down: [E, D, M].
    """
    order, top = routes.order.long(), routes.chosen.shape[1]
    gate, up = _grouped(x, order // top, gate_up, routes.ends, dtype).chunk(2, -1)
    act = F.gelu(gate, approximate="tanh") * up
    rows: Rows = quantize_ops(act) if isinstance(x, Fp8Rows) else act
    out = _grouped(rows, torch.arange(len(order), device=order.device), down, routes.ends, dtype)
    return torch.empty_like(out).index_copy_(0, order, out)


def _grouped(x: Rows, at: Tensor, bank: Weight, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows ``at`` of x, which are sorted by expert, through ``bank``. FP8: codes in float32, then the scales."""
    if not isinstance(x, Fp8Rows):
        return grouped_linear(x[at], bank, ends)
    assert isinstance(bank, Quantized)
    codes, scales = bank.parts["weight"].view(torch.float8_e4m3fn), bank.parts["scales"].float()[..., 0]
    total = grouped_linear(x.codes.float()[at], Dense(codes.float()), ends)
    expert = torch.searchsorted(ends, torch.arange(len(at), device=at.device), right=True)
    return (total * x.scales[at] * scales[expert]).to(dtype)


def experts_kernel(x: Rows, routes: Routes, gate_up: Weight, down: Weight, dtype: torch.dtype, card: Card) -> Tensor:
    """As ``experts_ops``, of contiguous tensors and weights that are not ``unsupported``."""
    inner, width = gate_up.shape[1] // 2, gate_up.shape[2]
    act = routes.order.new_empty((len(routes.order), inner), dtype=dtype)
    launch_grouped(_gate_up, x, operand(gate_up, x, card), routes, act, inner, OUT // 2, width, card)
    rows: Rows = quantize_kernel(act, card) if isinstance(x, Fp8Rows) else act
    out = act.new_empty((len(act), width))
    launch_grouped(_down, rows, operand(down, x, card), routes, out, width, OUT, inner, card)
    return out


def launch_grouped(
    kernel, x: Rows, weight: Operand, routes: Routes, out: Tensor, columns: int, step: int, width: int, card: Card
) -> None:
    """``kernel`` over tiles of tokens times tiles of ``step`` of the result's ``columns``; ``width`` is summed over."""
    pairs, experts = len(routes.order), len(routes.ends)
    codes, scales = (x.codes, x.scales) if isinstance(x, Fp8Rows) else (x, None)
    config = configuration(weight, codes, OUT, tokens_of(pairs / experts), card)
    tiles = min(pairs, experts + pairs // config["TOKENS"])  # at most: each expert may have one that is not full
    together = TOGETHER if config["TOKENS"] == 128 else tiles
    launch(
        kernel,
        (triton.cdiv(tiles, together) * together * triton.cdiv(columns, step),),
        codes,
        scales,
        *weight.tensors,
        routes.order,
        routes.ends,
        out,
        experts,
        columns,
        together,
        config=config,
        TOP=routes.chosen.shape[1],
        WIDTH=width,
        BLOCK_E=triton.next_power_of_2(experts),
        **weight.constants,
    )


def tokens_of(mean: float) -> int:
    """Rows of a tile of tokens for ``mean`` rows of an expert. Half as much again fits: many experts have more."""
    return next((tokens for tokens in (16, 32, 64) if 3 * mean <= 2 * tokens), 128)


@triton.jit
def _gate_up(
    x,
    x_scale,
    weight,
    scales,
    biases,
    row_scale,
    order,
    ends,
    act,
    experts,
    inner,
    together,
    TOP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    VALUE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """gelu(gate) * up [N * k, inner] of sorted pairs. A tile has as many rows of gate as of up: of the same columns."""
    HALF: tl.constexpr = OUT // 2
    DTYPE: tl.constexpr = act.dtype.element_ty
    tile, across = place_of(tl.program_id(0), together, tl.cdiv(inner, HALF))
    expert, first, end = tile_of(tile, ends, experts, TOKENS, BLOCK_E)
    if expert >= experts:
        return
    place = first + tl.arange(0, TOKENS)
    inside = place < end
    token = (tl.load(order + place, mask=inside, other=0) // TOP).to(tl.int64)
    corner = across * HALF
    at = tl.arange(0, OUT)
    row = at // HALF * inner + tl.minimum(corner + at % HALF, inner - 1)  # behind the edge, the last one again
    rows = expert.to(tl.int64) * (2 * inner) + row
    acc = product(x, token, inside, weight, scales, biases, rows, WIDTH, VALUE, SCALE, GROUP, OUT, TOKENS, BLOCK_K)
    acc = scaled(acc, row_scale, rows, x_scale, token, inside)
    gate, up = acc.reshape(2, HALF, TOKENS).permute(1, 2, 0).split()
    value = rounded(gelu_tanh(rounded(gate, DTYPE)), DTYPE) * rounded(up, DTYPE)
    column = corner + tl.arange(0, HALF)
    kept = inside[None, :] & (column < inner)[:, None]
    tl.store(act + place.to(tl.int64)[None, :] * inner + column[:, None], narrowed(value, DTYPE), mask=kept)


@triton.jit
def _down(
    x,
    x_scale,
    weight,
    scales,
    biases,
    row_scale,
    order,
    ends,
    out,
    experts,
    columns,
    together,
    TOP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    VALUE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sorted rows [N * k, WIDTH] to [N * k, columns] in the order of pairs."""
    tile, across = place_of(tl.program_id(0), together, tl.cdiv(columns, OUT))
    expert, first, end = tile_of(tile, ends, experts, TOKENS, BLOCK_E)
    if expert >= experts:
        return
    place = (first + tl.arange(0, TOKENS)).to(tl.int64)
    inside = place < end
    column = across * OUT + tl.arange(0, OUT)
    rows = expert.to(tl.int64) * columns + tl.minimum(column, columns - 1)
    acc = product(x, place, inside, weight, scales, biases, rows, WIDTH, VALUE, SCALE, GROUP, OUT, TOKENS, BLOCK_K)
    acc = scaled(acc, row_scale, rows, x_scale, place, inside)
    pair = tl.load(order + place, mask=inside, other=0).to(tl.int64)
    kept = inside[None, :] & (column < columns)[:, None]
    tl.store(out + pair[None, :] * columns + column[:, None], narrowed(acc, out.dtype.element_ty), mask=kept)


@triton.jit
def place_of(program, together, across):
    """The tile of tokens and the tile of columns of a program: ``together`` of the first for each of the second."""
    group = together * across
    return program // group * together + program % together, program % group // together


@triton.jit
def tile_of(tile, ends, experts, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert of a tile of tokens, the tile's first row, and the end of the expert's; beyond the last expert if
    there are not so many tiles."""
    at = tl.arange(0, BLOCK_E)
    end = tl.load(ends + at, mask=at < experts, other=0)
    start = tl.load(ends + at - 1, mask=(at < experts) & (at > 0), other=0)
    behind = tl.cumsum(tl.where(at < experts, tl.cdiv(end - start, TOKENS), 0), 0)  # tiles up to and with an expert's
    expert = tl.sum((behind <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(behind <= tile, behind, 0), 0)
    known = tl.minimum(expert, experts - 1)
    first = tl.load(ends + known - 1, mask=known > 0, other=0) + (tile - before) * TOKENS
    return expert, first, tl.load(ends + known)
