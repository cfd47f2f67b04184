"""Queries, keys and values: against float64, against plain torch, and nothing written outside."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cuda_backend.kernels.heads import heads_kernel, heads_ops
from tests.kernels.harness import CARD, in_every_order
from tests.kernels.roundings import assert_alike

CARD, EPS = CARD, 1e-6
DTYPES = (torch.float32, torch.bfloat16)
UNTOUCHED = -7.0


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    groups: int
    dim: int
    matrices: int  # 2 with values of their own, 1 where they are the raw keys
    shared: bool  # one turn for all rows of the batch


SHAPES = (
    Shape(1, 1, 1, 1, 2, 1, True),
    Shape(2, 5, 6, 3, 12, 2, False),
    Shape(3, 2, 4, 1, 34, 1, True),
    Shape(2, 3, 3, 3, 64, 2, True),
    Shape(1, 2, 16, 8, 256, 2, False),
    Shape(2, 2, 16, 2, 512, 1, False),
)


@dataclass(frozen=True)
class Inputs:
    shape: Shape
    mixed: Tensor
    q_norm: Tensor
    k_norm: Tensor
    cos: Tensor
    sin: Tensor


def inputs(shape: Shape, dtype: torch.dtype, place: str) -> Inputs:
    torch.manual_seed(shape.dim)
    width = (shape.heads + shape.matrices * shape.groups) * shape.dim
    mixed = torch.randn(shape.batch, shape.length, width) * torch.logspace(-1, 1, shape.length)[:, None]
    weights = torch.rand(2, shape.dim) + 0.5
    angle = torch.rand(1 if shape.shared else shape.batch, shape.length, 1, shape.dim // 2) * 100
    cos, sin = angle.cos().to(place, dtype), angle.sin().to(place, dtype)
    return Inputs(shape, mixed.to(place, dtype), weights[0].to(place), weights[1].to(place), cos, sin)


def run(operation, x: Inputs, *card) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and both buffers, which are views with slots left over at the end and a row in front."""
    s = x.shape
    whole = torch.full((2, s.batch + 1, s.groups, s.length + 3, s.dim), UNTOUCHED).to(x.mixed)
    keys, values = whole[0, 1:, :, :-1], whole[1, 1:, :, :-1]
    q = operation(x.mixed, x.q_norm, x.k_norm, x.cos, x.sin, s.heads, s.groups, EPS, keys, values, *card)
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside[:, 1:, :, : s.length] = True
    assert (whole[~inside] == UNTOUCHED).all(), "written outside of its slots"
    return q, keys[:, :, : s.length], values[:, :, : s.length]


def exact(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    s = x.shape
    split = x.mixed.double().unflatten(-1, (-1, s.dim))
    normed = split * (split.square().mean(-1, keepdim=True) + EPS) ** -0.5

    def turned(y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        cos, sin = x.cos.double(), x.sin.double()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    q = turned(normed[:, :, : s.heads] * x.q_norm.double())
    k = turned(normed[:, :, s.heads : s.heads + s.groups] * x.k_norm.double())
    return q, k.transpose(1, 2), normed[:, :, -s.groups :].transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.heads}x{s.dim}")
def test_heads(shape, dtype, place, proof):
    x = inputs(shape, dtype, place)
    found = in_every_order(lambda: run(heads_kernel, x, CARD))
    for one, plain, truth in zip(found, run(heads_ops, x), exact(x), strict=True):
        assert_alike(one, plain, truth)
    proof("heads", dtype)


def test_the_keys_and_values_may_lie_apart(place):
    """Buffers of different strides: those of one layer need not be allocated alike."""
    x = inputs(SHAPES[1], torch.float32, place)
    s = x.shape
    wanted = run(heads_kernel, x, CARD)
    keys = torch.zeros(s.batch, s.groups, s.length, s.dim, device=place)
    values = torch.zeros(s.batch, s.length, s.groups, s.dim, device=place).transpose(1, 2)
    q = heads_kernel(x.mixed, x.q_norm, x.k_norm, x.cos, x.sin, s.heads, s.groups, EPS, keys, values, CARD)
    for one, plain in zip((q, keys, values), wanted, strict=True):
        assert torch.equal(one, plain)
