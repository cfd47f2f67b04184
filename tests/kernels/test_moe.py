"""The experts against float64, in every encoding; routings with experts that get nothing, or everything."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_backend.kernels import moe
from cuda_backend.kernels.cards import CARDS
from cuda_backend.kernels.moe import experts_kernel, experts_ops, tokens_of
from cuda_backend.kernels.quantize import Fp8Rows, Rows, quantize_ops
from cuda_backend.kernels.router import Routes, route_ops
from cuda_backend.kernels.unpack import operand
from cuda_backend.linear import Weight
from mlx_diffgemma.formats.encoding import Encoding, grouped
from tests.kernels.harness import CARD, SHORT, in_every_order, relative_error
from tests.kernels.stored import ENCODINGS, FP8, GLOBAL, random

DTYPES = (torch.float32, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
EXPERTS, TOP = 5, 2


def routes_of(tokens: int, place: str, favoured: int | None = None) -> Routes:
    """Nobody goes to expert 2; all to the favoured one, if there is one."""
    torch.manual_seed(tokens)
    scores = torch.randn(tokens, EXPERTS, device=place)
    scores[:, 2] = -9
    if favoured is not None:
        scores[:, favoured] = 9
    return route_ops(scores, torch.ones(EXPERTS, device=place), TOP)


def banks(inner: int, width: int, encoding: Encoding | None, dtype: torch.dtype, place: str) -> tuple[Weight, Weight]:
    return (
        random((EXPERTS, 2 * inner, width), encoding, dtype, place),
        random((EXPERTS, width, inner), encoding, dtype, place),
    )


def tokens_in(count: int, width: int, dtype: torch.dtype, place: str) -> Tensor:
    torch.manual_seed(count + width)
    return torch.randn(count, width).to(place, dtype)


def truth_of(x: Rows, routes: Routes, gate_up: Weight, down: Weight) -> Tensor:
    """float64, pair by pair, without any rounding but that of activations to FP8."""
    wide = x.codes.float().double() * x.scales.double() if isinstance(x, Fp8Rows) else x.double()
    first, second = (bank.dense(torch.float32).double() for bank in (gate_up, down))
    out = []
    for pair, expert in enumerate(routes.chosen.flatten().tolist()):
        gate, up = (first[expert] @ wide[pair // TOP]).chunk(2)
        act = F.gelu(gate, approximate="tanh") * up
        if isinstance(x, Fp8Rows):
            act = quantize_ops(act.float()[None]).dense(torch.float32)[0].double()
        out.append(second[expert] @ act)
    return torch.stack(out)


def check(found: Tensor, x: Rows, routes: Routes, gate_up: Weight, down: Weight) -> None:
    dtype = found.dtype
    plain = experts_ops(x, routes, gate_up, down, dtype)
    truth = truth_of(x, routes, gate_up, down)
    assert found.shape == plain.shape == truth.shape and plain.dtype == dtype
    if isinstance(x, Fp8Rows) and SHORT:
        assert relative_error(found, truth) < 2**-6
        return
    if dtype == torch.float32:
        assert relative_error(found, truth) < 1e-5
        assert relative_error(found, plain) < 1e-5
    else:
        assert relative_error(found, truth) <= max(2**-7, 1.5 * relative_error(plain, truth))
        assert relative_error(found, plain) < 2**-6
        if isinstance(x, Fp8Rows) or operand(gate_up, x, CARD).row_scale is None:  # the same numbers multiplied
            assert (found != plain).double().mean() < 0.01


@every_dtype
@pytest.mark.parametrize("encoding", [None, *ENCODINGS], ids=str)
def test_experts(encoding, dtype, place, proof):
    inner = 96 if encoding is None or encoding.group_size <= 32 else 64
    x, routes = tokens_in(37, 192, dtype, place), routes_of(37, place, favoured=3)
    weights = banks(inner, 192, encoding, dtype, place)
    found = experts_kernel(x, routes, *weights, dtype, CARD)
    check(found, x, routes, *weights)
    proof("experts", dtype)


@every_dtype
def test_experts_of_fp8_rows(dtype, place, proof):
    x, routes = quantize_ops(tokens_in(37, 192, dtype, place)), routes_of(37, place)
    weights = banks(80, 192, FP8, dtype, place)
    check(in_every_order(lambda: experts_kernel(x, routes, *weights, dtype, CARD)), x, routes, *weights)
    proof("experts", dtype)


@pytest.mark.parametrize("encoding", [FP8, grouped("mxfp8")], ids=str)
def test_experts_on_a_card_without_fp8(encoding, place):
    x, routes = tokens_in(9, 64, torch.bfloat16, place), routes_of(9, place)
    weights = banks(32, 64, encoding, torch.bfloat16, place)
    check(experts_kernel(x, routes, *weights, x.dtype, CARDS[80]), x, routes, *weights)


@pytest.mark.parametrize("encoding", [GLOBAL, ENCODINGS[5]], ids=str)
def test_experts_in_any_order_of_programs(encoding, place):
    x, routes = tokens_in(11, 128, torch.bfloat16, place), routes_of(11, place)
    weights = banks(160, 128, encoding, torch.bfloat16, place)
    check(in_every_order(lambda: experts_kernel(x, routes, *weights, x.dtype, CARD)), x, routes, *weights)


@pytest.mark.parametrize("tokens", [1, 33, 60, 160])
def test_every_tile_of_tokens(tokens, place, monkeypatch):
    """Of 16, 32, 64 and 128 rows; 33 tokens and 160 fill more than one. Tiles of many tokens go in groups."""
    monkeypatch.setattr(moe, "TOGETHER", 3)
    x, routes = tokens_in(tokens, 40, torch.float32, place), routes_of(tokens, place, favoured=0)
    weights = banks(24, 40, None, torch.float32, place)
    assert tokens_of(2 * tokens / EXPERTS) == {1: 16, 33: 32, 60: 64, 160: 128}[tokens]
    check(in_every_order(lambda: experts_kernel(x, routes, *weights, x.dtype, CARD)), x, routes, *weights)


def test_tiles_have_room_for_experts_that_get_more_than_their_share():
    means = {tokens: tokens * 8 / 128 for tokens in (1, 256, 512, 4096)}
    assert [tokens_of(mean) for mean in means.values()] == [16, 32, 64, 128]


@every_dtype
def test_fp8_between_the_products_is_per_pair(dtype, place):
    """Tokens of very different size: a scale taken over several of them would drown the small ones."""
    wide = tokens_in(6, 64, dtype, place) * torch.logspace(-4, 4, 6, device=place)[:, None].to(dtype)
    x, routes = quantize_ops(wide), routes_of(6, place)
    weights = banks(32, 64, FP8, dtype, place)
    found, truth = experts_kernel(x, routes, *weights, dtype, CARD), truth_of(x, routes, *weights)
    for pair in range(12):
        assert relative_error(found[pair], truth[pair]) < (1e-5 if dtype == torch.float32 else 2**-4), pair


def test_fp8_activations_need_fp8_weights(place):
    x, routes = quantize_ops(tokens_in(3, 64, torch.bfloat16, place)), routes_of(3, place)
    with pytest.raises(AssertionError):
        experts_kernel(x, routes, *banks(32, 64, grouped("nvfp4"), torch.bfloat16, place), torch.bfloat16, CARD)
