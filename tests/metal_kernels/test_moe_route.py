"""Routes: integers exactly those of a stable sort in NumPy and of plain MLX, weights against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.mlx_backend.kernels.moe import Routes, odds_of, route_kernel, route_ops
from tests.metal_kernels.harness import in_every_order, random, wide

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
INTEGERS = ("chosen", "expert", "token", "place")
# A share is e^-d over a sum, d rounded to float32: off by d e^-d 2^-24, and by some ten roundings of its own.
SCALES = (0.5, 2.0)
TOLERANCE = 16 * 2.0**-24 * max(SCALES)


def truth(scores: mx.array, scale: mx.array, k: int) -> dict[str, np.ndarray]:
    """float64, with Python's own stable sorts."""
    s = wide(scores)
    odds = np.exp(s - s.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    chosen = np.argsort(-s, 1, kind="stable")[:, :k]
    kept = np.take_along_axis(odds, chosen, 1)
    order = np.argsort(chosen.flatten(), kind="stable")
    place = np.empty(order.size, int)
    place[order] = np.arange(order.size)
    weight = kept / kept.sum(1, keepdims=True) * wide(scale)[chosen]
    parts = {"weight": weight, "chosen": chosen, "expert": chosen.flatten()[order], "token": order // k}
    return parts | {"place": place.reshape(chosen.shape)}


def check(scores: mx.array, k: int, place: str) -> Routes:
    """The kernel and the plain version against the truth; weights are finite."""
    scale = mx.random.uniform(*SCALES, (scores.shape[1],), key=mx.random.key(k))
    found = in_every_order(lambda: route_kernel(scores, scale, k), place)
    expected = truth(scores, scale, k)
    for routes in (found, route_ops(scores, scale, k)):
        for name in INTEGERS:
            array = getattr(routes, name)
            assert array.dtype == mx.uint32, name
            assert np.array_equal(np.array(array), expected[name]), name
        assert routes.weight.dtype == mx.float32
        assert np.abs(wide(routes.weight) - expected["weight"]).max() <= TOLERANCE
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "experts", "k"), [(1, 8, 2), (33, 100, 3), (256, 128, 8)])
def test_the_demo_a_ragged_and_the_real_shape(rows, experts, k, dtype, place, proof):
    check(random(rows, rows, experts, dtype=dtype, scale=3), k, place)
    proof("route", dtype)


@pytest.mark.parametrize(("rows", "experts", "k"), [(9, 1, 1), (70, 5, 5), (29, 512, 16), (40, 225, 32), (2100, 8, 2)])
def test_edges_of_the_shape(rows, experts, k, place):
    # every expert chosen, more scores a lane than experts, fewer simdgroups than 32, a lane per choice, many rows each
    check(random(rows, rows, experts, dtype=mx.bfloat16, scale=3), k, place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_expert(dtype, place):
    scores = np.array(mx.round(random(5, 256, 128)))  # 7 values or so: most of the best 8 are tied
    scores[::4] = 0.25
    scores[1::4] = np.where(scores[1::4] > 0, 0.0, -0.0)  # which are equal
    scores[2::4] = -np.abs(scores[2::4])
    check(mx.array(scores).astype(dtype), 8, place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scores(dtype, place):
    most = {mx.float16: 6e4, mx.bfloat16: 3e38, mx.float32: 3e38}[dtype]
    scores = np.array(random(6, 33, 100))
    scores[0::6] *= most / 8  # one takes all
    scores[1::6, 5:] = -np.inf  # only five can be chosen, the others weigh nothing
    scores[2::6, :] = -most
    scores[3::6, 1::2] = -most
    scores[4::6, ::3] = -0.0
    scores[5::6] = -np.abs(scores[5::6]) * 1e-4  # small and below 0
    check(mx.array(scores.clip(-np.inf, most)).astype(dtype), 8, place)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_scores_decide_where_probabilities_are_equal(dtype, place):
    scores = np.full((3, 40), -200.0)
    scores[:, 7], scores[:, 20:] = 0, np.linspace(-180, -104, 20)  # e^-104 is 0 in float32
    found = check(mx.array(scores).astype(dtype), 4, place)
    assert np.array(found.chosen)[0].tolist() == [7, 39, 38, 37]
    assert np.array(odds_of(mx.array(scores).astype(dtype)))[0, 37:].tolist() == [0, 0, 0]


def test_what_is_no_number_stays_in_its_row(place):
    scores = random(7, 34, 20)
    broken = mx.where((mx.arange(34) == 4)[:, None] & (mx.arange(20) % 7 == 3), mx.nan, scores)
    broken = mx.where((mx.arange(34) == 9)[:, None] & (mx.arange(20) == 11), -mx.nan, broken)
    scale = mx.ones(20)
    found = in_every_order(lambda: route_kernel(broken, scale, 4), place)
    plain = route_ops(broken, scale, 4)
    for name in INTEGERS:
        assert np.array_equal(np.array(getattr(found, name)), np.array(getattr(plain, name))), name
    assert np.array(found.chosen)[4, :3].tolist() == [3, 10, 17] and np.array(found.chosen)[9, 0] == 11
    rest = np.delete(np.arange(34), [4, 9])
    assert np.array_equal(np.isfinite(np.array(found.weight)).all(1).nonzero()[0], rest)
    assert np.array_equal(np.array(found.chosen)[rest], np.array(route_ops(scores, scale, 4).chosen)[rest])


def test_the_scale_comes_after_renormalising(place):
    scores = random(8, 6, 16)
    ones = in_every_order(lambda: route_kernel(scores, mx.ones(16), 3), place)
    assert np.abs(np.array(ones.weight).sum(1) - 1).max() <= 4 * 2.0**-24
    scaled = in_every_order(lambda: route_kernel(scores, mx.full((16,), 4.0), 3), place)
    assert np.array_equal(np.array(scaled.weight), 4 * np.array(ones.weight))


@pytest.mark.parametrize(("experts", "k"), [(513, 8), (64, 33), (4, 5)])
def test_shapes_the_kernel_does_not_take_are_refused(experts, k):
    with pytest.raises(ValueError, match="the route kernel takes 512 experts and 32 chosen"):
        route_kernel(mx.zeros((2, experts)), mx.ones(experts), k)
