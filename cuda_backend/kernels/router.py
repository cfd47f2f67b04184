"""From router scores to routes: which experts a token visits, with which weight, and its pairs sorted by expert.

A pair is one token at one of its experts; pair n * k + j is token n at its j-th best. Two kernels, because sorting
needs the choices of all tokens: within one launch programs cannot wait for each other, and a single program would leave
the rest of the card idle over 8,192 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cards import Card
from .jit import tl, triton
from .launch import Config, launch

TOKENS = 4  # in one program, one to a warp
PAIRS = 2048  # that one program of the sort looks at in a turn: those of a canvas


@dataclass(frozen=True)
class Routes:
    """Where N tokens go: k of E experts each.

    Args:
        weight: float32 [N, k].
        chosen: int32 [N, k], best first; of equals, the lowest first.
        order: int32 [N * k], the pairs sorted by expert, those of one expert as they come.
        ends: int32 [E], where the pairs of each expert end in ``order``.
        odds: float32 [N, E], the probabilities of all, where they were asked for.
    """

    weight: Tensor
    chosen: Tensor
    order: Tensor
    ends: Tensor
    odds: Tensor | None = None


def route_ops(scores: Tensor, per_expert_scale: Tensor, top: int, odds: bool = False) -> Routes:
    """scores [N, E] and per_expert_scale [E] in any float dtype. Softmax in float32; the weights of a token's ``top``
    sum to 1 before ``per_expert_scale``.

    ``torch.topk`` promises no order of equal scores, a stable sort does. Scores are sorted, not probabilities, which
    can be equal where scores are not.
    """
    every = torch.softmax(scores, -1, dtype=torch.float32)
    chosen = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top]
    weight = every.gather(1, chosen)
    weight = weight / weight.sum(-1, keepdim=True) * per_expert_scale[chosen].float()
    expert, order = chosen.flatten().sort(stable=True)
    experts = torch.arange(scores.shape[1], device=scores.device)
    ends = torch.searchsorted(expert, experts, right=True, out_int32=True)
    return Routes(weight, chosen.int(), order.int(), ends, every if odds else None)


def route_kernel(scores: Tensor, per_expert_scale: Tensor, top: int, card: Card) -> Routes:
    """As ``route_ops``, without ``odds``; both tensors are contiguous."""
    tokens, experts = scores.shape
    pairs = tokens * top
    weight = scores.new_empty((tokens, top), dtype=torch.float32)
    chosen = scores.new_empty((tokens, top), dtype=torch.int32)
    order = scores.new_empty(pairs, dtype=torch.int32)
    ends = scores.new_empty(experts, dtype=torch.int32)
    edges = {"BLOCK_E": triton.next_power_of_2(experts), "BLOCK_TOP": triton.next_power_of_2(top)}
    config = Config({"BLOCK": TOKENS, "TOP": top} | edges, num_warps=TOKENS)
    launch(
        _choose,
        (triton.cdiv(tokens, TOKENS),),
        scores,
        per_expert_scale,
        weight,
        chosen,
        tokens,
        experts,
        config=config,
    )
    config = Config({"BLOCK": min(PAIRS, triton.next_power_of_2(pairs))}, num_warps=4)
    launch(_sort, (experts,), chosen, order, ends, pairs, config=config)
    return Routes(weight, chosen, order, ends)


@triton.jit
def _choose(
    scores,
    per_expert_scale,
    weight,
    chosen,
    tokens,
    experts,
    BLOCK: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, BLOCK_E)[None, :]
    inside = (token < tokens)[:, None] & (expert < experts)
    score = tl.load(scores + token[:, None] * experts + expert, mask=inside, other=float("-inf")).to(tl.float32)
    score = tl.where((token < tokens)[:, None], score, 0.0)  # so that rows behind the end are numbers
    best = tl.max(score, 1)
    total = tl.sum(tl.exp(score - best[:, None]), 1)
    rank = tl.arange(0, BLOCK_TOP)[None, :]
    ids = tl.zeros((BLOCK, BLOCK_TOP), tl.int32)
    odds = tl.zeros((BLOCK, BLOCK_TOP), tl.float32)
    for j in tl.static_range(TOP):
        value, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        at = tl.minimum(at, experts - 1)  # a score that is no number must not lead out of the bank
        ids = tl.where(rank == j, at[:, None], ids)
        odds = tl.where(rank == j, tl.div_rn(tl.exp(value - best), total)[:, None], odds)
        score = tl.where(expert == at[:, None], float("-inf"), score)
    kept = (token < tokens)[:, None] & (rank < TOP)
    scale = tl.load(per_expert_scale + ids, mask=kept, other=0.0).to(tl.float32)
    share = tl.div_rn(odds, tl.broadcast_to(tl.sum(odds, 1)[:, None], (BLOCK, BLOCK_TOP)))
    tl.store(weight + token[:, None] * TOP + rank, share * scale, mask=kept)
    tl.store(chosen + token[:, None] * TOP + rank, ids, mask=kept)


@triton.jit
def _sort(chosen, order, ends, pairs, BLOCK: tl.constexpr):
    """One program places the pairs of one expert: behind those of all before it, and of those in their order."""
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, pairs, BLOCK):
        found = tl.load(chosen + first + at, mask=first + at < pairs, other=expert)
        before += (found < expert).to(tl.int32)
    place = tl.sum(before, 0)
    for first in range(0, pairs, BLOCK):
        mine = tl.load(chosen + first + at, mask=first + at < pairs, other=-1) == expert
        count = mine.to(tl.int32)
        tl.store(order + place + tl.cumsum(count, 0) - 1, first + at, mask=mine)
        place += tl.sum(count, 0)
    tl.store(ends + expert, place)
