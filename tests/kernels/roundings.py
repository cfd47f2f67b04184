"""Where two ways of computing the same may differ: a sum taken in another order can turn a rounding over.

In float32 that shows as a small error. In bfloat16 and in FP8 most numbers are equal bit for bit, and the few that are
not must be explained: those are counted and bounded, and no tolerance is widened for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_backend.kernels.quantize import Fp8Rows, Rows, quantize_ops
from tests.kernels.harness import relative_error

SLACK = 2e-6  # relative, of float32 sums and what is made of them


def assert_alike(found: Tensor, plain: Tensor, truth: Tensor) -> None:
    """``found`` and ``plain`` against the float64 ``truth``, and against each other."""
    assert found.dtype == plain.dtype and found.shape == plain.shape
    assert found.isfinite().all()
    if found.dtype == torch.float32:
        assert relative_error(found, truth) < 1e-5
        assert relative_error(found, plain) < 1e-5
        return
    turned = found != plain
    assert turned.sum() <= 1 + found.numel() // 1000, f"{turned.sum()} of {found.numel()} rounded otherwise"
    apart = (found.double() - plain.double()).abs()
    assert (apart <= plain.double().abs() * 2**-6).all(), "by more than two steps"
    assert relative_error(found, truth) <= 2 * relative_error(plain, truth)


def assert_quantized_alike(found: Rows, wide: Tensor, dtype: torch.dtype) -> None:
    """``found`` is the FP8 of ``wide`` (float32, not yet rounded to ``dtype``), wherever that is decided.

    Undecided is what would round otherwise if ``wide`` were greater or smaller by ``SLACK``. A row's scale is decided
    where its greatest value is; in float32, where nothing is rounded on the way, it may be off by ``SLACK`` itself.
    """
    assert isinstance(found, Fp8Rows)
    plain = quantize_ops(wide.to(dtype))
    if dtype == torch.float32:
        assert ((found.scales / plain.scales - 1).abs() <= SLACK).all()
        slack, settled = SLACK, torch.ones_like(wide, dtype=torch.bool)
    else:
        edges = [(wide.abs().amax(-1) * (1 + sign * SLACK)).to(dtype) for sign in (-1, 1)]
        slack, settled = 0.0, (edges[0] == edges[1])[:, None].expand_as(wide)
        assert torch.equal(found.scales[settled[:, :1]], plain.scales[settled[:, :1]])
    below, above = (
        ((wide * (1 + sign * SLACK)).to(dtype).float() / plain.scales * (1 + sign * slack))
        .clamp(-448, 448)
        .to(torch.float8_e4m3fn)
        .view(torch.uint8)
        for sign in (-1, 1)
    )
    decided = (below == above) & settled
    assert (~decided).sum() <= 1 + decided.numel() // 500, "too little is decided to prove anything"
    codes, wanted = found.codes.view(torch.uint8), plain.codes.view(torch.uint8)
    assert torch.equal(codes[decided], wanted[decided])
    assert ((codes.short() - wanted.short()).abs() <= 1)[settled].all(), "by more than one step"
