"""Weights in every encoding that kernels read: random ones for tests, empty ones of the real shapes to compile for."""

from __future__ import annotations

import numpy as np
import torch

from cuda_backend.linear import Dense, Quantized, Weight
from cuda_backend.weights import STORED, host_copy
from mlx_diffgemma.formats.encoding import Encoding, encode, grouped

FP8 = Encoding("fp8")
GLOBAL = Encoding("nvfp4", bits=4, group_size=16, global_scale=True)
ENCODINGS = (
    FP8,
    grouped("nvfp4"),
    GLOBAL,
    grouped("mxfp4"),
    grouped("mxfp8"),
    grouped("affine", bits=4, group_size=32),
    grouped("affine", bits=4, group_size=64),
    grouped("affine", bits=8, group_size=64),
)


def random(shape: tuple[int, ...], encoding: Encoding | None, dtype: torch.dtype, place: str) -> Weight:
    """Values of about 1 / sqrt(in), rows of unlike size; dense of ``dtype`` without an encoding."""
    numbers = np.random.default_rng(shape)
    rows = numbers.uniform(0.5, 2, (*shape[:-1], 1)) / shape[-1] ** 0.5
    values = (numbers.standard_normal(shape) * rows + 0.2 * rows).astype(np.float32)
    if encoding is None:
        return Dense(torch.from_numpy(values).to(place, dtype))
    found = encode(values, encoding)
    return Quantized(encoding, shape, {name: host_copy([part]).to(place) for name, part in found.parts.items()})


def empty(shape: tuple[int, ...], encoding: Encoding | None) -> Weight:
    """Nothing, on the meta device; dense is bfloat16."""
    if encoding is None:
        return Dense(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    parts = {
        name: torch.empty(size, dtype=STORED[dtype.name], device="meta")
        for name, (size, dtype) in encoding.parts(shape).items()
    }
    return Quantized(encoding, shape, parts)
