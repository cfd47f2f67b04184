"""The PyTorch implementation, on an NVIDIA GPU or a CPU: plain operations, every number in Hugging Face's precision.

Read ``network.py`` for what is computed, ``linear.py`` for how weights are held and multiplied, ``cache.py`` for where
keys and values lie, ``step.py`` for a denoising step.
"""

from __future__ import annotations

import torch

from mlx_diffgemma.errors import BackendError, OptionError
from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.machine import free_memory

from .model import TorchModel
from .weights import read_weights

ALIGNMENT = 16  # bytes, of the rows that torch's grouped product reads
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load(checkpoint: Checkpoint, *, device: str, dtype: str | None = None) -> TorchModel:
    """Read the weights, tensor by tensor, to ``device`` ("cpu", "cuda" or "cuda:1").

    ``dtype`` is "bfloat16" or "float32"; None keeps the checkpoint's.

    Raises:
        OptionError: another dtype.
        BackendError: experts whose rows are not whole multiples of ``ALIGNMENT``.
    """
    name = dtype or checkpoint.dtype
    if name not in DTYPES:
        raise OptionError(f"dtype={name!r} cannot be computed in here; choose {' or '.join(DTYPES)}")
    for field in ("hidden_size", "moe_intermediate_size"):
        size = getattr(checkpoint.config.text, field)
        if size * DTYPES[name].itemsize % ALIGNMENT:
            raise BackendError(
                f"torch cannot group experts of {field}={size} in {name}: rows must be multiples of {ALIGNMENT} bytes; "
                "use backend 'mlx' or 'reference'"
            )
    place = torch.device(device)
    return TorchModel(checkpoint.config, read_weights(checkpoint, place, DTYPES[name]), place, DTYPES[name])


def memory(device: str) -> int:
    """Bytes that a model may still take on ``device``."""
    place = torch.device(device)
    return free_memory() if place.type == "cpu" else torch.cuda.mem_get_info(place)[0]
