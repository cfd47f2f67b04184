"""The MLX implementation: one network, one denoising step, plain MLX operations.

Read ``network.py`` for the forward pass, ``linear.py`` for dense and quantized products, ``vocabulary.py`` for what is
done with the logits, ``step.py`` for a step, ``cache.py`` for where keys and values lie, ``model.py`` for the seam.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import BackendError
from ..formats import Checkpoint
from ..machine import free_memory
from .budget import plan
from .model import MLXModel
from .network import Network
from .weights import DTYPES, read_weights

__all__ = ["load", "memory", "plan"]


def load(checkpoint: Checkpoint, *, device: str = "auto", dtype: str | None = None) -> MLXModel:
    """Read the text weights onto MLX's default device.

    Args:
        dtype: ``"bfloat16"`` or ``"float32"``; ``None`` keeps the checkpoint's.

    Raises:
        OptionError: another dtype.
        BackendError: a device this backend does not choose itself.
    """
    if device != "auto":
        raise BackendError(f"device={device!r}: MLX runs on its default device; leave device='auto'")
    weights = read_weights(checkpoint, dtype)
    network = Network(checkpoint.config.text, weights.matrices, weights.arrays, DTYPES[weights.dtype])
    return MLXModel(checkpoint.config, network, weights)


def memory(device: str) -> int:
    """Bytes a model may take: what Metal recommends to keep resident, or the free main memory without a GPU."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return free_memory()
