"""Weights to quantize: random and awkward ones in every dtype, and the way to MLX's arrays and back."""

from __future__ import annotations

import ml_dtypes
import mlx.core as mx
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}  # half a unit in the last place
WIDTH = 256


def to_mlx(x: np.ndarray) -> mx.array:
    return mx.array(x.view(np.uint16)).view(mx.bfloat16) if x.dtype == BFLOAT16 else mx.array(x)


def from_mlx(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint16)).view(BFLOAT16) if x.dtype == mx.bfloat16 else np.array(x)


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    """To the dtype, held within its finite range."""
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    return np.clip(x.astype(np.float64), -largest, largest).astype(DTYPES[dtype])


def normal(seed: int, *shape: int, dtype: str = "float32", size: float = 0.02) -> np.ndarray:
    return cast(np.random.default_rng(seed).standard_normal(shape) * size, dtype)


def _structured() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((4, WIDTH))
    outlier = plain * 1e-3
    outlier[:, 37], outlier[:, 200] = 11.0, -7.5
    half = rng.standard_normal((4, WIDTH // 2))
    return {
        "normal": plain,
        "small": plain * 0.02,
        "constant": np.tile(np.array([[0.3], [-0.3], [1.0], [-448.0]]), (1, WIDTH)),
        "zero": np.zeros((4, WIDTH)),
        "negative zero": -np.zeros((4, WIDTH)),
        "one outlier": outlier,
        "mostly zero": np.where(rng.random((4, WIDTH)) < 0.9, 0, plain),
        "sign-symmetric": np.stack([half, -half], -1).reshape(4, WIDTH),
        "positive": np.abs(plain) + 0.5,
        "negative": -np.abs(plain) - 0.5,
        "integers": rng.integers(-16, 17, (4, WIDTH)).astype(float),
        "quarters": rng.integers(-24, 25, (4, WIDTH)) / 4,  # ties between e2m1 codes
        "ramp": np.tile(np.arange(WIDTH, dtype=float), (4, 1)),
        "halves and doubles": np.exp2(rng.integers(-20, 14, (4, WIDTH))) * rng.choice([-1, 1], (4, WIDTH)),
        "tiny": plain * 1e-7,
        "float16 subnormal": plain * 1e-6,
        "large": plain * 2e4,
        "very small": plain * 1e-30,
        "very large": np.clip(plain, -3, 3) * 1e38,
        "float32 subnormal": plain * 1e-40,
    }


STRUCTURED = _structured()


def weights(width: int = WIDTH) -> st.SearchStrategy[np.ndarray]:
    """Rows of any finite float32 at all, often repeated, zero or around a common magnitude."""
    anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
    usual = st.floats(-4, 4, width=32)
    grid = st.integers(-32, 32).map(lambda k: k / 8)
    return st.one_of(
        *(hnp.arrays(np.float32, (2, width), elements=kind, fill=kind) for kind in (anything, usual, grid))
    )
