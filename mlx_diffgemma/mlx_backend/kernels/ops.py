"""The operations that a step is made of, as one table: plain, or with kernels in some places. Made once, at load."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from . import attention, geglu, head, heads, moe, norm, soft_embed

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Ops:
    """Every field has the arguments of the ``<name>_ops`` function in the file named behind it."""

    after_attention: Operation = norm.after_attention_ops
    after_experts: Operation = norm.after_experts_ops
    heads: Operation = heads.heads_ops
    geglu: Operation = geglu.geglu_ops
    route: Operation = moe.route_ops
    gather_sum: Operation = moe.gather_sum_ops
    canvas_attention: Operation = attention.canvas_attention_ops
    look: Operation = head.look_ops
    odds: Operation = head.odds_ops
    survivors: Operation = soft_embed.survivors_ops


PLAIN = Ops()
FUSED = Ops(
    after_attention=norm.after_attention_kernel,
    after_experts=norm.after_experts_kernel,
    heads=heads.heads_kernel,
    geglu=geglu.geglu_kernel,
    route=moe.route_kernel,
    gather_sum=moe.gather_sum_kernel,
    canvas_attention=attention.canvas_attention_kernel,
    look=head.look_kernel,
    odds=head.odds_kernel,
    survivors=soft_embed.survivors_kernel,
)
KERNELS = tuple(f.name for f in fields(Ops))


def with_kernels(names: Iterable[str]) -> Ops:
    """Plain operations but for ``names``, which are kernels."""
    return replace(PLAIN, **{name: getattr(FUSED, name) for name in names})
