"""Where a number may lie whose float32 sums are open by their order: nearly always that is one number of its dtype.

So a kernel is held to the very roundings of the model, bit for bit, and no tolerance is needed where they are decided.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from tests.metal_kernels.harness import wide

EPS = 1e-6
# Relative, of a float32 inverse root and what is multiplied by it: 18 sums deep at most, halved by the root, then
# the root itself and two products.
SLACK = 1e-6
PLAIN_SLACK = 4e-6  # MLX adds up a row on a CPU in few long sums
# Most that may be undecided: a slack of 4e-6 at each of four roundings, whose steps are 2^-10 or 2^-7 at most.
OPEN = {mx.float16: 0.05, mx.bfloat16: 0.01}


@dataclass(frozen=True)
class Range:
    """Where a number lies that float32 sums do not decide; both ends are arrays in float32 or in float64."""

    low: np.ndarray
    high: np.ndarray

    @staticmethod
    def of(function, *given: Range) -> Range:
        """``function`` is monotone in each argument, as rounding, sums and products are."""
        corners = [function(*ends) for ends in itertools.product(*((g.low, g.high) for g in given))]
        return Range(np.minimum.reduce(corners), np.maximum.reduce(corners))


def rounded(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32))


def normed(x: Range, weight: np.ndarray | float, dtype: mx.Dtype, slack: float) -> Range:
    """The norm of a row, rounded once."""
    ends = np.abs(np.stack([x.low, x.high])).astype(np.float64)
    least = np.where(x.low * x.high < 0, 0, ends.min(0))
    roots = [(np.square(end).mean(-1, keepdims=True) + EPS) ** -0.5 for end in (ends.max(0), least)]
    scale = Range(roots[0] * (1 - slack), roots[1] * (1 + slack))
    return Range.of(lambda value, by: rounded(value * by * weight, dtype), x, scale)


def exact(x: mx.array) -> Range:
    return Range(wide(x), wide(x))


def plus(a: Range, b: Range, dtype: mx.Dtype) -> Range:
    return Range.of(lambda x, y: rounded(x + y, dtype), a, b)


def times(a: Range, factor: np.ndarray | float, dtype: mx.Dtype) -> Range:
    return Range.of(lambda x: rounded(x * factor, dtype), a)


def assert_within(found: mx.array, truth: Range, dtype: mx.Dtype) -> None:
    """Equal wherever the rounding is decided, which is nearly everywhere; else one of the few numbers between."""
    assert found.dtype == dtype and found.shape == truth.low.shape
    values = wide(found)
    assert ((truth.low <= values) & (values <= truth.high)).all()
    if dtype in OPEN:
        assert (truth.low != truth.high).mean() <= OPEN[dtype], "too little is decided to prove anything"
