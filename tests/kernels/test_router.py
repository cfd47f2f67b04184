"""Routing: the right experts even where scores are equal, their weights, and the sorted pairs."""

from __future__ import annotations

import pytest
import torch

from cuda_backend.kernels.router import Routes, route_kernel, route_ops
from tests.kernels.harness import CARD, in_every_order, relative_error

CASES = [(1, 5, 2), (37, 128, 8), (9, 7, 7), (300, 12, 3), (3, 1, 1)]


def scores(tokens: int, experts: int, dtype: torch.dtype, place: str) -> torch.Tensor:
    torch.manual_seed(tokens + experts)
    return (torch.randn(tokens, experts) * 2).to(place, dtype)


def scale(experts: int, dtype: torch.dtype, place: str) -> torch.Tensor:
    return torch.linspace(0.3, 3, experts).to(place, dtype)


def check_equal(found: Routes, plain: Routes) -> None:
    """Choices and places are whole numbers, so they are the same; the sums of a softmax may differ."""
    for name in ("chosen", "order", "ends"):
        assert getattr(found, name).dtype == torch.int32
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    assert relative_error(found.weight, plain.weight) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "top"), CASES)
def test_routes_are_those_of_float64(tokens, experts, top, dtype, place, proof):
    given, factor = scores(tokens, experts, dtype, place), scale(experts, dtype, place)
    found = in_every_order(lambda: route_kernel(given, factor, top, CARD))
    check_equal(found, route_ops(given, factor, top))
    odds = torch.softmax(given.double(), -1)
    chosen = found.chosen.long()
    best = odds.gather(1, chosen)
    assert torch.equal(best, odds.sort(dim=-1, descending=True).values[:, :top])
    assert relative_error(found.weight, best / best.sum(-1, keepdim=True) * factor[chosen].double()) < 1e-6
    proof("route", dtype)


def test_equal_scores_go_to_the_lowest_expert(place):
    given = torch.zeros(6, 16, device=place, dtype=torch.bfloat16)
    given[1, 3::4] = 1
    given[2, 5] = -1
    given[3, 1:] = -0.0
    factor = torch.ones(16, device=place)
    plain = route_ops(given, factor, 4)
    check_equal(route_kernel(given, factor, 4, CARD), plain)
    assert plain.chosen.tolist() == [[0, 1, 2, 3], [3, 7, 11, 15], *[[0, 1, 2, 3]] * 4]


def test_scores_far_apart_do_not_overflow(place):
    given = torch.tensor([[-3e4, 3e4, 0.0, 2.9e4]], device=place)
    found = route_kernel(given, torch.ones(4, device=place), 2, CARD)
    assert found.chosen.tolist() == [[1, 3]]
    assert found.weight.tolist() == [[1.0, 0.0]]


def test_pairs_beyond_one_turn_of_the_sort_keep_their_order(place):
    given = scores(700, 4, torch.float32, place)  # 2,100 pairs
    factor = torch.ones(4, device=place)
    check_equal(in_every_order(lambda: route_kernel(given, factor, 3, CARD)), route_ops(given, factor, 3))


def test_sorted_pairs_are_those_of_the_choices(place):
    found = route_kernel(scores(50, 6, torch.float32, place), torch.ones(6, device=place), 2, CARD)
    flat = found.chosen.flatten()
    assert torch.equal(flat[found.order.long()].long(), flat.long().sort().values)
    assert sorted(found.order.tolist()) == list(range(100))
    assert found.ends.tolist() == [int((flat <= expert).sum()) for expert in range(6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_routes_are_the_networks(dtype):
    """The formula of ``Network.route``, with ``torch.topk``, where no two scores are equal."""
    given, factor = torch.randperm(12 * 16).view(12, 16).to(dtype) / 16, scale(16, dtype, "cpu")
    odds = torch.softmax(given, -1, dtype=torch.float32)
    weight, chosen = torch.topk(odds, 5, -1)
    plain = route_ops(given, factor, 5, odds=True)
    assert torch.equal(plain.chosen, chosen.int())
    assert torch.equal(plain.weight, weight / weight.sum(-1, keepdim=True) * factor[chosen])
    assert plain.odds is not None and torch.equal(plain.odds, odds)


def test_a_row_without_numbers_stays_inside_the_bank(place):
    given = torch.full((2, 5), float("nan"), device=place)
    found = route_kernel(given, torch.ones(5, device=place), 3, CARD)
    assert int(found.chosen.min()) >= 0 and int(found.chosen.max()) < 5
    assert sorted(found.order.tolist()) == list(range(6))
