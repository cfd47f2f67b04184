"""What a checkpoint takes in MLX: quantized weights stay packed; without a GPU, dense experts become float32."""

from __future__ import annotations

from ..backend import LoadOptions
from ..config import ModelConfig
from ..formats import Checkpoint
from ..formats.stored import Stored
from ..memory import MemoryPlan, is_packed, rough_plan, width_of
from ..tensors import VISION, Tensor, item_bytes
from .linear import on_cpu


def plan(
    config: ModelConfig, stored: int, checkpoint: Checkpoint | None, *, device: str, options: LoadOptions
) -> MemoryPlan:
    """See ``mlx_diffgemma.backend.Backend``. The vision tower is left out where it is known how large it is."""
    if checkpoint is not None:
        width = width_of(config, options.dtype or checkpoint.dtype)
        rows = [row for row in checkpoint.table.values() if row.role not in VISION]
        return rough_plan(sum(held(row, checkpoint.tensors[row.name], width) for row in rows))
    width = width_of(config, options.dtype)
    wide = 4 if on_cpu() else width  # experts are nearly all of a dense checkpoint
    return rough_plan(stored if is_packed(config, stored) else stored // item_bytes(config) * wide)


def held(row: Tensor, stored: Stored, width: int) -> int:
    """Bytes of a tensor. Those in FP8 blocks, and GGUF's K-quants, have no product and are unpacked."""
    if stored.encoding.quantized and not stored.encoding.block:
        return stored.encoding.nbytes(row.shape)
    return row.size * (4 if row.role == "experts" and on_cpu() else width)
