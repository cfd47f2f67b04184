"""Products in FP8, by the twin in Triton and by torch's own: against float64, and against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_backend.kernels import fp8_gemm
from cuda_backend.kernels.cards import CARDS
from cuda_backend.kernels.fp8_gemm import TILES, fits, fp8_config, fp8_linear, fp8_linear_kernel, fp8_linear_ops
from cuda_backend.kernels.quantize import Fp8Rows, quantize_ops
from mlx_diffgemma.errors import BackendError
from tests.kernels.harness import CARD, SHORT, in_every_order
from tests.kernels.roundings import assert_alike

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1, 1), (37, 33, 48), (3, 144, 130), (130, 70, 300))  # rows, out, in


def operands(place: str, rows: int, out: int, inner: int) -> tuple[Fp8Rows, Fp8Rows]:
    """Activations, and a weight with a scale per row of it, some rows very small."""
    torch.manual_seed(out)
    x = torch.randn(rows, inner) * torch.logspace(-2, 2, rows)[:, None]
    weight = torch.randn(out, inner) * torch.logspace(-3, 0, out)[:, None]
    return quantize_ops(x.to(place)), quantize_ops(weight.to(place))


def exact(x: Fp8Rows, weight: Fp8Rows) -> Tensor:
    a, b = ((rows.codes.float().double() * rows.scales.double()) for rows in (x, weight))
    return a @ b.T


def check(found: Tensor, x: Fp8Rows, weight: Fp8Rows, codes: Tensor, scales: Tensor) -> None:
    """Rows and columns differ by orders of magnitude: each product is also compared in units of its own scales."""
    truth = exact(x, weight)
    if not SHORT:
        assert_alike(found, fp8_linear_ops(x, codes, scales, found.dtype), truth)
    units = x.scales.double() * weight.scales.double().T
    rounding = 0 if found.dtype == torch.float32 else 2**-8
    error, size = (found.double() - truth).abs() / units, truth.abs() / units
    assert (error <= (2**-10 if SHORT else 1e-5) * size.max() + rounding * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_twin(shape, dtype, place, proof):
    x, weight = operands(place, *shape)
    found = in_every_order(lambda: fp8_linear_kernel(x, weight.codes, weight.scales, dtype, CARDS[89]))
    check(found, x, weight, weight.codes, weight.scales)
    proof("fp8_linear", dtype)


@pytest.mark.parametrize("tile", range(3))
def test_every_tile(tile, place, monkeypatch):
    x, weight = operands(place, 133, 70, 144)
    monkeypatch.setattr(fp8_gemm, "fp8_config", lambda *_: TILES[90][tile])
    found = in_every_order(lambda: fp8_linear_kernel(x, weight.codes, weight.scales, torch.float32, CARD))
    check(found, x, weight, weight.codes, weight.scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sm", [89, 90])
def test_both_implementations_of_the_table(sm, dtype, place):
    x, weight = operands(place, 37, 48, 80)
    for codes in (weight.codes, weight.codes.view(torch.uint8)):
        for scales in (weight.scales, weight.scales[:, 0]):
            found = fp8_linear(x, codes, scales, dtype, CARDS[sm])
            check(found, x, weight, codes, scales)


def test_sizes_that_do_not_fit(place):
    assert fits(2816, 2112) and fits(16, 16)
    assert not fits(2816, 37) and not fits(8, 16) and not fits(0, 16)
    x, weight = operands(place, 2, 24, 48)
    with pytest.raises(BackendError, match="multiples of 16"):
        fp8_linear(x, weight.codes, weight.scales, torch.bfloat16, CARD)


def test_tiles_follow_the_work():
    card = CARD
    chosen = [fp8_config(256, out, card)["BLOCK_M"] * fp8_config(256, out, card)["BLOCK_N"] for out in (2816, 8192)]
    assert chosen == [64 * 64, 128 * 128]
    assert fp8_config(1, 16, card) == TILES[90][-1]
