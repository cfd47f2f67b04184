"""Banned ids as a bias: what is added to the logits, per position and class of ids. NumPy, for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEVER = -1e30  # added to the logit of an id that cannot appear; finite, for 0 * -inf is not a number
LOWEST = -2e38  # and so it stays, divided by a small temperature or multiplied by log2(e)


def classes_of_bans(
    bans: Sequence[tuple[Sequence[int], int]], length: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Classes int32 [V] and values float32 [B * length, K]: ``values[n, classes[v]]`` is added to id v of position n.

    ``bans`` has, per row of a batch, which ids cannot appear and before which of its ``length`` positions; ``None``
    comes back where none is. Class 0 is never banned; every other one is banned in a set of rows of its own.
    """
    ids = np.unique([id for banned, until in bans if until for id in banned]).astype(np.int64)
    if not len(ids):
        return None
    members = np.stack([np.isin(ids, banned) & bool(until) for banned, until in bans], 1)  # [ids, rows]
    kinds, kind = np.unique(members, axis=0, return_inverse=True)
    classes = np.zeros(vocab_size, np.int32)
    classes[ids] = kind.reshape(-1) + 1
    values = np.zeros((len(bans), length, len(kinds) + 1), np.float32)
    for row, (_, until) in enumerate(bans):
        values[row, :until, 1:] = np.where(kinds[:, row], NEVER, 0)
    return classes, values.reshape(-1, len(kinds) + 1)
