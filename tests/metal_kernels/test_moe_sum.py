"""Un-sort, weighting and sum against float64 and plain MLX; and the whole mixture of experts against loops in NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.mlx_backend.experts import mix
from mlx_diffgemma.mlx_backend.kernels.moe import Routes, gather_sum_kernel, gather_sum_ops, odds_of, route_ops
from mlx_diffgemma.mlx_backend.kernels.ops import PLAIN, with_kernels
from mlx_diffgemma.mlx_backend.linear import Dense
from tests.metal_kernels.harness import in_every_order, random, relative_error, wide

HALF_STEP = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # of a rounding, relative
SMALLEST = {mx.float32: 0.0, mx.float16: 2.0**-25, mx.bfloat16: 0.0}  # half of what float16 still tells from 0


def routes_of(rows: int, experts: int, k: int) -> Routes:
    scale = mx.random.uniform(0.5, 2.0, (experts,), key=mx.random.key(1))
    return route_ops(random(rows, rows, experts, scale=2), scale, k)


def check(pairs: mx.array, routes: Routes, dtype: mx.Dtype, place: str) -> mx.array:
    """One rounding to ``dtype`` of a float32 sum of k products: nothing else may enter."""
    found = in_every_order(lambda: gather_sum_kernel(pairs, routes, dtype), place)
    products = wide(pairs)[np.array(routes.place)] * wide(routes.weight)[..., None]
    expected, k = products.sum(1), products.shape[1]
    slack = (k + 1) * 2.0**-24 * np.abs(products).sum(1)
    assert found.dtype == dtype and found.shape == expected.shape
    for result in (found, gather_sum_ops(pairs, routes, dtype)):
        error = np.abs(wide(result) - expected)
        assert (error <= HALF_STEP[dtype] * (np.abs(expected) + slack) + slack + SMALLEST[dtype]).all()
    return found


@pytest.mark.parametrize("dtype", HALF_STEP)
@pytest.mark.parametrize(("rows", "experts", "k", "width"), [(1, 8, 2, 128), (9, 100, 3, 1100), (6, 128, 8, 2816)])
def test_the_demo_a_ragged_and_the_real_width(rows, experts, k, width, dtype, place, proof):
    # 1,100 = 8 x 137.5: four to a thread, and 275 threads of 384
    check(random(width, rows * k, width, dtype=dtype), routes_of(rows, experts, k), dtype, place)
    proof("gather_sum", dtype)


@pytest.mark.parametrize("width", [37, 74, 4, 1])
def test_widths_that_no_wide_load_divides(width, place):
    check(random(width, 11 * 3, width, dtype=mx.bfloat16), routes_of(11, 8, 3), mx.bfloat16, place)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_experts_in_float32_of_a_narrower_model(dtype, place):
    check(random(3, 7 * 2, 200), routes_of(7, 8, 2), dtype, place)


def test_one_expert_for_all(place):
    check(random(4, 40, 24), routes_of(40, 1, 1), mx.float32, place)


def test_the_sum_is_taken_in_the_order_of_chosen(place):
    # 1e8 + 1 is 1e8 in float32: of the orders of these four, only some give 1. The weights are powers of two.
    values = mx.array([[1e8, 1.0, -1e8, 0.5]] * 3)
    weight = mx.array([[1.0, 1.0, 1.0, 2.0], [2.0, 1.0, 2.0, 2.0], [1.0, 0.5, 1.0, 1.0]])
    places = np.array([[3, 11, 0, 5], [9, 1, 10, 2], [4, 8, 6, 7]], np.uint32)
    pairs = np.empty((12, 8), np.float32)
    pairs[places.flatten()] = np.array(values).reshape(12, 1)
    none = mx.zeros(12, mx.uint32)
    routes = Routes(weight, mx.array(places), none, none, mx.array(places))
    found = in_every_order(lambda: gather_sum_kernel(mx.array(pairs), routes, mx.float32), place)
    assert np.array(found).tolist() == [[1.0] * 8, [1.0] * 8, [0.5] * 8]


def test_a_pair_that_weighs_nothing_adds_nothing(place):
    routes = routes_of(5, 8, 2)
    muted = Routes(routes.weight * mx.array([1.0, 0.0]), routes.chosen, routes.expert, routes.token, routes.place)
    pairs = random(9, 10, 16)
    found = check(pairs, muted, mx.float32, place)
    alone = wide(pairs)[np.array(routes.place)[:, 0]] * wide(routes.weight)[:, :1]
    assert relative_error(found, alone) <= 2.0**-24


def test_inputs_that_metal_would_see_as_constants_are_refused():
    with pytest.raises(AssertionError, match="address space"):
        gather_sum_kernel(mx.zeros((2, 3)), routes_of(1, 8, 2), mx.float32)


def test_the_mixture_of_experts(place):
    rows, experts, k, width, inner = 33, 10, 3, 24, 20
    x, scores = random(1, rows, width), random(2, rows, experts)
    gate_up, down = random(3, experts, 2 * inner, width, scale=0.3), random(4, experts, width, inner, scale=0.3)
    scale = mx.random.uniform(0.5, 2.0, (experts,), key=mx.random.key(5))
    banks = Dense(gate_up), Dense(down)
    fused = with_kernels(("route", "geglu", "gather_sum"))

    def run(ops):
        return mix(x, ops.route(scores, scale, k), *banks, ops, mx.float32)

    expected, odds = np.zeros((rows, width)), wide(odds_of(scores))
    for n, row in enumerate(wide(x)):
        best = np.argsort(-odds[n], kind="stable")[:k]
        for e in best:
            gate, up = np.split(wide(gate_up)[e] @ row, 2)
            gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            share = odds[n, e] / odds[n, best].sum() * wide(scale)[e]
            expected[n] += share * (wide(down)[e] @ (gelu * up))
    assert relative_error(in_every_order(lambda: run(fused), place), expected) <= 1e-6
    assert relative_error(run(PLAIN), expected) <= 1e-6
