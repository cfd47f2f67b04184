"""Everything of a step that is as wide as the vocabulary, a slice of rows at a time.

One canvas makes 256 x 262,144 logits. They live in two float32 buffers of at most ``SLICE`` elements that are used
over and over; what leaves are a few numbers per position, and the soft embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlx_diffgemma.config import TextConfig

SLICE = 8 * 2**20  # float32 elements of a buffer: 32 MiB
SPAN = 512  # ids per partial sum, at most
NEVER = -1e30  # a banned logit; finite, so that 0 * NEVER is 0 where 0 * -inf is not a number


@dataclass(frozen=True)
class Seen:
    """What one step makes of its logits; N positions."""

    argmax: Tensor  # int64 [N], the lowest id of the greatest logits
    drawn: Tensor  # int64 [N]
    entropy: Tensor  # float32 [N], nats
    confidence: Tensor  # float32 [N], the probability of ``argmax``
    soft: Tensor  # [N, D], model dtype


@dataclass(frozen=True)
class Scratch:
    """The two buffers, float32 [rows, V]."""

    first: Tensor
    second: Tensor


def slices(count: int, vocab_size: int) -> Iterator[slice]:
    """Row ranges that keep a buffer within ``SLICE`` elements."""
    rows = rows_of(count, vocab_size)
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def rows_of(count: int, vocab_size: int) -> int:
    return min(count, max(1, SLICE // vocab_size))


def scratch(count: int, vocab_size: int, device: torch.device) -> Scratch:
    shape = rows_of(count, vocab_size), vocab_size
    return Scratch(torch.empty(shape, device=device), torch.empty(shape, device=device))


def logits(hidden: Tensor, table: Tensor, config: TextConfig, out: Tensor) -> Tensor:
    """float32 [n, V] into ``out``: the head's product is rounded to the model's dtype before the softcap."""
    if table.dtype == out.dtype:
        torch.mm(hidden, table.T, out=out)
    else:
        out.copy_(hidden @ table.T)
    cap = config.final_logit_softcapping
    return out if cap is None else out.div_(cap).tanh_().mul_(cap)


def spans(vocab_size: int) -> tuple[int, int]:
    """The vocabulary as equal spans: their number and their length, the greatest divisor up to ``SPAN``."""
    length = next(n for n in range(min(SPAN, vocab_size), 0, -1) if vocab_size % n == 0)
    return vocab_size // length, length


def take_span(x: Tensor, span: Tensor) -> Tensor:
    """x [n, spans, length] at ``span`` [n]: [n, length]."""
    return x[torch.arange(len(x), device=x.device), span]


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Greatest value and its lowest index over the last axis of [n, V]: first the span, then the place in it.

    A maximum over short spans runs at the speed of memory; torch's argmax over a long axis does not.
    """
    count, length = spans(x.shape[-1])
    spanned = x.view(-1, count, length)
    greatest, span = spanned.amax(-1).max(-1)
    return greatest, span * length + take_span(spanned, span).argmax(-1)


def draw(weight: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF in vocabulary order: the first id whose cumulated weight exceeds ``uniform`` times the total.

    ``weight`` [n, V], ``sums`` [n, spans] of them, ``uniform`` [n]: the span first, then the id in it. A target that
    rounds up to the total is taken just below, so that an id of weight 0 is never drawn.
    """
    count, length = spans(weight.shape[-1])
    before = sums.cumsum(-1)
    target = below(uniform * before[:, -1], before[:, -1])
    span = (before <= target[:, None]).sum(-1)
    inside = take_span(weight.view(-1, count, length), span).cumsum(-1)
    start = before.gather(1, (span - 1).clamp_min(0)[:, None])[:, 0] * (span > 0)
    target = below(target - start, inside[:, -1])
    return span * length + (inside <= target[:, None]).sum(-1)


def below(target: Tensor, total: Tensor) -> Tensor:
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def soften(shaped: Tensor, table: Tensor, scale: float) -> Tensor:
    """Soft embedding [n, D] of float32 logits [n, V]: they are first rounded to the embedding's dtype, as HF's are."""
    odds = torch.softmax(shaped.to(table.dtype), -1, dtype=torch.float32)
    return (odds.to(table.dtype) @ table) * scale


def look(
    hidden: Tensor,
    table: Tensor,
    config: TextConfig,
    *,
    scale: float,
    temperature: Tensor,
    uniform: Tensor,
    bans: list[tuple[Tensor, Tensor] | None],
    buffers: Scratch,
) -> Seen:
    """Hidden states [N, D] to what a step needs. ``temperature`` and ``uniform`` are float32 [N].

    ``bans`` has one entry per slice: (row in the slice, id) pairs that cannot appear, or None.
    """
    parts = []
    for rows, banned in zip(slices(len(hidden), len(table)), bans, strict=True):
        count = rows.stop - rows.start
        shaped = logits(hidden[rows], table, config, buffers.first[:count])
        if banned is not None:
            shaped[banned] = NEVER
        shaped.div_(temperature[rows, None])
        parts.append(_look(shaped, uniform[rows], table, scale, buffers.second[:count]))
    return Seen(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _look(shaped: Tensor, uniform: Tensor, table: Tensor, scale: float, weight: Tensor) -> tuple[Tensor, ...]:
    """``Seen`` of one slice, as a tuple. ``shaped`` is used up; ``weight`` is the other buffer.

    With s = y - max y, w = exp s and S = sum w, the entropy is log S - (sum w s) / S.
    """
    rounded = None if table.dtype == shaped.dtype else soften(shaped, table, scale)
    greatest, best = argmax(shaped)
    shifted = shaped.sub_(greatest[:, None])
    torch.exp(shifted, out=weight)
    sums = weight.view(len(weight), *spans(weight.shape[-1])).sum(-1)
    total = sums.sum(-1)
    drawn = draw(weight, sums, uniform)
    entropy = total.log() - shifted.mul_(weight).sum(-1) / total
    soft = (weight.div_(total[:, None]) @ table) * scale if rounded is None else rounded
    return best, drawn, entropy, total.reciprocal(), soft
