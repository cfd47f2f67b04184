"""What the formats share: working through a large array in pieces that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

CHUNK = 1 << 18  # values; a multiple of every group size, so that no group is cut
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def spans(size: int) -> Iterator[slice]:
    """Slices that cover ``size`` values in order."""
    for start in range(0, size, CHUNK):
        yield slice(start, min(start + CHUNK, size))


def parts(w: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of the flat values and a float32 copy of each, in a buffer that the next one overwrites."""
    source = flat(w)
    buffer = np.empty(min(CHUNK, source.size), np.float32)  # one for all: fresh pages cost as much as the arithmetic
    for part in spans(source.size):
        x = buffer[: part.stop - part.start]
        x[:] = source[part]
        yield part, x


def scaled(part: slice, times: int, per: int) -> slice:
    """The slice of an array with ``times`` items for every ``per`` values of ``part``."""
    return slice(part.start * times // per, part.stop * times // per)


def flat(w: np.ndarray) -> np.ndarray:
    """All values in one row; a view where the array is contiguous."""
    return np.ascontiguousarray(w).reshape(-1)


def check_groups(w: np.ndarray, group_size: int) -> None:
    assert w.dtype in FLOATS, f"{w.dtype} is not a float format that can be packed"
    assert w.ndim >= 1 and w.shape[-1] % group_size == 0, f"rows of {w.shape} do not divide by groups of {group_size}"


def group_reduce(operation: np.ufunc, x: np.ndarray, group_size: int) -> np.ndarray:
    """``operation`` (maximum or minimum) over each group of a flat array -> [groups]."""
    if group_size >= 32:
        return operation.reduceat(x, np.arange(0, x.size, group_size))
    while group_size > 1:  # short groups: halving the whole array beats many short loops
        x = operation(x[0::2], x[1::2])
        group_size //= 2
    return x
