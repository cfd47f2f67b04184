"""Running Metal kernels for tests: on a CPU under several thread orders, or as they are on a Mac."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np

from mlx_diffgemma.mlx_backend.kernels.launch import running_on
from tests.metal_cpu.runner import emulate, thread_order

ORDERS = (0, 1, 2, 3)  # 0 is ascending, the others shuffle simdgroups and their lanes


def in_every_order(run, place: str = "cpu-emulated"):
    """``run()`` once per thread order; its arrays must be bit-equal. The result, evaluated, is returned.

    On a Mac the hardware chooses: twice is all one can do.
    """
    results = []
    if place == "metal":
        results = [run(), run()]
    else:
        for order in ORDERS:
            with running_on(emulate), thread_order(order):
                results.append(run())
                mx.eval(flat(results[-1]))
    first = flat(results[0])
    assert first, "nothing was returned"
    for other in results[1:]:
        for a, b in zip(first, flat(other), strict=True):
            assert np.array_equal(bits(a), bits(b)), "the result depends on the order of threads"
    return results[0]


def flat(result) -> list[mx.array]:
    """Every array in it, whatever it is made of."""
    if isinstance(result, mx.array):
        return [result]
    if dataclasses.is_dataclass(result):
        result = [getattr(result, f.name) for f in dataclasses.fields(result)]
    return [array for item in result or () for array in flat(item)] if isinstance(result, (tuple, list)) else []


def bits(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint8)) if x.ndim else np.array(x[None].view(mx.uint8))


def wide(x: mx.array) -> np.ndarray:
    """As float64, for a reference in NumPy."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def random(seed: int, *shape: int, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> mx.array:
    """Normal numbers."""
    return (mx.random.normal(shape, key=mx.random.key(seed)) * scale).astype(dtype)


def relative_error(found: mx.array, truth: np.ndarray) -> float:
    """Largest |found - truth| over the largest |truth|, in float64."""
    return float(np.abs(wide(found) - truth).max() / max(np.abs(truth).max(), 1e-30))
