"""Activations in FP8 against torch's own rounding, bit for bit."""

from __future__ import annotations

import pytest
import torch

from cuda_backend.kernels.quantize import quantize_kernel, quantize_ops
from tests.kernels.harness import CARD, in_every_order

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (5, 300), (2, 2816)])
def test_quantize_is_torchs_rounding(rows, width, dtype, place, proof):
    torch.manual_seed(rows)
    x = (torch.randn(rows, width) * torch.logspace(-6, 3, rows)[:, None]).to(place, dtype)
    x[0, 0] = 0
    plain = quantize_ops(x)
    found = in_every_order(lambda: quantize_kernel(x, CARD))
    assert torch.equal(found.scales, plain.scales)
    assert torch.equal(found.codes.view(torch.uint8), plain.codes.view(torch.uint8))
    proof("quantize", dtype)


def test_a_row_of_zeros_stays_zero(place):
    found = quantize_kernel(torch.zeros(2, 40, device=place), CARD)
    assert torch.equal(found.dense(torch.float32), torch.zeros(2, 40, device=place))
