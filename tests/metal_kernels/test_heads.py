"""Queries, keys and values: rounded where the plain version rounds, and in their places."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.mlx_backend.kernels.heads import heads_kernel, heads_ops
from tests.metal_kernels.harness import bits, flat, in_every_order, random, wide
from tests.metal_kernels.ranges import EPS, PLAIN_SLACK, SLACK, Range, assert_within, exact, normed, plus, times

DTYPES = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int  # 0: keys and values only
    groups: int
    dim: int
    own_values: bool  # else they are the raw keys
    shared: bool  # one rotation for all rows of the batch


SHAPES = {
    Shape(2, 3, 6, 3, 34, True, False): DTYPES,  # no multiple of 4, more heads than a threadgroup takes
    Shape(3, 2, 4, 1, 40, False, True): DTYPES,
    Shape(1, 2, 16, 8, 256, True, True): DTYPES,
    Shape(2, 1, 16, 2, 512, False, False): DTYPES,
    Shape(1, 1, 1, 1, 16, False, True): (mx.bfloat16,),
    Shape(2, 5, 4, 2, 32, True, False): (mx.bfloat16,),
    Shape(2, 3, 0, 2, 64, True, False): DTYPES,
    Shape(2, 9, 0, 1, 36, False, True): (mx.bfloat16,),  # half a head is no multiple of 4
}
CASES = [(shape, dtype) for shape, dtypes in SHAPES.items() for dtype in dtypes]
IDS = [f"{s.heads}-{s.groups}x{s.dim}-{str(dtype).rpartition('.')[2]}" for s, dtype in CASES]


@dataclass(frozen=True)
class Inputs:
    q: mx.array | None
    k: mx.array
    v: mx.array | None
    q_norm: mx.array
    k_norm: mx.array
    cos: mx.array
    sin: mx.array

    def run(self, operation):
        """Queries, keys and values."""
        return operation(self.q, self.k, self.v, self.q_norm, self.k_norm, self.cos, self.sin, EPS)


def inputs(s: Shape, dtype: mx.Dtype) -> Inputs:
    """Products of very different size from token to token; the last quarter of the pairs is not turned."""

    def product(seed: int, heads: int) -> mx.array:
        size = 10.0 ** np.linspace(-3, 1, s.batch * s.length).reshape(s.batch, s.length, 1)
        return (random(seed, s.batch, s.length, heads * s.dim) * mx.array(size.astype(np.float32))).astype(dtype)

    angle = np.array(random(4, 1 if s.shared else s.batch, 1, s.length, s.dim // 2, scale=30))
    angle[..., -(s.dim // 8) :] = 0
    q_norm, k_norm = (mx.random.uniform(0.5, 1.5, (s.dim,), key=mx.random.key(seed)) for seed in (5, 6))
    return Inputs(
        product(1, s.heads) if s.heads else None,
        product(2, s.groups),
        product(3, s.groups) if s.own_values else None,
        q_norm,
        k_norm,
        mx.array(np.cos(angle)).astype(dtype),
        mx.array(np.sin(angle)).astype(dtype),
    )


def split(x: mx.array | None, dim: int) -> Range:
    """[B, T, H * d] to [B, H, T, d]."""
    assert x is not None
    return exact(x.reshape(*x.shape[:2], -1, dim).swapaxes(1, 2))


def turned(raw: Range, weight: mx.array, x: Inputs, slack: float) -> Range:
    """Normed and turned: each product and their sum are rounded."""
    dtype, half = x.k.dtype, weight.size // 2
    y = normed(raw, wide(weight), dtype, slack)
    a, b = Range(y.low[..., :half], y.high[..., :half]), Range(y.low[..., half:], y.high[..., half:])
    cos, sin = wide(x.cos), wide(x.sin)
    first = plus(times(a, cos, dtype), times(b, -sin, dtype), dtype)
    second = plus(times(b, cos, dtype), times(a, sin, dtype), dtype)
    return Range(*(np.concatenate(pair, -1) for pair in ((first.low, second.low), (first.high, second.high))))


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=IDS)
def test_heads(shape, dtype, place, proof):
    x, dim = inputs(shape, dtype), shape.dim
    found = in_every_order(lambda: x.run(heads_kernel), place)
    for (q, k, v), slack in ((found, SLACK), (x.run(heads_ops), PLAIN_SLACK)):
        assert_within(k, turned(split(x.k, dim), x.k_norm, x, slack), dtype)
        assert_within(v, normed(split(x.k if x.v is None else x.v, dim), 1.0, dtype, slack), dtype)
        if x.q is None:
            assert q is None
        else:
            assert_within(q, turned(split(x.q, dim), x.q_norm, x, slack), dtype)
    proof("heads", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_against_float64(dtype, place):
    """Without any rounding in between: the norm, two products and their sum, each of numbers not above two."""
    x = inputs(Shape(2, 3, 6, 3, 34, True, False), dtype)
    q, k, v = in_every_order(lambda: x.run(heads_kernel), place)
    unit = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[dtype]
    for found, raw, weight in ((q, x.q, x.q_norm), (k, x.k, x.k_norm), (v, x.v, None)):
        bare = split(raw, 34).low
        truth = bare * (np.square(bare).mean(-1, keepdims=True) + EPS) ** -0.5
        if weight is not None:
            a, b = np.split(truth * wide(weight), 2, -1)
            truth = np.concatenate([a * wide(x.cos) - b * wide(x.sin), b * wide(x.cos) + a * wide(x.sin)], -1)
        greatest = np.abs(truth).max(-1, keepdims=True)
        assert (np.abs(wide(found) - truth) <= 1.01 * (8 * unit + 4 * SLACK) * greatest).all()


def assert_same(found, wanted) -> None:
    """Bit for bit."""
    for one, other in zip(flat(found), flat(wanted), strict=True):
        assert np.array_equal(bits(one), bits(other))


@pytest.mark.parametrize("own_values", [True, False])
def test_keys_and_values_do_not_depend_on_the_queries(own_values, place):
    """The last layer of a prompt makes no queries: its cache must hold the same bits."""
    x = inputs(Shape(2, 3, 6, 3, 34, own_values, False), mx.bfloat16)
    alone = replace(x, q=None)
    found = in_every_order(lambda: alone.run(heads_kernel), place)
    assert found[0] is None
    assert_same(found, in_every_order(lambda: x.run(heads_kernel), place)[1:])


def test_one_rotation_serves_all_rows_of_the_batch(place):
    x = inputs(Shape(3, 2, 4, 1, 40, True, True), mx.bfloat16)
    each = replace(x, cos=mx.repeat(x.cos, 3, 0), sin=mx.repeat(x.sin, 3, 0))
    found = in_every_order(lambda: x.run(heads_kernel), place)
    assert_same(found, in_every_order(lambda: each.run(heads_kernel), place))


def test_products_may_be_columns_of_one_array(place):
    """As of a fused product: MLX then copies them first."""
    x = inputs(Shape(2, 3, 2, 2, 32, True, False), mx.bfloat16)
    q, k, v = mx.split(mx.concatenate([x.q, x.k, x.v], -1), 3, -1)  # type: ignore[list-item]
    columns = replace(x, q=q, k=k, v=v)
    found = in_every_order(lambda: columns.run(heads_kernel), place)
    assert_same(found, in_every_order(lambda: x.run(heads_kernel), place))
