"""The two passes of a step over the vocabulary as kernels; ``vocabulary.py`` has them in torch and says what they do.

The products are the library's; the kernels do the rest of a chunk while it is in the L2 cache. One weighs a chunk, one
concludes from all chunks which span each row draws from, one draws there; one turns logits into probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .cards import Card
from .fp8_gemm import fits, fp8_linear, fp8_linear_kernel
from .jit import tl, triton
from .language import INTERPRETED, narrowed, rounded
from .launch import Config, launch
from .logits import (
    BUFFER,
    LOWEST,
    NEVER,
    Bias,
    Cut,
    bias_of_bans,
    ceiling,
    chunks,
    floor,
    log_probabilities,
    logits_chunks,
    plain_cut,
    rows_of,
    soften,
    span_of,
)
from .quantize import Fp8Rows, quantize_kernel
from .vocabulary import FAR, Seen, accumulate, draw, look_ops, soft_ops

__all__ = [
    "NEVER",
    "Bias",
    "Cut",
    "Seen",
    "bias_of_bans",
    "draw",
    "kernel_cut",
    "log_probabilities",
    "logits_chunks",
    "look_kernel",
    "look_ops",
    "plain_cut",
    "soft_kernel",
    "soft_ops",
    "soften",
]

# Ids of one chunk, of the first pass and of the second. With 256 rows the product of 16,384 ids is one wave of tiles
# on 132 processors. The second pass reads a chunk of the table twice, so there it should stay in the L2 cache.
CHUNKS = {80: (8192, 4096), 89: (16384, 8192), 90: (16384, 8192), 100: (16384, 16384), 120: (16384, 16384)}
BLOCK = 2048  # ids of one program, 32 to a thread
TILE = 8192  # numbers of the table that one program of a draw multiplies at a time
LEAST, REMOTE, LOG2_E = tl.constexpr(LOWEST), tl.constexpr(FAR), tl.constexpr(math.log2(math.e))


def kernel_cut(rows: int, table: Tensor, card: Card, second: bool = False) -> Cut:
    chunk = min(CHUNKS[card.sm][second], floor(BUFFER // (table.element_size() * max(1, rows))))
    span = span_of(rows, len(table))
    block = max(span, min(BLOCK, chunk))
    return Cut(span, block, max(block, chunk))


def look_kernel(
    hidden: Tensor,
    table: Tensor,
    cap: float | None,
    *,
    card: Card,
    temperature: Tensor,
    uniform: Tensor,
    bias: Bias | None = None,
    table_fp8: Fp8Rows | None = None,
    cut: Cut | None = None,
) -> Seen:
    """As ``look_ops``; all tensors are contiguous."""
    rows, vocab, cut = len(hidden), len(table), cut or kernel_cut(len(hidden), table, card)
    blocks, spans = triton.cdiv(vocab, cut.block), triton.cdiv(vocab, cut.span)
    sums = hidden.new_empty((rows, spans), dtype=torch.float32)
    peaks = hidden.new_empty((rows, 4, blocks), dtype=torch.float32)
    best = hidden.new_empty((rows, blocks), dtype=torch.int32)
    config = Config({"SPAN": cut.span, "BLOCK": cut.block}, num_warps=2)
    shape = _shape(temperature, bias, cap)
    quantized = None if table_fp8 is None else quantize_kernel(hidden, card)
    for part, x in _products(hidden, table, cut.chunk, quantized, table_fp8, card):
        width = x.shape[1]
        grid = (rows, triton.cdiv(width, cut.block))
        out = (peaks, best, sums, part.start, width, blocks, spans)
        launch(_weigh, grid, x, *shape, *out, config=config)
    fields = [hidden.new_empty(rows, dtype=dtype) for dtype in (torch.int64, torch.int64, *[torch.float32] * 4)]
    argmax, drawn, entropy, confidence, greatest, total = fields
    span, share = hidden.new_empty(rows, dtype=torch.int32), torch.empty_like(entropy)
    sizes = {"BLOCKS": ceiling(blocks), "SPANS": ceiling(spans), "RATIO": cut.block // cut.span}
    results = (argmax, entropy, confidence, greatest, total, span, share)
    read = (hidden, peaks, best, sums, uniform)
    launch(_conclude, (rows,), *read, *results, blocks, spans, config=Config(sizes, num_warps=8))
    left: tuple[Tensor | None, ...] = (hidden, table, None, None)
    if quantized is not None and table_fp8 is not None:
        left = (quantized.codes, table_fp8.codes, quantized.scales, table_fp8.scales)
    config = Config({"SPAN": cut.span, "STEP": min(max(1, TILE // cut.span), ceiling(hidden.shape[1]))}, num_warps=8)
    launch(_draw, (rows,), hidden, *left, *shape, span, share, drawn, vocab, hidden.shape[1], config=config)
    return Seen(argmax, drawn, entropy, confidence, greatest, total)


def soft_kernel(
    hidden: Tensor,
    table: Tensor,
    cap: float | None,
    *,
    card: Card,
    scale: float,
    temperature: Tensor,
    bias: Bias | None,
    seen: Seen,
    table_fp8: Fp8Rows | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """As ``soft_ops``; all tensors are contiguous. Probabilities take the place of the logits they are made of."""
    cut = cut or kernel_cut(len(hidden), table, card, second=True)
    mean = torch.zeros_like(hidden, dtype=torch.float32)
    shape = _shape(temperature, bias, cap)
    config = Config({"BLOCK": cut.block}, num_warps=2)
    quantized = None if table_fp8 is None else quantize_kernel(hidden, card)
    for part, x in _products(hidden, table, cut.chunk, quantized, table_fp8, card):
        width = x.shape[1]
        grid = (len(hidden), triton.cdiv(width, cut.block))
        launch(_odds, grid, x, *shape, seen.greatest, seen.total, part.start, width, config=config)
        accumulate(mean, x, table[part])
    return mean.to(hidden.dtype) * scale


def _shape(temperature: Tensor, bias: Bias | None, cap: float | None) -> tuple[Tensor | float | int | None, ...]:
    """What the kernels make y with, in the order of their arguments."""
    added = (None, None, None) if bias is None else (bias.classes, bias.values, bias.values.shape[1])
    return (temperature, *added, cap)


def _products(
    hidden: Tensor, table: Tensor, chunk: int, quantized: Fp8Rows | None, table_fp8: Fp8Rows | None, card: Card
) -> Iterator[tuple[slice, Tensor]]:
    """Which ids, and hidden states times their rows [N, ids] in the model's dtype, in a buffer that is used again."""
    if quantized is not None and table_fp8 is not None:
        for part in chunks(len(table), chunk):
            right = rows_of(table_fp8, part)
            product = fp8_linear if fits(*right.shape) else fp8_linear_kernel
            yield part, product(quantized, right.codes, right.scales, hidden.dtype, card)
        return
    buffer = hidden.new_empty(len(hidden) * min(chunk, len(table)))
    for part in chunks(len(table), chunk):
        x = buffer[: len(hidden) * (part.stop - part.start)].view(len(hidden), -1)
        yield part, torch.mm(hidden, table[part].T, out=x)


@triton.jit
def exp(x):
    """In two instructions on a GPU, which give 0 for what is below the normal numbers."""
    return exp2(x * LOG2_E)


@triton.jit
def exp2(x):
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """To the last bit but one."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _y(x, row, ids, inside, temperature, classes, values, kinds, cap):
    """What ``capped`` and ``shaped`` make of logits as they were rounded, float32; the same in all kernels here.

    cap tanh(x / cap) = cap - 2 cap / (1 + exp(2 x / cap)): one exponential and one fused product, the temperature in
    its factors. It is most exact where logits are high; near 0, where tanh would be, it is off by 5e-6.
    """
    cold = tl.div_rn(tl.full((), 1.0, tl.float32), tl.load(temperature + row))
    if cap is None:
        y = x * cold
    else:
        high = cap * cold
        y = tl.fma(reciprocal(exp2(x * (2.0 * LOG2_E / cap)) + 1.0), -2.0 * high, high)
    if classes is not None:
        kind = tl.load(classes + ids, mask=inside, other=0)
        y = tl.maximum(y + tl.load(values + row * kinds + kind, mask=inside, other=0.0) * cold, LEAST)
    return tl.where(inside, y, LEAST)


@triton.jit
def _weigh(
    logits,
    temperature,
    classes,
    values,
    kinds,
    cap,
    peaks,
    best,
    sums,
    start,
    width,
    blocks,
    spans,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row: ``peaks`` float32 [rows, 4, blocks] gets the greatest y, sum w, sum w s and the sum of
    weights of rounded y; ``best`` the lowest id of the greatest; ``sums`` [rows, spans] the weights of each span."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts: tl.constexpr = BLOCK // SPAN
    at = block * BLOCK + tl.arange(0, parts)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    inside = at < width
    x = tl.load(logits + row * width + at, mask=inside, other=0.0).to(tl.float32)
    y = _y(x, row, start + at, inside, temperature, classes, values, kinds, cap)
    peak = tl.max(tl.max(y, 1), 0)
    shifted = tl.maximum(y - peak, REMOTE)
    weight = exp(shifted)
    by_span = tl.sum(weight, 1)
    mass = tl.sum(by_span, 0)
    mass_rounded = mass
    if logits.dtype.element_ty != tl.float32:
        low, low_peak = rounded(y, logits.dtype.element_ty), rounded(peak, logits.dtype.element_ty)
        mass_rounded = tl.sum(tl.sum(exp(low - low_peak), 1), 0)
    out = peaks + row * 4 * blocks + start // BLOCK + block
    tl.store(out, peak)
    tl.store(out + blocks, mass)
    tl.store(out + 2 * blocks, tl.sum(tl.sum(weight * shifted, 1), 0))
    tl.store(out + 3 * blocks, mass_rounded)
    found = tl.min(tl.min(tl.where(y == peak, at, width - 1), 1), 0)  # an id, also where y is not a number
    tl.store(best + row * blocks + start // BLOCK + block, start + found)
    span = start // SPAN + block * parts + tl.arange(0, parts)
    tl.store(sums + row * spans + span, by_span, mask=span < spans)


@triton.jit
def _conclude(
    hidden,
    peaks,
    best,
    sums,
    uniform,
    argmax,
    entropy,
    confidence,
    greatest,
    total,
    span,
    share,
    blocks,
    spans,
    BLOCKS: tl.constexpr,
    SPANS: tl.constexpr,
    RATIO: tl.constexpr,
):
    """All blocks of one row: the fields of ``Seen`` but the drawn id, and of that the span and the share in it."""
    dtype: tl.constexpr = hidden.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCKS)
    inside = at < blocks
    block = peaks + row * 4 * blocks + at
    peak = tl.load(block, mask=inside, other=LEAST)
    mass = tl.load(block + blocks, mask=inside, other=0.0)
    moment = tl.load(block + 2 * blocks, mask=inside, other=0.0)
    mass_rounded = tl.load(block + 3 * blocks, mask=inside, other=0.0)
    top = tl.max(peak, 0)
    apart = tl.maximum(peak - top, REMOTE)
    scale = exp(apart)
    whole = tl.sum(mass * scale, 0)
    first = tl.min(tl.where(inside & (peak == top), at, blocks - 1), 0)
    tl.store(argmax + row, tl.load(best + row * blocks + first).to(tl.int64))
    tl.store(entropy + row, tl.log(whole) - tl.div_rn(tl.sum((moment + mass * apart) * scale, 0), whole))
    tl.store(confidence + row, tl.div_rn(tl.full((), 1.0, tl.float32), whole))
    low = rounded(top, dtype)
    tl.store(greatest + row, low)
    tl.store(total + row, tl.sum(mass_rounded * exp(rounded(peak, dtype) - low), 0))
    each = tl.arange(0, SPANS)
    about = tl.load(peaks + row * 4 * blocks + each // RATIO, mask=each < spans, other=LEAST)
    weight = tl.load(sums + row * spans + each, mask=each < spans, other=0.0) * exp(tl.maximum(about - top, REMOTE))
    chosen, inner = _pick(weight, each, tl.load(uniform + row), SPANS)
    tl.store(span + row, chosen)
    tl.store(share + row, inner)


@triton.jit
def _pick(weight, at, share, COUNT: tl.constexpr):
    """``draw`` of one row: where, and the share inside."""
    below = tl.cumsum(weight, 0)
    target = share * tl.sum(weight, 0)
    first = tl.min(tl.where((weight > 0) & (below > target), at, COUNT), 0)
    last = tl.max(tl.where(weight > 0, at, 0), 0)
    index = tl.where(first < COUNT, first, last)
    found = tl.sum(tl.where(at == index, weight, 0.0), 0)
    start = tl.sum(tl.where(at == index, below - weight, 0.0), 0)
    return index, tl.minimum(tl.maximum(tl.div_rn(target - start, found), 0.0), 1.0)


@triton.jit
def _draw(
    like,
    left,
    right,
    left_scales,
    right_scales,
    temperature,
    classes,
    values,
    kinds,
    cap,
    span,
    share,
    drawn,
    vocab,
    width,
    SPAN: tl.constexpr,
    STEP: tl.constexpr,
):
    """One row: the logits of its span, made again as the product made them, and the id at ``share`` of their weights.

    ``left`` [N, D] and ``right`` [V, D] are hidden states and table; in FP8 they have scales.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SPAN)
    ids = tl.load(span + row) * SPAN + at
    inside = ids < vocab
    acc = tl.zeros((SPAN, STEP), tl.float32)
    for begin in range(0, width, STEP):
        column = begin + tl.arange(0, STEP)
        a = tl.load(left + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        place = ids.to(tl.int64)[:, None] * width + column[None, :]
        b = tl.load(right + place, mask=inside[:, None] & (column < width)[None, :], other=0.0).to(tl.float32)
        acc += a[None, :] * b
    x = tl.sum(acc, 1)
    if left_scales is not None:
        x = x * tl.load(left_scales + row) * tl.load(right_scales + ids, mask=inside, other=0.0)
    x = rounded(x, like.dtype.element_ty)
    y = _y(x, row, ids, inside, temperature, classes, values, kinds, cap)
    weight = exp(y - tl.max(y, 0))
    chosen, _ = _pick(weight, at, tl.load(share + row), SPAN)
    tl.store(drawn + row, (tl.load(span + row) * SPAN + chosen).to(tl.int64))


@triton.jit
def _odds(
    logits,
    temperature,
    classes,
    values,
    kinds,
    cap,
    greatest,
    total,
    start,
    width,
    BLOCK: tl.constexpr,
):
    """One block of one row of logits, in place: exp(rounded y - greatest) / total, rounded."""
    dtype: tl.constexpr = logits.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(logits + row * width + at, mask=inside, other=0.0).to(tl.float32)
    y = _y(x, row, start + at, inside, temperature, classes, values, kinds, cap)
    share = tl.div_rn(tl.full((), 1.0, tl.float32), tl.load(total + row))
    odds = exp(rounded(y, dtype) - tl.load(greatest + row)) * share
    tl.store(logits + row * width + at, narrowed(odds, dtype), mask=inside)
