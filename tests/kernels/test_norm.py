"""Norms and what is fused with them: against float64, against plain torch, and in FP8 bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cuda_backend.kernels.norm import (
    AfterAttention,
    AfterExperts,
    after_attention_kernel,
    after_attention_ops,
    after_experts_kernel,
    after_experts_ops,
    norm_kernel,
    norm_ops,
)
from cuda_backend.kernels.quantize import Fp8Rows, quantize_kernel, quantize_ops
from tests.kernels.harness import CARD, in_every_order
from tests.kernels.roundings import assert_alike, assert_quantized_alike

CARD, EPS = CARD, 1e-6
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1), (3, 37), (5, 300), (2, 2816))


def rows(place: str, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different size, each with an outlier."""
    x = torch.randn(count, width) * torch.logspace(-2, 2, count)[:, None]
    x[:, width // 2] *= 20
    return x.to(place, dtype)


def vector(place: str, width: int) -> Tensor:
    return torch.rand(width, device="cpu").add_(0.5).to(place)


def exact_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    x = x.double()
    normed = x * (x.square().mean(-1, keepdim=True) + EPS) ** -0.5
    return normed if weight is None else normed * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), SHAPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_norm(count, width, weighted, dtype, place, proof):
    torch.manual_seed(width)
    h, weight = rows(place, count, width, dtype), vector(place, width) if weighted else None
    found = in_every_order(lambda: norm_kernel(h, weight, EPS, False, CARD))
    assert_alike(found, norm_ops(h, weight, EPS, False), exact_norm(h, weight))
    proof("norm", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_norm_in_fp8_is_the_norm_then_quantized(count, width, dtype, place):
    torch.manual_seed(width)
    h, weight = rows(place, count, width, dtype), vector(place, width)
    found = in_every_order(lambda: norm_kernel(h, weight, EPS, True, CARD))
    assert_equal(found, quantize_kernel(norm_kernel(h, weight, EPS, False, CARD), CARD))  # sums in the same order
    wide = norm_ops(h.float(), weight, EPS, False)
    assert_quantized_alike(found, wide, dtype)


def test_plain_fp8_is_composed(place):
    h, weight = rows(place, 3, 37, torch.bfloat16), vector(place, 37)
    assert_equal(norm_ops(h, weight, EPS, True), quantize_ops(norm_ops(h, weight, EPS, False)))


def test_rows_of_zeros_stay_zero(place):
    for fp8 in (False, True):
        found = norm_kernel(torch.zeros(2, 40, device=place), None, EPS, fp8, CARD)
        dense = found.dense(torch.float32) if isinstance(found, Fp8Rows) else found
        assert torch.equal(dense, torch.zeros(2, 40, device=place))


def assert_equal(found, plain) -> None:
    """Bit for bit."""
    assert isinstance(found, Fp8Rows) == isinstance(plain, Fp8Rows)
    pairs = vars(found).values(), vars(plain).values()
    for a, b in zip(*pairs, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---- after the attention


def attention_weights(place: str, width: int, dtype: torch.dtype) -> AfterAttention:
    return AfterAttention(*(vector(place, width) for _ in range(3)), vector(place, width).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_after_attention(count, width, dtype, place, proof):
    torch.manual_seed(width)
    h, joined = (rows(place, count, width, dtype) for _ in range(2))
    weights = attention_weights(place, width, dtype)
    found = in_every_order(lambda: after_attention_kernel(h, joined, weights, EPS, False, False, CARD))
    plain = after_attention_ops(h, joined, weights, EPS, False, False)
    stream = h.double() + exact_norm(joined, weights.post_attention_layernorm)
    truth = {
        "stream": stream,
        "dense": exact_norm(stream, weights.pre_feedforward_layernorm),
        "experts": exact_norm(stream, weights.pre_feedforward_layernorm_2),
        "router": exact_norm(stream, None) * weights.router_scale.double() * width**-0.5,
    }
    for field in dataclasses.fields(found):
        assert_alike(getattr(found, field.name), getattr(plain, field.name), truth[field.name])
    proof("after_attention", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [(True, True), (True, False), (False, True)])
def test_after_attention_in_fp8(fp8, dtype, place):
    torch.manual_seed(7)
    h, joined = (rows(place, 3, 37, dtype) for _ in range(2))
    weights = attention_weights(place, 37, dtype)
    dense = after_attention_kernel(h, joined, weights, EPS, False, False, CARD)
    found = in_every_order(lambda: after_attention_kernel(h, joined, weights, EPS, *fp8, CARD))
    assert torch.equal(found.stream, dense.stream) and torch.equal(found.router, dense.router)
    for name, quantized in zip(("dense", "experts"), fp8, strict=True):
        wanted = getattr(dense, name)
        if quantized:
            assert_equal(getattr(found, name), quantize_kernel(wanted, CARD))
        else:
            assert torch.equal(getattr(found, name), wanted)
    plain = after_attention_ops(h, joined, weights, EPS, *fp8)
    assert isinstance(plain.dense, Fp8Rows) == fp8[0] and isinstance(plain.experts, Fp8Rows) == fp8[1]


# ---- after the experts


@dataclasses.dataclass(frozen=True)
class Case:
    h: Tensor
    dense: Tensor
    pairs: Tensor
    weight: Tensor
    norms: AfterExperts
    scalar: Tensor
    next_norm: Tensor


def case(place: str, count: int, width: int, top: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(width)
    return Case(
        rows(place, count, width, dtype),
        rows(place, count, width, dtype),
        rows(place, count * top, width, dtype),
        torch.rand(count, top, device="cpu").to(place),
        AfterExperts(*(vector(place, width) for _ in range(3))),
        vector(place, count).to(dtype),
        vector(place, width),
    )


def run(operation, c: Case, next_norm: Tensor | None, fp8: bool, *card):
    return operation(c.h, c.dense, c.pairs, c.weight, c.norms, c.scalar, EPS, next_norm, fp8, *card)


def exact_stream(c: Case) -> Tensor:
    mixed = (c.pairs.double().unflatten(0, c.weight.shape) * c.weight.double()[..., None]).sum(1)
    both = exact_norm(c.dense, c.norms.post_feedforward_layernorm_1) + exact_norm(
        mixed, c.norms.post_feedforward_layernorm_2
    )
    return (c.h.double() + exact_norm(both, c.norms.post_feedforward_layernorm)) * c.scalar.double()[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width", "top"), [(1, 1, 1), (3, 37, 8), (5, 300, 3), (2, 2816, 8)])
def test_after_experts(count, width, top, dtype, place, proof):
    c = case(place, count, width, top, dtype)
    stream, normed = in_every_order(lambda: run(after_experts_kernel, c, c.next_norm, False, CARD))
    plain_stream, plain_normed = run(after_experts_ops, c, c.next_norm, False)
    truth = exact_stream(c)
    assert_alike(stream, plain_stream, truth)
    assert_alike(normed, plain_normed, exact_norm(truth, c.next_norm))
    proof("after_experts", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_experts_in_fp8_and_without_a_norm(dtype, place):
    c = case(place, 3, 37, 8, dtype)
    stream, normed = run(after_experts_kernel, c, c.next_norm, False, CARD)
    same, found = in_every_order(lambda: flattened(run(after_experts_kernel, c, c.next_norm, True, CARD)))[:2]
    assert torch.equal(same, stream)
    assert_equal(run(after_experts_kernel, c, c.next_norm, True, CARD)[1], quantize_kernel(normed, CARD))
    assert found.dtype == torch.float8_e4m3fn
    alone, nothing = run(after_experts_kernel, c, None, False, CARD)
    assert torch.equal(alone, stream) and nothing is None
    assert run(after_experts_ops, c, None, False)[1] is None


def flattened(result):
    stream, normed = result
    return stream, normed.codes, normed.scales


def test_experts_are_summed_best_first(place):
    """1 + 2^-24 is 1 in float32, seven times over; 7 * 2^-24 + 1 is not. The second column has but the 1."""
    weight = torch.full((1, 8), 2.0**-24, device=place)
    weight[:, 0] = 1
    pairs = torch.ones(8, 2, device=place)
    pairs[1:, 1] = 0
    zero, ones = torch.zeros(1, 2, device=place), torch.ones(2, device=place)
    c = Case(zero, zero, pairs, weight, AfterExperts(ones, ones, ones), torch.ones(1, device=place), ones)
    turned = dataclasses.replace(c, weight=weight.flip(1), pairs=pairs.flip(0))
    for operation, card in ((after_experts_ops, ()), (after_experts_kernel, (CARD,))):
        best_first, last_first = (run(operation, given, None, False, *card)[0][0] for given in (c, turned))
        assert best_first[0] == best_first[1]
        assert last_first[0] != last_first[1]
