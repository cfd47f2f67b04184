"""GeGLU against float64 and against plain MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.mlx_backend.kernels.geglu import geglu_kernel, geglu_ops
from tests.metal_kernels.harness import in_every_order, random, relative_error, wide

DTYPES = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}  # two roundings, of GELU and of the product


def truth(gate: mx.array, up: mx.array) -> np.ndarray:
    x = wide(gate)
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * wide(up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 1, 74), (2, 5, 600), (1, 2, 2 * 2112)])
def test_both_halves_in_one_array(shape, dtype, place, proof):
    x = random(shape[-1], *shape, dtype=dtype, scale=3)
    found = in_every_order(lambda: geglu_kernel(x), place)
    gate, up = mx.split(x, 2, -1)
    assert found.dtype == dtype and found.shape == gate.shape
    # below 0, 1 + tanh is a difference of nearly equal numbers: the error is that of the product of both halves
    assert np.abs(wide(found) - truth(gate, up)).max() <= DTYPES[dtype] * np.abs(wide(gate) * wide(up)).max()
    assert np.abs(wide(found) - wide(geglu_ops(x))).max() <= DTYPES[dtype] * np.abs(wide(gate) * wide(up)).max()
    proof("geglu", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_arrays(dtype, place):
    gate, up = random(1, 3, 5, 300, dtype=dtype), random(2, 3, 5, 300, dtype=dtype)
    found = in_every_order(lambda: geglu_kernel(gate, up), place)
    assert relative_error(found, truth(gate, up)) <= DTYPES[dtype]
    assert relative_error(found, wide(geglu_ops(gate, up))) <= DTYPES[dtype] / 8


def test_large_gates_do_not_overflow(place):
    gate, up = mx.array([[1e12, -1e12, 60.0, -60.0]]), mx.full((1, 4), 2.0)
    found = in_every_order(lambda: geglu_kernel(gate, up), place)
    assert np.array_equal(np.array(found), np.array(geglu_ops(gate, up)))
