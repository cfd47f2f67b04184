"""What a step does with its logits, a slice of canvas rows at a time, so that they never exist as a whole.

A slice gives the argmax, the draw, entropy, confidence and the soft embedding. In plain operations each logit costs
one tanh and one exp (two in bfloat16, whose soft embedding starts from rounded logits); the rest is cheap reductions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .kernels.head import Seen, look_ops, odds_ops
from .kernels.logits import Bias, bias_of_bans
from .kernels.ops import Ops
from .kernels.soft_embed import survivors_ops
from .network import Network

__all__ = ["CAP", "Bias", "Reading", "bias_of_bans", "log_probabilities", "read_canvas", "slices"]

SLICE_ELEMENTS = 8 * 2**20  # most elements of a float32 temporary of plain operations: 32 MiB
SLICE_BYTES = 256 * 2**20  # of logits in the model's dtype, with kernels: a canvas at 262,144 ids, two in bfloat16
CAP = 1024  # survivors that a row may have and not be flat


@dataclass(frozen=True)
class Reading:
    """Of every canvas position: int32 ``argmax`` and ``drawn``, float32 ``entropy`` and ``confidence`` [B, C], ``soft``
    [B, C, D] in the model's dtype. ``flat`` int32 [B]: how many of a canvas have more than ``CAP`` survivors (0 where
    they are not counted)."""

    argmax: mx.array
    drawn: mx.array
    entropy: mx.array
    confidence: mx.array
    soft: mx.array
    flat: mx.array


def read_canvas(
    network: Network,
    hidden: mx.array,
    temperature: mx.array,
    uniform: mx.array,
    bias: Bias | None = None,
    dense: float | None = None,
) -> Reading:
    """``hidden`` [B, C, D] after the last norm, ``temperature`` float32 [B], ``uniform`` float32 [B, C]; ``bias`` has
    B * C positions.

    Args:
        dense: ``None`` makes every soft embedding of all ids. A number makes those of survivors, but of all ids in
            that share of the rows of each slice, those with the most survivors.
    """
    rows, length, _ = hidden.shape
    x, level, draws = hidden.flatten(0, 1), mx.repeat(temperature, length), uniform.flatten()
    width = bytes_each(network.ops, network.dtype, survivors=dense is not None)
    parts: list[list[mx.array]] = []
    for start, stop in slices(rows * length, network.config.vocab_size, width):
        at = slice(start, stop)
        # The dependency keeps the scheduler from starting all slices at once, which would hold all their logits.
        mine = mx.depends([x[at]], parts[-1])[0] if parts else x[at]
        shape = {"temperature": level[at], "bias": None if bias is None else bias.rows(at)}
        parts.append(_read_rows(network, mine, draws[at], shape, dense))
    whole = [mx.concatenate(list(part)) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)]
    fields = [x.reshape(rows, length, *x.shape[1:]) for x in whole]
    fields[-1] = fields[-1].sum(-1).astype(mx.int32)
    return Reading(*fields)


def log_probabilities(network: Network, hidden: mx.array, targets: mx.array) -> mx.array:
    """float32 [N]: log p of ``targets`` int [N] under the logits of ``hidden`` [N, D]."""
    parts: list[mx.array] = []
    for start, stop in slices(len(targets), network.config.vocab_size):
        x = mx.depends([hidden[start:stop]], parts[-1:])[0] if parts else hidden[start:stop]
        logits = network.logits(x)
        chosen = mx.take_along_axis(logits, targets[start:stop, None], -1)[:, 0]
        parts.append(chosen - mx.logsumexp(logits, -1))
    return mx.concatenate(parts)


def bytes_each(ops: Ops, dtype: mx.Dtype, survivors: bool) -> int:
    """Of a logit, where kernels make nothing else as wide as the vocabulary; 0 where plain operations do."""
    plain = ops.look is look_ops or ops.odds is odds_ops or (survivors and ops.survivors is survivors_ops)
    return 0 if plain else dtype.size


def slices(rows: int, vocab_size: int, bytes_each: int = 0) -> list[tuple[int, int]]:
    """Ranges of rows whose logits stay within ``SLICE_ELEMENTS``, or, ``bytes_each`` wide, within ``SLICE_BYTES``; at
    least one row each."""
    most = SLICE_BYTES // bytes_each if bytes_each else SLICE_ELEMENTS
    size = max(1, most // vocab_size)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _read_rows(
    network: Network, hidden: mx.array, uniform: mx.array, shape: dict[str, Any], dense: float | None
) -> list[mx.array]:
    """The fields of ``Reading`` for rows [N, D], ``flat`` as bool [N]; ``shape`` has temperature [N] and bias."""
    logits, cap = network.table.apply(hidden), network.config.final_logit_softcapping
    keep = 0 if dense is None else CAP
    seen = network.ops.look(logits, cap, uniform=uniform, keep=keep, **shape)
    flat = mx.zeros(len(logits), mx.bool_) if seen.count is None else seen.count > CAP
    if dense is None or dense >= 1:
        soft = _dense(network, logits, shape, seen)
    else:
        soft = _mixed(network, logits, shape, seen, math.ceil(dense * len(logits)))
    return [seen.argmax, seen.drawn, seen.entropy, seen.confidence, soft * network.scale, flat]


def _dense(network: Network, logits: mx.array, shape: dict[str, Any], seen: Seen) -> mx.array:
    """[N, D] of all ids. Weights in float32, where they are at hand, are divided after the product: a pass less."""
    if seen.weight is not None and network.dtype == mx.float32 and network.ops.odds is odds_ops:
        return network.table.combine(seen.weight) / seen.total[:, None]
    cap = network.config.final_logit_softcapping
    return network.table.combine(network.ops.odds(logits, cap, seen=seen, **shape))


def _mixed(network: Network, logits: mx.array, shape: dict[str, Any], seen: Seen, dense_rows: int) -> mx.array:
    """[N, D] of survivors, and of all ids in the ``dense_rows`` rows that have the most."""
    assert seen.count is not None
    cap, skip = network.config.final_logit_softcapping, mx.zeros(len(logits), mx.bool_)
    if not dense_rows:
        return network.ops.survivors(logits, cap, seen=seen, table=network.table, skip=skip, **shape)
    most = mx.argsort(-seen.count)[:dense_rows]
    skip[most] = True
    soft = network.ops.survivors(logits, cap, seen=seen, table=network.table, skip=skip, **shape)
    temperature, bias = shape["temperature"], shape["bias"]
    few = {"temperature": temperature[most], "bias": None if bias is None else bias.rows(most)}
    soft[most] = _dense(network, logits[most], few, seen.rows(most))
    return soft
