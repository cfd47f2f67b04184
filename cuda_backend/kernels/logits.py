"""Logits, a chunk of the vocabulary at a time: no tensor is as wide as the vocabulary but for one of few rows.

logits = cap tanh(x / cap), where x = hidden @ table^T is rounded to the model's dtype first; a step then looks at
y = (logits + bias) / temperature. The table [V, D] is read chunk by chunk, so it crosses memory once, however many rows
there are. What is made of the chunks is in ``head.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlx_diffgemma.sampling.bans import LOWEST, classes_of_bans
from mlx_diffgemma.sampling.bans import NEVER as NEVER  # also what a user of ``Bias`` writes

from .quantize import Fp8Rows, quantize_ops

BUFFER = 2**25  # bytes that a buffer may take: 32 MiB
TABLE = 48 * 2**20  # bytes of the table in one chunk: about what the L2 cache of an H100 holds
SMALLEST_SPAN = 64  # ids whose weights are summed up as one
ROWS = 4096  # that are scored together


@dataclass(frozen=True)
class Cut:
    """How a pass cuts the vocabulary, in ids: one product makes a ``chunk`` of logits, one program of a kernel looks at
    a ``block``, and weights are kept per ``span``. Each divides the next; only the last of a kind may be shorter."""

    span: int
    block: int
    chunk: int


def span_of(rows: int, vocab_size: int) -> int:
    """Short, because a draw reads as much of the table; but the sums of all spans, float32 [rows, spans], are kept."""
    return max(SMALLEST_SPAN, ceiling(4 * rows * vocab_size // BUFFER))


def plain_cut(rows: int, table: Tensor, widened: bool = False) -> Cut:
    """For torch operations, whose buffers are float32. ``widened``: a chunk of the table is made float32 as well."""
    by_rows = BUFFER // (4 * max(1, rows))
    by_table = BUFFER // (4 * table.shape[1]) if widened else TABLE // (table.element_size() * table.shape[1])
    span = span_of(rows, len(table))
    chunk = max(span, floor(min(by_rows, by_table)))
    return Cut(span, chunk, chunk)


def floor(n: int) -> int:
    """The greatest power of two up to n; 1 for 0."""
    return 1 << max(0, n.bit_length() - 1)


def ceiling(n: int) -> int:
    """The smallest power of two from n."""
    return 1 << max(0, n - 1).bit_length()


def chunks(vocab_size: int, length: int) -> Iterator[slice]:
    for start in range(0, vocab_size, length):
        yield slice(start, min(start + length, vocab_size))


# ---- what is added


@dataclass(frozen=True)
class Bias:
    """What is added to softcapped logits before the temperature: ``values[n, classes[v]]`` to id v of position n.

    Ids that are treated alike at every position form a class, so this takes V + N K numbers, not N V. Banned ids are
    the first use. A grammar comes in here too: its tokens fall into few classes, and each position allows some.

    Args:
        classes: int32 [V], each from 0 to K - 1.
        values: float32 [N, K]; ``NEVER`` forbids a class.
    """

    classes: Tensor
    values: Tensor

    def of(self, part: slice) -> Tensor:
        """float32 [N, ids of the part]."""
        return self.values.index_select(1, self.classes[part])


def bias_of_bans(
    bans: Sequence[tuple[Sequence[int], int]], length: int, vocab_size: int, device: torch.device
) -> Bias | None:
    """``classes_of_bans`` on a device; None where nothing is banned."""
    found = classes_of_bans(bans, length, vocab_size)
    return None if found is None else Bias(*(torch.from_numpy(x).to(device) for x in found))


# ---- the chunks


def logits_chunks(
    hidden: Tensor, table: Tensor, cap: float | None, *, chunk: int | None = None, table_fp8: Fp8Rows | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Hidden states [N, D] times the table [V, D]: which ids, and float32 [N, ids] in a buffer that the next one uses.

    ``table_fp8``: the same table in FP8, which is then multiplied with hidden states in FP8.
    """
    chunk = chunk or plain_cut(len(hidden), table, table_fp8 is not None).chunk
    size = len(hidden) * min(chunk, len(table))
    rounded = hidden.new_empty(size)
    wide = rounded if hidden.dtype == torch.float32 else hidden.new_empty(size, dtype=torch.float32)
    fp8 = None if table_fp8 is None else quantize_ops(hidden).dense(torch.float32)
    for part in chunks(len(table), chunk):
        width = part.stop - part.start
        x, y = (buffer[: len(hidden) * width].view(-1, width) for buffer in (rounded, wide))
        if fp8 is None or table_fp8 is None:
            torch.mm(hidden, table[part].T, out=x)
        else:
            x.copy_(fp8 @ rows_of(table_fp8, part).dense(torch.float32).T)
        if wide is not rounded:
            y.copy_(x)
        yield part, capped(y, cap)


def rows_of(table: Fp8Rows, part: slice) -> Fp8Rows:
    return Fp8Rows(table.codes[part], table.scales[part])


def capped(x: Tensor, cap: float | None) -> Tensor:
    """In place."""
    return x if cap is None else x.div_(cap).tanh_().mul_(cap)


def shaped_chunks(
    hidden: Tensor,
    table: Tensor,
    cap: float | None,
    *,
    temperature: Tensor,
    bias: Bias | None,
    chunk: int,
    table_fp8: Fp8Rows | None,
) -> Iterator[tuple[slice, Tensor]]:
    """As ``logits_chunks``, with the bias and divided by ``temperature`` float32 [N]."""
    for part, y in logits_chunks(hidden, table, cap, chunk=chunk, table_fp8=table_fp8):
        yield part, shaped(y, None if bias is None else bias.of(part), temperature)


def shaped(logits: Tensor, addend: Tensor | None, temperature: Tensor) -> Tensor:
    """Softcapped logits [N, ids] in place; the addend is as large, where there is one."""
    if addend is None:
        return logits.div_(temperature[:, None])
    return logits.add_(addend).div_(temperature[:, None]).clamp_min_(LOWEST)


# ---- uses of logits outside a step


def log_probabilities(
    hidden: Tensor, table: Tensor, cap: float | None, target: Tensor, *, chunk: int | None = None
) -> Tensor:
    """float32 [N]: log p of ``target`` int64 [N] behind hidden states [N, D], at temperature 1."""
    groups = zip(hidden.split(ROWS), target.split(ROWS), strict=True)
    return torch.cat([_log_probabilities(rows, table, cap, ids, chunk) for rows, ids in groups])


def _log_probabilities(hidden: Tensor, table: Tensor, cap: float | None, target: Tensor, chunk: int | None) -> Tensor:
    chosen = torch.zeros_like(target, dtype=torch.float32)
    peaks, masses = [], []
    for part, y in logits_chunks(hidden, table, cap, chunk=chunk):
        inside = (target >= part.start) & (target < part.stop)
        at = (target - part.start).clamp(0, y.shape[1] - 1)
        chosen = torch.where(inside, y.gather(1, at[:, None])[:, 0], chosen)
        peaks.append(y.amax(-1))
        masses.append(y.sub_(peaks[-1][:, None]).exp_().sum(-1))
    peak, mass = torch.stack(peaks, 1), torch.stack(masses, 1)
    greatest = peak.amax(-1, keepdim=True)
    return chosen - greatest[:, 0] - (mass * (peak - greatest).exp()).sum(-1).log()


def soften(shaped: Tensor, table: Tensor, scale: float) -> Tensor:
    """Soft embedding [n, D] of float32 logits [n, V], few rows: they are rounded to the table's dtype, as HF's are."""
    odds = torch.softmax(shaped.to(table.dtype), -1, dtype=torch.float32)
    return (odds.to(table.dtype) @ table) * scale
