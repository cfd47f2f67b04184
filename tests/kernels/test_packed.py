"""Products with packed weights: every value unpacked right, to the bit, and sums, edges and tiles of every size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cuda_backend.kernels import packed
from cuda_backend.kernels.cards import CARDS
from cuda_backend.kernels.packed import packed_linear_kernel, packed_linear_ops, tile
from cuda_backend.kernels.unpack import operand, unsupported
from cuda_backend.linear import Dense, Quantized, Stack
from mlx_diffgemma.formats.encoding import Encoding, grouped
from tests.kernels.harness import CARD, in_every_order, relative_error
from tests.kernels.stored import ENCODINGS, FP8, GLOBAL, random

DTYPES = (torch.float32, torch.bfloat16)
WIDE = grouped("affine", bits=4, group_size=64, dtype="float32")  # not unpacked in bfloat16
every_encoding = pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def weight(shape: tuple[int, int], encoding: Encoding, place: str) -> Quantized:
    made = random(shape, encoding, torch.float32, place)
    assert isinstance(made, Quantized)
    return made


def rows(count: int, width: int, dtype: torch.dtype, place: str) -> torch.Tensor:
    torch.manual_seed(count)
    return torch.randn(count, width).to(place, dtype)


def check(found: torch.Tensor, x: torch.Tensor, matrix: Quantized) -> None:
    """Not further from the truth than the plain version, which rounds every weight."""
    plain = packed_linear_ops(x, matrix)
    truth = x.double() @ matrix.dense(torch.float32).double().T
    assert found.dtype == plain.dtype and found.shape == plain.shape
    if x.dtype == torch.float32:
        assert relative_error(found, truth) < 1e-5
        assert relative_error(found, plain) < 1e-5
    else:
        assert relative_error(found, truth) <= max(2**-8, 1.5 * relative_error(plain, truth))
        assert relative_error(found, plain) < 2**-7
        if operand(matrix, x, CARD).row_scale is None:  # the same numbers multiplied
            assert (found != plain).sum() <= 1 + found.numel() // 100


@every_dtype
@every_encoding
def test_product(encoding, dtype, place, proof):
    matrix, x = weight((133, 192), encoding, place), rows(37, 192, dtype, place)
    check(in_every_order(lambda: packed_linear_kernel(x, matrix, CARD)), x, matrix)
    proof("packed_linear", dtype)


@pytest.mark.parametrize("encoding", [FP8, grouped("mxfp8")], ids=str)
def test_product_on_a_card_without_fp8(encoding, place):
    matrix, x = weight((70, 160), encoding, place), rows(5, 160, torch.bfloat16, place)
    check(in_every_order(lambda: packed_linear_kernel(x, matrix, CARDS[80])), x, matrix)


@pytest.mark.parametrize("size", packed.TILES)
@pytest.mark.parametrize("encoding", [ENCODINGS[1], FP8], ids=str)
def test_every_tile(encoding, size, place, monkeypatch):
    monkeypatch.setattr(packed, "tile", lambda *_: size)
    matrix, x = weight((150, 96), encoding, place), rows(size[1] + 3, 96, torch.bfloat16, place)
    check(in_every_order(lambda: packed_linear_kernel(x, matrix, CARD)), x, matrix)


@pytest.mark.parametrize(("count", "out", "width"), [(1, 1, 64), (16, 65, 128), (3, 7, 320)])
def test_odd_sizes(count, out, width, place):
    for encoding in (ENCODINGS[1], ENCODINGS[6]):
        matrix, x = weight((out, width), encoding, place), rows(count, width, torch.bfloat16, place)
        check(packed_linear_kernel(x, matrix, CARD), x, matrix)


def any_codes(matrix: Quantized) -> Quantized:
    """All codes and many scales, whatever a packer would write."""
    numbers = np.random.default_rng(1)
    parts = dict(matrix.parts)
    size = parts["weight"].view(torch.uint8).shape
    codes = torch.from_numpy(numbers.permuted(np.resize(np.arange(256, dtype=np.uint8), size)))
    mode = matrix.encoding.mode
    if mode in ("fp8", "mxfp8"):
        codes[(codes & 127) == 127] = 0  # no number
    parts["weight"] = codes.to(parts["weight"].device).view(parts["weight"].dtype)
    if mode == "nvfp4":
        scales = torch.from_numpy(numbers.permuted(np.resize(np.arange(256, dtype=np.uint8), parts["scales"].shape)))
        scales[(scales & 127) == 127] = 0
        parts["scales"] = scales.to(parts["scales"].device)
    elif mode.startswith("mx"):
        around = torch.from_numpy(numbers.integers(127 - 70, 127 + 70, parts["scales"].shape, np.uint8))
        parts["scales"] = around.to(parts["scales"].device)
    return dataclasses.replace(matrix, parts=parts)


@every_dtype
@pytest.mark.parametrize(
    ("encoding", "sm"), [*((one, 90) for one in ENCODINGS), (FP8, 80), (grouped("mxfp8"), 80), (WIDE, 90)], ids=str
)
def test_every_value_is_the_plain_ones(encoding, sm, dtype, place):
    """A product with ones on the diagonal is the weight itself: one term a sum, so nothing may differ by a bit.

    Global scales are powers of two here: the plain version multiplies them with the group's first, and rounds.
    """
    matrix = any_codes(weight((40, 128), encoding, place))
    if encoding == GLOBAL:
        matrix.parts["global_scale"].copy_(2.0 ** (torch.arange(40) % 13 - 6))
    found = packed_linear_kernel(torch.eye(128, dtype=dtype, device=place), matrix, CARDS[sm])
    plain = matrix.dense(dtype).T
    assert found.isfinite().all() and plain.isfinite().all()
    if encoding.mode == "affine" and place == "cuda":  # the GPU rounds the exact sum, once
        assert ((found - plain).abs().float() <= plain.abs().float() * 2**-7).all()
        assert (found != plain).sum() <= found.numel() // 1000
    else:
        assert torch.equal(found, plain)


def test_tiles_keep_every_processor_busy_where_they_can():
    card = CARD
    assert tile(4096, 8192, card) == (128, 128)
    assert tile(256, 8192, card) == (64, 128)
    assert tile(256, 2816, card) == (64, 64)
    assert tile(1, 2816, card) == (64, 16)


def test_what_is_not_supported_says_why():
    card, parts = CARD, {"weight": torch.empty(0), "scales": torch.empty(0)}
    dense = Dense(torch.empty(4, 4))
    assert unsupported(dense, card) == ""
    assert unsupported(Stack((dense, dense)), card)
    assert unsupported(Quantized(Encoding("fp8", "float32", block=128), (4, 4), parts), card)
    assert unsupported(Quantized(grouped("affine", bits=3, group_size=64), (4, 64), parts), card)
    for encoding in ENCODINGS:
        assert unsupported(Quantized(encoding, (4, 64), parts), card) == ""
