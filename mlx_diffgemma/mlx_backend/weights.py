"""Weights from a checkpoint to MLX arrays, one tensor at a time, in the precision each is used in."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import mlx.core as mx
import numpy as np

from ..backend import TEXT_ONLY
from ..errors import OptionError
from ..formats import Checkpoint
from ..tensors import VISION

DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True)
class Weights:
    """Tensors by canonical name, the dtype of activations, and remarks for ``describe()``."""

    tensors: dict[str, mx.array]
    dtype: str
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())


def read_weights(checkpoint: Checkpoint, dtype: str | None) -> Weights:
    """All text weights, evaluated.

    Norm weights and per-expert scales become float32, because they enter float32 arithmetic; without a GPU the expert
    banks do too, because ``mx.gather_mm`` exists there in float32 only.

    Raises:
        OptionError: a dtype other than bfloat16 and float32.
    """
    dtype = dtype or (checkpoint.dtype if checkpoint.dtype in DTYPES else "float32")
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r} is unknown; choose {' or '.join(DTYPES)}")
    wide_experts = dtype != "float32" and mx.default_device() == mx.Device(mx.cpu)
    tensors = {}
    for name, row in checkpoint.table.items():
        if row.role in VISION:
            continue
        wide = row.role == "norm" or name.endswith("per_expert_scale") or (wide_experts and row.role == "experts")
        tensors[name] = to_mlx(checkpoint.read(name)).astype(mx.float32 if wide else DTYPES[dtype])
        mx.eval(tensors[name])  # one at a time, so that the stored and the converted copy exist for one tensor only
    notes = []
    if wide_experts:
        notes.append("experts are computed in float32: MLX has no bfloat16 gather_mm on the CPU")
    if checkpoint.config.vision:
        notes.append(TEXT_ONLY)
    return Weights(tensors, dtype, tuple(notes))


def to_mlx(array: np.ndarray) -> mx.array:
    """The same bits as an MLX array; NumPy's bfloat16 goes over as integers, since MLX would widen it."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(np.asarray(array))
