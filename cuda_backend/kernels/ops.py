"""The operations that a step is made of, as one table: plain, or with kernels in some places. Made once, at load."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Ops:
    """Every field has the arguments of the ``<name>_ops`` function in the file named behind it."""

    norm: Operation  # norm
    after_attention: Operation  # norm
    after_experts: Operation  # norm
    heads: Operation  # heads
    geglu: Operation  # geglu
    quantize: Operation  # quantize
    linear: Operation  # ..linear: (rows, weight) -> [N, out]
    route: Operation  # router
    experts: Operation  # moe
    canvas_attention: Operation  # attention
    chunk_attention: Operation  # attention
    look: Operation  # head
    soft: Operation  # head


def plain(dtype: torch.dtype) -> Ops:
    """torch operations throughout, for a model of ``dtype``."""
    from ..linear import linear  # which itself multiplies with what is beside this file
    from .attention import canvas_attention_ops, chunk_attention_ops
    from .geglu import geglu_ops
    from .head import look_ops, soft_ops
    from .heads import heads_ops
    from .moe import experts_ops
    from .norm import after_attention_ops, after_experts_ops, norm_ops
    from .quantize import quantize_ops
    from .router import route_ops

    return Ops(
        norm=norm_ops,
        after_attention=after_attention_ops,
        after_experts=after_experts_ops,
        heads=heads_ops,
        geglu=geglu_ops,
        quantize=quantize_ops,
        linear=functools.partial(linear, dtype=dtype),
        route=route_ops,
        experts=experts_ops,
        canvas_attention=canvas_attention_ops,
        chunk_attention=chunk_attention_ops,
        look=look_ops,
        soft=soft_ops,
    )
