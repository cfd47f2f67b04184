"""What a step does with its logits, a slice of canvas rows at a time, so that they never exist as a whole.

A slice gives the argmax, the draw, entropy, confidence and the soft embedding. Each logit costs one tanh and one exp
(two in bfloat16, whose soft embedding starts from rounded logits); everything else is a cheap reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .network import Network

SLICE_ELEMENTS = 8 * 2**20  # most elements of a float32 temporary: 32 MiB
FAR = -1e30  # a banned logit: weight exactly 0, yet 0 * FAR is a number
LONGEST_RUN = 512  # vocabulary entries under one partial sum of the inverse CDF


@dataclass(frozen=True)
class Ban:
    """``ids`` bool [B, V] cannot appear at positions below ``until`` int32 [B]."""

    ids: mx.array
    until: mx.array


@dataclass(frozen=True)
class Reading:
    """Of every canvas position: int32 ``argmax`` and ``drawn``, float32 ``entropy`` and ``confidence`` [B, C], ``soft``
    [B, C, D] in the model's dtype."""

    argmax: mx.array
    drawn: mx.array
    entropy: mx.array
    confidence: mx.array
    soft: mx.array


def read_canvas(
    network: Network, hidden: mx.array, temperature: mx.array, uniform: mx.array, ban: Ban | None
) -> Reading:
    """``hidden`` [B, C, D] after the last norm, ``temperature`` float32 [B], ``uniform`` float32 [B, C]."""
    rows, length, _ = hidden.shape
    flat, level, draws = hidden.flatten(0, 1), mx.repeat(temperature, length), uniform.flatten()
    parts: list[list[mx.array]] = []
    for start, stop in slices(rows * length, network.config.vocab_size):
        # The dependency keeps the scheduler from starting all slices at once, which would hold all their logits.
        x = mx.depends([flat[start:stop]], parts[-1])[0] if parts else flat[start:stop]
        banned = None if ban is None else _banned(ban, mx.arange(start, stop), length)
        parts.append(_read_rows(network, x, level[start:stop, None], draws[start:stop], banned))
    whole = [mx.concatenate(list(part)) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)]
    return Reading(*(x.reshape(rows, length, *x.shape[1:]) for x in whole))


def log_probabilities(network: Network, hidden: mx.array, targets: mx.array) -> mx.array:
    """float32 [N]: log p of ``targets`` int [N] under the logits of ``hidden`` [N, D]."""
    parts: list[mx.array] = []
    for start, stop in slices(len(targets), network.config.vocab_size):
        x = mx.depends([hidden[start:stop]], parts[-1:])[0] if parts else hidden[start:stop]
        logits = network.logits(x)
        chosen = mx.take_along_axis(logits, targets[start:stop, None], -1)[:, 0]
        parts.append(chosen - mx.logsumexp(logits, -1))
    return mx.concatenate(parts)


def slices(rows: int, vocab_size: int) -> list[tuple[int, int]]:
    """Ranges of rows whose logits stay within ``SLICE_ELEMENTS``; at least one row each."""
    size = max(1, SLICE_ELEMENTS // vocab_size)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _banned(ban: Ban, at: mx.array, length: int) -> mx.array:
    row = at // length
    return ban.ids[row] & (at % length < ban.until[row])[:, None]


def _read_rows(
    network: Network, hidden: mx.array, temperature: mx.array, uniform: mx.array, banned: mx.array | None
) -> list[mx.array]:
    """The fields of ``Reading`` for rows [N, D]; ``temperature`` [N, 1], ``uniform`` [N], ``banned`` bool [N, V]."""
    shaped = network.logits(hidden) / temperature
    if banned is not None:
        shaped = mx.where(banned, FAR, shaped)
    top = shaped.max(-1, keepdims=True)
    shifted = shaped - top
    weight = mx.exp(shifted)
    runs = weight.reshape(len(weight), -1, run_length(weight.shape[-1]))
    upto = mx.cumsum(runs.sum(-1), -1)
    total = upto[:, -1:]
    # sum of weight * shifted as a product of matrices: no temporary of vocabulary size
    spread = (weight[:, None] @ shifted[..., None])[:, 0]
    return [
        mx.argmax(shifted, -1).astype(mx.int32),
        draw(runs, upto, uniform),
        (mx.log(total) - spread / total)[:, 0],
        (1 / total)[:, 0],
        _soften(network, shaped, weight, total),
    ]


def _soften(network: Network, shaped: mx.array, weight: mx.array, total: mx.array) -> mx.array:
    """Soft embedding [N, D]. In float32 nothing is rounded first, so the weights at hand serve."""
    if network.dtype == mx.float32:
        return network.table.combine(weight) / total * network.scale
    return network.soften(shaped)


def run_length(vocab_size: int) -> int:
    """Largest power of two up to ``LONGEST_RUN`` that divides the vocabulary."""
    return min(vocab_size & -vocab_size, LONGEST_RUN)


def draw(runs: mx.array, upto: mx.array, uniform: mx.array) -> mx.array:
    """``rules.draw`` in two levels: the run in which the cumulated weight passes the target, then the place in it.

    ``runs`` [N, R, L] are weights in vocabulary order, ``upto`` [N, R] the sums to the end of each run; int32 [N].
    """
    target = uniform[:, None] * upto[:, -1:]
    run = mx.minimum((upto <= target).sum(-1, keepdims=True), upto.shape[-1] - 1)
    before = mx.where(run == 0, 0, mx.take_along_axis(upto, mx.maximum(run - 1, 0), -1))
    within = mx.cumsum(mx.take_along_axis(runs, run[..., None], 1)[:, 0], -1)
    # The second test catches a target that only the other order of sums puts inside this run: its last token.
    passed = (within + before > target) | (within >= within[:, -1:])
    return (run[:, 0] * runs.shape[-1] + mx.argmax(passed, -1)).astype(mx.int32)
