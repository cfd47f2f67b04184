"""The MLX implementation: one network, one denoising step, Metal kernels beside plain MLX operations.

Read ``network.py`` for the forward pass, ``linear.py`` for dense and quantized products, ``vocabulary.py`` for what is
done with the logits, ``step.py`` for a step, ``compiled.py`` for how it is compiled, ``economy.py`` for what it may
leave out, ``cache.py`` for where keys and values lie, ``kernels`` for the operations, ``model.py`` for the seam.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx

from ..backend import LoadOptions
from ..errors import BackendError
from ..formats import Checkpoint
from ..machine import free_memory
from .budget import plan
from .kernels import launch
from .kernels.check import self_check
from .kernels.choice import build_ops, choose_kernels
from .model import MLXModel
from .network import Network
from .residency import settle, working_set
from .trial import trial
from .weights import DTYPES, read_weights

__all__ = ["load", "memory", "plan"]


def load(checkpoint: Checkpoint, *, device: str = "auto", dtype: str | None = None, **options: str) -> MLXModel:
    """Read the text weights onto MLX's default device. On a GPU this sets MLX's wired and cache limits (``residency``).

    Args:
        dtype: ``"bfloat16"`` or ``"float32"``; ``None`` keeps the checkpoint's.
        options: ``kernels``, ``self_conditioning``, ``tail``: see ``LoadOptions``.

    Raises:
        OptionError: another dtype; kernels without a GPU.
        BackendError: a device this backend does not choose itself; a kernel that fails its self-check.
    """
    if device != "auto":
        raise BackendError(f"device={device!r}: MLX runs on its default device; leave device='auto'")
    chosen = LoadOptions(dtype, **options).checked("mlx")
    config, survivors = checkpoint.config, chosen.self_conditioning == "survivors"
    weights = read_weights(checkpoint, dtype)
    kind = DTYPES[weights.dtype]
    network = Network(config.text, weights.matrices, weights.arrays, kind)
    choice = choose_kernels(
        chosen.kernels, kind, config.text, network.table, self_conditioning=chosen.self_conditioning
    )
    network = dataclasses.replace(network, ops=build_ops(choice))
    settle()
    if choice.fused:
        self_check(choice, kind, trial(config, weights, survivors=survivors))
    return MLXModel(
        config,
        network,
        weights,
        {"kernels": choice.describe()},
        # On a CPU a compiled step gains nothing, and an emulated kernel cannot be traced.
        compiled=mx.metal.is_available() and not launch.emulated(),
        survivors=survivors,
        hold=chosen.tail == "hold",
    )


def memory(device: str) -> int:
    """Bytes a model may take: what Metal recommends to keep resident, or the free main memory without a GPU."""
    return working_set() if mx.metal.is_available() else free_memory()
