"""The table of operations of a choice: kernels in the places that were chosen, plain torch in the rest."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from ..linear import Quantized, Stack, Weight, linear
from .attention import canvas_attention_kernel, chunk_attention_kernel
from .cards import Card
from .choice import Choice, obstacle
from .fp8_gemm import fp8_linear
from .geglu import geglu_kernel
from .head import look_kernel, soft_kernel
from .heads import heads_kernel
from .moe import experts_kernel, experts_ops
from .norm import after_attention_kernel, after_experts_kernel, norm_kernel
from .ops import Operation, Ops, plain
from .packed import packed_linear_kernel
from .quantize import Fp8Rows, Rows, quantize_kernel
from .router import Routes, route_kernel
from .unpack import unsupported

MANY = 1024  # rows from which a packed weight is unpacked once, for torch's product, instead of once per tile of rows

OPERATIONS: dict[str, Operation] = {
    "norm": norm_kernel,
    "after_attention": after_attention_kernel,
    "after_experts": after_experts_kernel,
    "heads": heads_kernel,
    "geglu": geglu_kernel,
    "quantize": quantize_kernel,
    "route": route_kernel,
    "canvas_attention": canvas_attention_kernel,
    "chunk_attention": chunk_attention_kernel,
    "look": look_kernel,
    "soft": soft_kernel,
}


def build_ops(choice: Choice, dtype: torch.dtype) -> Ops:
    ops = plain(dtype)
    if choice.fused:
        card = choice.card
        chosen = {name: functools.partial(k, card=card) for name, k in OPERATIONS.items() if choice.on(name)}
        if choice.on("experts"):
            chosen["experts"] = functools.partial(experts, card=card)
        fp8, packed = choice.on("fp8_linear"), choice.on("packed_linear")
        if fp8 or packed:
            chosen["linear"] = functools.partial(product, dtype=dtype, card=card, fp8=fp8, packed=packed)
        ops = replace(ops, **chosen)
    return ops


def with_head(ops: Ops, head: Fp8Rows | None) -> Ops:
    """The operations that read the vocabulary, with logits from ``head``, the embedding in FP8, if there is one."""
    if head is None:
        return ops
    look, soft = (functools.partial(operation, table_fp8=head) for operation in (ops.look, ops.soft))
    return replace(ops, look=look, soft=soft)


def product(x: Rows, weight: Weight, *, dtype: torch.dtype, card: Card, fp8: bool, packed: bool) -> Tensor:
    """As ``linear``, by what is best for the weight. Dense ones are torch's, which is the vendor's."""
    if isinstance(weight, Stack):
        pieces = [product(x, piece, dtype=dtype, card=card, fp8=fp8, packed=packed) for piece in weight.pieces]
        return torch.cat(pieces, 1)
    if fp8 and isinstance(x, Fp8Rows):
        assert isinstance(weight, Quantized)
        return fp8_linear(x, weight.parts["weight"], weight.parts["scales"], dtype, card)
    if isinstance(x, Fp8Rows):
        return linear(x, weight, dtype)
    if packed and isinstance(weight, Quantized) and len(x) < MANY and not unsupported(weight, card):
        return packed_linear_kernel(x, weight, card)
    return linear(x, weight, dtype)


def experts(x: Rows, routes: Routes, gate_up: Weight, down: Weight, dtype: torch.dtype, *, card: Card) -> Tensor:
    if obstacle((gate_up, down), card):
        return experts_ops(x, routes, gate_up, down, dtype)
    return experts_kernel(x, routes, gate_up, down, dtype, card)
