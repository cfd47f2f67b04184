"""Norms and what is fused with them: rounded where the plain version rounds, bit for bit wherever that is decided."""

from __future__ import annotations

import dataclasses
import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.mlx_backend.kernels.norm import (
    AfterAttention,
    AfterExperts,
    after_attention_kernel,
    after_attention_ops,
    after_experts_kernel,
    after_experts_ops,
    row_threads,
)
from tests.metal_kernels.harness import in_every_order, random, wide
from tests.metal_kernels.ranges import EPS, PLAIN_SLACK, SLACK, assert_within, exact, normed, plus, times

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# One and several simdgroups, rows whose pieces do not fill them, rows that are no multiple of 4.
EVERY_DTYPE = ((3, 37), (2, 3, 300), (2, 2816))
CASES = [
    *itertools.product(EVERY_DTYPE, DTYPES),
    *(((5, width), mx.bfloat16) for width in (8, 64, 1057)),
    ((1, 5376), mx.bfloat16),
]
IDS = ["x".join(map(str, shape)) + "-" + str(dtype).rpartition(".")[2] for shape, dtype in CASES]


def rows(seed: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Rows of very different size, each with an outlier; eps counts in the smallest."""
    x = np.array(random(seed, *shape)).reshape(-1, shape[-1])
    x *= np.logspace(-3, 2, len(x))[:, None]
    x[:, shape[-1] // 2] *= 8
    return mx.array(x.reshape(shape)).astype(dtype)


def vector(seed: int, width: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Weights of both signs that no narrower dtype holds."""
    return (mx.random.uniform(0.5, 1.5, (width,), key=mx.random.key(seed)) * random(seed, width, scale=9)).astype(dtype)


# ---- after the attention


def attention_case(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, mx.array, AfterAttention]:
    width = shape[-1]
    weights = AfterAttention(vector(3, width), vector(4, width), vector(5, width), vector(6, width, dtype))
    return rows(1, shape, dtype), rows(2, shape, dtype), weights


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=IDS)
def test_after_attention(shape, dtype, place, proof):
    h, attention, weights = attention_case(shape, dtype)
    found = in_every_order(lambda: after_attention_kernel(h, attention, weights, EPS), place)
    for parts, slack in ((found, SLACK), (after_attention_ops(h, attention, weights, EPS), PLAIN_SLACK)):
        update = normed(exact(attention), wide(weights.post_attention), dtype, slack)
        assert_within(parts.stream, plus(exact(h), update, dtype), dtype)
        stream = exact(parts.stream)  # as it was rounded: what follows is decided again
        assert_within(parts.dense, normed(stream, wide(weights.pre_feedforward), dtype, slack), dtype)
        assert_within(parts.experts, normed(stream, wide(weights.pre_feedforward_2), dtype, slack), dtype)
        router = times(normed(stream, 1.0, dtype, slack), wide(weights.router), dtype)
        assert_within(parts.router, times(router, float(np.float32(shape[-1] ** -0.5)), dtype), dtype)
    proof("after_attention", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_attention_against_float64(dtype, place):
    """Without any rounding in between: the error is that of two roundings, or three."""
    h, attention, weights = attention_case((2, 3, 300), dtype)
    found = in_every_order(lambda: after_attention_kernel(h, attention, weights, EPS), place)
    stream = wide(h) + norm64(wide(attention)) * wide(weights.post_attention)
    bare = norm64(stream)
    assert_near(found.stream, stream, 2, dtype)
    assert_near(found.dense, bare * wide(weights.pre_feedforward), 3, dtype)
    assert_near(found.experts, bare * wide(weights.pre_feedforward_2), 3, dtype)
    assert_near(found.router, bare * wide(weights.router) * 300**-0.5, 5, dtype)


# Half of the greatest distance of neighbouring numbers, relative.
UNIT = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def norm64(x: np.ndarray) -> np.ndarray:
    return x * (np.square(x).mean(-1, keepdims=True) + EPS) ** -0.5


def assert_near(found: mx.array, truth: np.ndarray, roundings: int, dtype: mx.Dtype) -> None:
    """Each rounding of a number not above the greatest of its row; float32 adds what sums are open by."""
    greatest = np.abs(truth).max(-1, keepdims=True)
    assert (np.abs(wide(found) - truth) <= (roundings * UNIT[dtype] * 1.01 + 2 * SLACK) * greatest).all()


# ---- after the experts


def experts_case(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple:
    width = shape[-1]
    norms = AfterExperts(*(vector(seed, width) for seed in (4, 5, 6)))
    scalar = mx.array([0.7]).astype(dtype)
    streams = (rows(1, shape, dtype), rows(2, shape, dtype), rows(3, shape, dtype))
    return *streams, norms, scalar, EPS, vector(7, width)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=IDS)
def test_after_experts(shape, dtype, place, proof):
    case = experts_case(shape, dtype)
    h, dense, mixed, weights, scalar, _, following = case
    found = in_every_order(lambda: after_experts_kernel(*case), place)
    for (stream, x), slack in ((found, SLACK), (after_experts_ops(*case), PLAIN_SLACK)):
        first = normed(exact(dense), wide(weights.dense), dtype, slack)
        second = normed(exact(mixed), wide(weights.experts), dtype, slack)
        both = normed(plus(first, second, dtype), wide(weights.both), dtype, slack)
        assert_within(stream, times(plus(exact(h), both, dtype), wide(scalar), dtype), dtype)
        assert_within(x, normed(exact(stream), wide(following), dtype, slack), dtype)
    proof("after_experts", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_experts_against_float64(dtype, place):
    case = experts_case((2, 3, 300), dtype)
    h, dense, mixed, weights, scalar, _, following = case
    stream, x = in_every_order(lambda: after_experts_kernel(*case), place)
    both = norm64(wide(dense)) * wide(weights.dense) + norm64(wide(mixed)) * wide(weights.experts)
    behind = (wide(h) + norm64(both) * wide(weights.both)) * wide(scalar)
    assert_near(stream, behind, 6, dtype)
    assert_near(x, norm64(behind) * wide(following), 7, dtype)


# ---- edges


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_stay_zero(dtype, place):
    zeros = mx.zeros((3, 40), dtype)
    _, _, weights = attention_case((3, 40), dtype)
    parts = in_every_order(lambda: after_attention_kernel(zeros, zeros, weights, EPS), place)
    _, _, _, norms, scalar, _, following = experts_case((3, 40), dtype)
    behind = in_every_order(lambda: after_experts_kernel(zeros, zeros, zeros, norms, scalar, EPS, following), place)
    for array in (*(getattr(parts, f.name) for f in dataclasses.fields(parts)), *behind):
        assert not wide(array).any()


def test_a_norm_has_its_own_eps(place):
    """Mean squares of 4e-6 and an eps of 12e-6: 2e-3 becomes 2e-3 / 4e-3, in every norm of the first row."""
    h, ones = mx.full((1, 64), 2e-3), mx.ones(64)
    nothing = mx.zeros((1, 64))
    parts = in_every_order(
        lambda: after_attention_kernel(nothing, h, AfterAttention(ones, ones, ones, ones), 12e-6), place
    )
    assert np.allclose(wide(parts.stream), 0.5, rtol=SLACK)


def test_threads_are_whole_simdgroups_that_cover_a_row():
    for width in (8, 37, 64, 128, 2112, 2816, 2817, 5376, 8192):
        piece = 4 if width % 4 == 0 else 1
        threads = row_threads(width, piece)
        assert threads % 32 == 0 and 0 < threads <= 384
    assert (row_threads(2816, 4), row_threads(5376, 4), row_threads(37, 1)) == (352, 352, 32)
