"""GeGLU against float64, against plain torch, and in FP8 bit for bit what its two halves give."""

from __future__ import annotations

import pytest
import torch

from cuda_backend.kernels.geglu import geglu_kernel, geglu_ops
from cuda_backend.kernels.quantize import quantize_kernel, quantize_ops
from tests.kernels.harness import CARD, in_every_order
from tests.kernels.roundings import assert_alike

CARD = CARD
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1), (3, 37), (4, 64), (5, 300), (2, 2112))


def mixed(place: str, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(width)
    x = torch.randn(rows, 2 * width) * torch.logspace(-2, 1, rows)[:, None]
    x[0, [width - 1, -1]] = 30  # the first row's greatest is its last, the others' lies anywhere
    return x.to(place, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_geglu(rows, width, dtype, place, proof):
    x = mixed(place, rows, width, dtype)
    found = in_every_order(lambda: geglu_kernel(x, False, CARD))
    gate, up = x.double().chunk(2, -1)
    truth = torch.nn.functional.gelu(gate, approximate="tanh") * up
    plain = geglu_ops(x, False)
    gates = gate > -2
    assert_alike(found * gates, plain * gates, truth * gates)
    # below, 1 + tanh is a difference of nearly equal numbers, and 2^-23 off in torch as well as here
    near = (found.double() - plain.double()).abs() <= 2**-22 * (gate * up).abs() + 2**-6 * plain.abs()
    assert near.all()
    proof("geglu", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_geglu_in_fp8_is_geglu_then_quantized(rows, width, dtype, place):
    x = mixed(place, rows, width, dtype)
    found = in_every_order(lambda: geglu_kernel(x, True, CARD))
    plain = geglu_ops(x, True)
    composed = quantize_kernel(geglu_kernel(x, False, CARD), CARD)
    assert torch.equal(found.scales, composed.scales)
    assert torch.equal(found.codes.view(torch.uint8), composed.codes.view(torch.uint8))
    turned = (found.codes.view(torch.uint8) != plain.codes.view(torch.uint8)) & (x[:, :width] > -2)
    assert turned.sum() <= 1 + turned.numel() // 500
    again = quantize_ops(geglu_ops(x, False))
    assert torch.equal(plain.codes.view(torch.uint8), again.codes.view(torch.uint8))


def test_a_row_of_zeros_stays_zero(place):
    found = geglu_kernel(torch.zeros(2, 80, device=place), True, CARD)
    assert torch.equal(found.dense(torch.float32), torch.zeros(2, 40, device=place))


def test_large_gates_do_not_overflow(place):
    x = torch.tensor([[1e12, -1e12, 60.0, -60.0, 2.0, 2.0, 2.0, 2.0]], device=place)
    assert torch.equal(geglu_kernel(x, False, CARD), geglu_ops(x, False))
