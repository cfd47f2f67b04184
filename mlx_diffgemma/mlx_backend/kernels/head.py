"""What one step makes of its logits [N, V]: argmax, draw, entropy, confidence; then, if asked, probabilities.

With y as ``logits.shaped`` makes it, s = y - max y, w = exp s and S = sum w: the confidence is 1 / S and the entropy
log S - (sum w s) / S. An id survives if its probability is at least e^-10 of the row's greatest. Probabilities are
those of y rounded to the model's dtype, as transformers has them, and so are survivors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .elementary import exp
from .launch import Kernel
from .logits import HEADER, SHAPE, Bias, rounded, shape_inputs, shape_template, shaped, vector
from .look_text import DRAW, LOOK_HEADER, SURVIVE, WEIGH

REACH = 10.0  # nats below the greatest y within which an id survives
LONGEST_RUN = 512  # vocabulary entries under one partial sum of the plain draw


@dataclass(frozen=True)
class Seen:
    """What one step makes of its logits.

    Args:
        argmax: int32 [N], the lowest id of the greatest y. drawn: int32 [N].
        entropy: float32 [N], nats. confidence: float32 [N], the probability of ``argmax``.
        greatest, total: float32 [N], of y rounded to the model's dtype, and the sum of exp(y - greatest) of those.
        count: int32 [N], survivors. ``None`` unless asked for, and so is
        ids: int32 [N, keep], survivors in ascending order, then -1; only -1 in a row that has more than ``keep``.
        weight: float32 [N, V], exp(y - greatest), where it was made anyway: by plain operations.
    """

    argmax: mx.array
    drawn: mx.array
    entropy: mx.array
    confidence: mx.array
    greatest: mx.array
    total: mx.array
    count: mx.array | None = None
    ids: mx.array | None = None
    weight: mx.array | None = None

    def rows(self, at: mx.array) -> Seen:
        """Of positions ``at`` alone."""
        taken: dict[str, Any] = {name: None if x is None else x[at] for name, x in vars(self).items()}
        return replace(self, **taken)


def look_ops(
    logits: mx.array,
    cap: float | None,
    *,
    temperature: mx.array,
    uniform: mx.array,
    bias: Bias | None = None,
    keep: int = 0,
) -> Seen:
    """``logits`` [N, V] in the model's dtype; ``temperature`` and ``uniform`` are float32 [N].

    ``keep``: also count survivors and list up to that many of each row.
    """
    y = shaped(logits, cap, temperature, bias)
    top = y.max(-1, keepdims=True)
    shifted = y - top
    weight = exp(shifted)
    runs = weight.reshape(len(weight), -1, run_length(weight.shape[-1]))
    upto = mx.cumsum(runs.sum(-1), -1)
    total = upto[:, -1:]
    # sum of weight * shifted as a product of matrices: no temporary of vocabulary size
    spread = (weight[:, None] @ shifted[..., None])[:, 0]
    greatest, low_total, low_shifted, low_weight = top, total, shifted, weight
    if logits.dtype != mx.float32:
        greatest = rounded(top, logits.dtype)
        low_shifted = rounded(y, logits.dtype) - greatest
        low_weight = exp(low_shifted)
        low_total = low_weight.sum(-1, keepdims=True)
    near = low_shifted >= -REACH
    return Seen(
        argmax=mx.argmax(shifted, -1).astype(mx.int32),
        drawn=draw(runs, upto, uniform),
        entropy=(mx.log(total) - spread / total)[:, 0],
        confidence=(1 / total)[:, 0],
        greatest=greatest[:, 0],
        total=low_total[:, 0],
        count=near.sum(-1).astype(mx.int32) if keep else None,
        ids=_listed(near, keep) if keep else None,
        weight=low_weight,
    )


def odds_ops(logits: mx.array, cap: float | None, *, temperature: mx.array, bias: Bias | None, seen: Seen) -> mx.array:
    """[N, V] probabilities in the dtype of ``logits``; the arguments are those of ``look``, which gave ``seen``."""
    weight = seen.weight
    if weight is None:
        weight = exp(rounded(shaped(logits, cap, temperature, bias), logits.dtype) - seen.greatest[:, None])
    return (weight / seen.total[:, None]).astype(logits.dtype)


def _listed(near: mx.array, keep: int) -> mx.array:
    """``Seen.ids`` of bool [N, V]."""
    vocab = near.shape[-1]
    ids = mx.sort(mx.where(near, mx.arange(vocab, dtype=mx.int32), vocab), -1)[:, :keep]
    ids = mx.concatenate([ids, mx.full((len(ids), keep - ids.shape[1]), vocab, mx.int32)], -1)
    return mx.where((ids < vocab) & (near.sum(-1, keepdims=True) <= keep), ids, -1)


def run_length(vocab_size: int) -> int:
    """Largest power of two up to ``LONGEST_RUN`` that divides the vocabulary."""
    return min(vocab_size & -vocab_size, LONGEST_RUN)


def draw(runs: mx.array, upto: mx.array, uniform: mx.array) -> mx.array:
    """``rules.draw`` in two levels: the run in which the cumulated weight passes the target, then the place in it.

    ``runs`` [N, R, L] are weights in vocabulary order, ``upto`` [N, R] the sums to the end of each run; int32 [N].
    """
    target = uniform[:, None] * upto[:, -1:]
    # At most the run that completes the total: behind it there may be only zeros.
    run = mx.minimum((upto <= target).sum(-1, keepdims=True), (upto < upto[:, -1:]).sum(-1, keepdims=True))
    before = mx.where(run == 0, 0, mx.take_along_axis(upto, mx.maximum(run - 1, 0), -1))
    within = mx.cumsum(mx.take_along_axis(runs, run[..., None], 1)[:, 0], -1)
    # The second test catches a target that only the other order of sums puts inside this run: its last token.
    passed = (within + before > target) | (within >= within[:, -1:])
    return (run[:, 0] * runs.shape[-1] + mx.argmax(passed, -1)).astype(mx.int32)


# ---- kernels

GROUPS = 8  # simdgroups that share a row: 256 threads, which every pipeline takes
SPAN, SPANS = 256, 1024  # ids that a simdgroup takes at a time, and most of them in a row, whose sums are kept
SPREAD = 256  # threads of the second kernel that stand together

SEEN = ("argmax", "drawn", "entropy", "confidence", "greatest", "total")
LOOK = Kernel("look", (*SHAPE, "uniform"), SEEN, WEIGH + DRAW, LOOK_HEADER)
LOOK_AND_LIST = Kernel(
    "look_and_list", (*SHAPE, "uniform"), (*SEEN, "count", "ids"), WEIGH + DRAW + SURVIVE, LOOK_HEADER
)
ODDS = Kernel(
    name="odds",
    inputs=(*SHAPE, "greatest", "total"),
    outputs=("odds",),
    source="""
    const uint id = thread_position_in_grid.x * VEC, row = thread_position_in_grid.y;
    if (id >= V) return;
    const size_t at = size_t(row) * V + id;
    const auto added = values + row * KINDS;
    const float heat = temperature[row], limit = cap[0], most = greatest[row], whole = total[row];
    const Several<T, VEC> loaded = *(const device Several<T, VEC>*)(logits + at);
    Several<T, VEC> made;
    UNROLLED for (uint e = 0; e < VEC; e++) {
        const float y = shaped<CAPPED, BIASED>(float(loaded.at[e]), id + e, limit, heat, classes, added);
        made.at[e] = T(weight_of(rounded<T>(y) - most) / whole);
    }
    *(device Several<T, VEC>*)(odds + at) = made;
    """,
    header=HEADER,
)


def look_kernel(
    logits: mx.array,
    cap: float | None,
    *,
    temperature: mx.array,
    uniform: mx.array,
    bias: Bias | None = None,
    keep: int = 0,
) -> Seen:
    """As ``look_ops``."""
    rows, vocab = logits.shape
    assert logits.size >= 8, "MLX puts smaller arrays into another address space"
    span = SPAN * max(1, -(-vocab // (SPAN * SPANS)))
    spans = -(-vocab // span)
    groups = min(GROUPS, spans)
    template = shape_template(logits, cap, bias) | {"SPAN": span, "SPANS": spans, "GROUPS": groups}
    found = (LOOK_AND_LIST if keep else LOOK)(
        logits,
        *shape_inputs(cap, temperature, bias),
        uniform,
        template=template | ({"KEEP": keep} if keep else {}),
        grid=(32 * groups * rows, 1, 1),
        threadgroup=(32 * groups, 1, 1),
        shapes=[(rows,)] * 6 + ([(rows,), (rows, keep)] if keep else []),
        dtypes=[mx.int32] * 2 + [mx.float32] * 4 + ([mx.int32] * 2 if keep else []),
    )
    return Seen(*found)


def odds_kernel(
    logits: mx.array, cap: float | None, *, temperature: mx.array, bias: Bias | None, seen: Seen
) -> mx.array:
    """As ``odds_ops``."""
    rows, vocab = logits.shape
    threads = vocab // vector(vocab)
    (odds,) = ODDS(
        logits,
        *shape_inputs(cap, temperature, bias),
        seen.greatest,
        seen.total,
        template=shape_template(logits, cap, bias),
        grid=(-(-threads // SPREAD) * SPREAD, rows, 1),
        threadgroup=(SPREAD, 1, 1),
        shapes=[logits.shape],
        dtypes=[logits.dtype],
    )
    return odds
