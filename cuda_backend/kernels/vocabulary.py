"""The two passes of a step over the vocabulary, in torch: what its logits tell, and the soft embedding behind it.

Both multiply hidden states with the table chunk by chunk (``logits.py``) and keep of a chunk only what it adds up to.
``look`` weighs: per chunk the greatest y, the sum of exp(y - it) and what else can be rescaled later; per span of a few
ids a sum of weights, of which the draw needs one span, whose logits it makes again. ``soft`` makes every logit again,
for a probability is rounded to the model's dtype, and that takes the total. It comes with the next step, so that a
row's last step goes without. ``head.py`` has the same as kernels.

The logits of an FP8 table (``table_fp8``) are of hidden states in FP8; the soft embedding is a sum of rows of ``table``
in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .logits import BUFFER, Bias, Cut, capped, chunks, plain_cut, shaped, shaped_chunks
from .quantize import Fp8Rows, quantize_ops

FAR = -1000.0  # exp of it is 0 in float32; differences stop there, so that 0 times one is 0


@dataclass(frozen=True)
class Seen:
    """What one step makes of its logits; N positions. float32 but for ids."""

    argmax: Tensor  # int64 [N], the lowest id of the greatest y
    drawn: Tensor  # int64 [N]
    entropy: Tensor  # [N], nats
    confidence: Tensor  # [N], the probability of ``argmax``
    greatest: Tensor  # [N], of y rounded to the model's dtype,
    total: Tensor  # [N], and the sum of exp(y - greatest) of those: what the second pass needs


def look_ops(
    hidden: Tensor,
    table: Tensor,
    cap: float | None,
    *,
    temperature: Tensor,
    uniform: Tensor,
    bias: Bias | None = None,
    table_fp8: Fp8Rows | None = None,
    cut: Cut | None = None,
) -> Seen:
    """Hidden states [N, D] and table [V, D] to what a step needs; ``temperature`` and ``uniform`` are float32 [N].

    With s = y - max y, w = exp s and S = sum w, the entropy is log S - (sum w s) / S; a chunk's sums are about its own
    greatest y and are moved to that of all by exp of the difference.
    """
    cut = cut or plain_cut(len(hidden), table, table_fp8 is not None)
    found = []
    for part, y in shaped_chunks(
        hidden, table, cap, temperature=temperature, bias=bias, chunk=cut.chunk, table_fp8=table_fp8
    ):
        found.append(_weigh_ops(y, part.start, cut.span, hidden.dtype))
    peak, best, sums, moment, masses = zip(*found, strict=True)
    mass = torch.stack([each.sum(-1) for each in sums], 1)
    peaks = torch.stack(peak, 1)
    greatest, first = peaks.max(-1)
    apart = (peaks - greatest[:, None]).clamp_min_(FAR)
    scale = apart.exp()
    total = (mass * scale).sum(-1)
    entropy = total.log() - ((torch.stack(moment, 1) + mass * apart) * scale).sum(-1) / total
    peaks, highest = (x.to(hidden.dtype).float() for x in (peaks, greatest))
    rounded_total = (torch.stack(masses, 1) * (peaks - highest[:, None]).exp()).sum(-1)
    span, share = draw(torch.cat([each * scale[:, i, None] for i, each in enumerate(sums)], 1), uniform)
    drawn = _draw_ops(hidden, table, cap, temperature, bias, table_fp8, span, share, cut.span)
    argmax = torch.stack(best, 1).gather(1, first[:, None])[:, 0]
    return Seen(argmax, drawn, entropy, total.reciprocal(), highest, rounded_total)


def _weigh_ops(y: Tensor, start: int, span: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of y float32 [N, ids], which is used up: greatest, its lowest id, weights per span [N, spans], sum w s, and the
    sum of weights of y rounded to ``dtype``, about the greatest so rounded."""
    peak, at = y.max(-1)
    low = y.to(dtype)
    shifted = y.sub_(peak[:, None]).clamp_min_(FAR)
    weight = shifted.exp()
    whole = weight.shape[1] // span * span
    sums = weight[:, :whole].unflatten(1, (whole // span, span)).sum(-1)
    if whole < weight.shape[1]:
        sums = torch.cat([sums, weight[:, whole:].sum(-1, keepdim=True)], 1)
    moment = weight.mul_(shifted).sum(-1)
    if dtype == torch.float32:
        return peak, at + start, sums, moment, sums.sum(-1)
    return peak, at + start, sums, moment, torch.sub(low, peak.to(dtype).float()[:, None]).exp_().sum(-1)


def draw(weight: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF over weights [n, k]: the first whose cumulated weight exceeds ``share`` [n] of the total.

    Index int64 [n], and the share of its own weight below the target, by which to draw inside it. A target that rounds
    up to the total finds the last weight there is. One of 0 is never found, though sums made in parallel may rise
    there by a rounding.
    """
    below = weight.cumsum(-1)
    target = share * below[:, -1]
    at = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device)
    first = torch.where((weight > 0) & (below > target[:, None]), at, weight.shape[1]).amin(-1)
    last = torch.where(weight > 0, at, 0).amax(-1)
    index = torch.where(first < weight.shape[1], first, last).long()
    found, upto = (x.gather(1, index[:, None])[:, 0] for x in (weight, below))
    return index, ((target - (upto - found)) / found).clamp_(0, 1)


def _draw_ops(
    hidden: Tensor,
    table: Tensor,
    cap: float | None,
    temperature: Tensor,
    bias: Bias | None,
    table_fp8: Fp8Rows | None,
    span: Tensor,
    share: Tensor,
    length: int,
) -> Tensor:
    """int64 [N]: the id at ``share`` of the span of each row, whose logits are made again, some rows at a time."""
    width = table.shape[1] * (table.element_size() if table_fp8 is None else 4)
    fp8 = None if table_fp8 is None else quantize_ops(hidden).dense(torch.float32)
    drawn = []
    for rows in chunks(len(hidden), max(1, BUFFER // (length * width))):
        ids = span[rows, None] * length + torch.arange(length, device=hidden.device)
        outside = ids >= len(table)
        ids = ids.clamp_max_(len(table) - 1)
        if fp8 is None or table_fp8 is None:
            x = torch.bmm(table[ids], hidden[rows, :, None])[..., 0]
        else:
            codes = table_fp8.codes.view(torch.uint8)[ids].view(table_fp8.codes.dtype)
            x = torch.bmm(Fp8Rows(codes, table_fp8.scales[ids]).dense(torch.float32), fp8[rows, :, None])[..., 0]
        addend = None if bias is None else bias.values[rows].gather(1, bias.classes[ids].long())
        y = shaped(capped(x.to(hidden.dtype).float(), cap), addend, temperature[rows])
        y.masked_fill_(outside, -torch.inf)  # about the span's own greatest: no weight in it is lost but a banned one's
        found, _ = draw(y.sub_(y.amax(-1, keepdim=True)).exp_(), share[rows])
        drawn.append(ids.gather(1, found[:, None])[:, 0])
    return torch.cat(drawn)


def soft_ops(
    hidden: Tensor,
    table: Tensor,
    cap: float | None,
    *,
    scale: float,
    temperature: Tensor,
    bias: Bias | None,
    seen: Seen,
    table_fp8: Fp8Rows | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """[N, D], the model's dtype: the mean row of the table under each position's probabilities, times ``scale``.

    The arguments are those of ``look``, which gave ``seen``. y and probabilities are rounded to the model's dtype.
    """
    widened = table_fp8 is not None or (hidden.device.type == "cpu" and hidden.dtype != torch.float32)
    cut = cut or plain_cut(len(hidden), table, widened)
    mean = torch.zeros_like(hidden, dtype=torch.float32)
    for part, y in shaped_chunks(
        hidden, table, cap, temperature=temperature, bias=bias, chunk=cut.chunk, table_fp8=table_fp8
    ):
        y.copy_(y.to(hidden.dtype)).sub_(seen.greatest[:, None]).exp_().div_(seen.total[:, None])
        accumulate(mean, y.to(hidden.dtype), table[part])
    return mean.to(hidden.dtype) * scale


def accumulate(total: Tensor, odds: Tensor, rows: Tensor) -> None:
    """total float32 [N, D] += odds [N, ids] @ rows [ids, D], summed in float32."""
    if odds.dtype == torch.float32:
        total.addmm_(odds, rows)
    elif odds.device.type == "cpu":  # where a product has the dtype of what is multiplied
        total.addmm_(odds.float(), rows.float())
    else:
        total += torch.mm(odds, rows, out_dtype=torch.float32)
