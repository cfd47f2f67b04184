"""The PyTorch implementation, on an NVIDIA GPU or a CPU, in Hugging Face's precision unless told otherwise.

Read ``network.py`` for what is computed, ``linear.py`` for how weights are held and multiplied, ``cache.py`` for where
keys and values lie, ``step.py`` for a denoising step, ``kernels/choice.py`` for what runs on which GPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mlx_diffgemma.backend import LoadOptions
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import BackendError, OptionError
from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.machine import free_memory
from mlx_diffgemma.tensors import VISION

from .budget import plan
from .graphs import cuda_capture
from .kernels.build import build_ops, with_head
from .kernels.check import check_graph, self_check
from .kernels.choice import INTERPRETER, Choice, check, choose_kernels, gpu_of
from .kernels.ops import plain
from .kernels.paths import paths
from .kernels.quantize import Fp8Rows, quantize_ops
from .linear import fp8_product
from .model import TorchModel
from .remarks import remarks
from .weights import Weights, read_weights

__all__ = ["load", "memory", "plan"]

ALIGNMENT = 16  # bytes, of the rows that torch's grouped product reads
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROWS = 2**13  # of the embedding, rounded to FP8 at a time


def load(
    checkpoint: Checkpoint,
    *,
    device: str,
    dtype: str | None = None,
    kernels: str = "auto",
    activations: str | None = None,
    head: str | None = None,
) -> TorchModel:
    """Read the weights, tensor by tensor, to ``device`` ("cpu", "cuda" or "cuda:1"), and choose the kernels.

    Args:
        dtype: "bfloat16" or "float32"; None keeps the checkpoint's.
        kernels, activations, head: see ``mlx_diffgemma.backend.LoadOptions``.

    Raises:
        OptionError: another dtype; an option that the device or the checkpoint has no use for.
        BackendError: experts whose rows are not whole multiples of ``ALIGNMENT``; kernels that cannot run here, or that
            do not compute what plain torch computes.
    """
    name = dtype or checkpoint.dtype
    if name not in DTYPES:
        raise OptionError(f"dtype={name!r} cannot be computed in here; choose {' or '.join(DTYPES)}")
    options = LoadOptions(name, kernels, activations, head).checked("cuda")
    place, gpu = torch.device(device), gpu_of(torch.device(device), kernels)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)  # where Triton launches and graphs are captured
    check(options, gpu)
    check_sizes(checkpoint, name)
    check_activations(checkpoint, activations)
    planned = plan(checkpoint.config, checkpoint.nbytes, checkpoint, device=device, options=options)
    weights = read_weights(checkpoint, place, DTYPES[name], fp8=activations == "fp8")
    choice = choose_kernels(gpu, kernels, DTYPES[name], weights)
    unpacked = not choice.on("experts") or bool(choice.exceptions)
    said = remarks(checkpoint, name, activations=activations, head=head, unpacked=unpacked)
    table = fp8_table(weights.embed_tokens) if head else None
    about: dict[str, Any] = {"kernels": choice.describe(), "memory": planned.describe()}
    if gpu and gpu.card:
        about["card"] = {"name": gpu.name, "sm": gpu.sm, "as": f"sm_{gpu.card.sm}", "paths": paths(gpu.card)}
    return build(checkpoint.config, dataclasses.replace(weights, remarks=said), choice, table, about)


def build(
    config: ModelConfig, weights: Weights, choice: Choice, head: Fp8Rows | None, about: dict[str, Any]
) -> TorchModel:
    """The model, once its kernels have been checked. In the interpreter they are not: it is slow, and for tests."""
    table = weights.embed_tokens
    ops = with_head(build_ops(choice, table.dtype), head)
    checked = bool(choice.fused) and choice.gpu is not INTERPRETER
    if checked:
        self_check(choice, ops, with_head(plain(table.dtype), head), config, weights)
        torch.cuda.empty_cache()  # of what the plain operations unpacked
    capture = cuda_capture() if choice.on("graph") else None
    whole = choice.on("canvas_attention")
    model = TorchModel(config, weights, table.device, table.dtype, ops, capture, whole, about)
    if checked and capture:
        check_graph(model, cuda_capture())  # with a pool of its own, which goes with the model that is checked
    return model


def check_sizes(checkpoint: Checkpoint, dtype: str) -> None:
    for field in ("hidden_size", "moe_intermediate_size"):
        size = getattr(checkpoint.config.text, field)
        if size * DTYPES[dtype].itemsize % ALIGNMENT:
            raise BackendError(
                f"torch cannot group experts of {field}={size} in {dtype}: rows must be multiples of {ALIGNMENT} "
                "bytes; use backend 'mlx' or 'reference'"
            )


def check_activations(checkpoint: Checkpoint, activations: str | None) -> None:
    text = [checkpoint.tensors[name] for name, row in checkpoint.table.items() if row.role not in VISION]
    if activations and not any(fp8_product(stored.encoding, stored.shape) for stored in text if len(stored.shape) > 1):
        formats = ", ".join(sorted({stored.format for stored in text if len(stored.shape) > 1}))
        raise OptionError(
            f"activations={activations!r} is for weights in FP8 with a scale per row, and here are {formats}: leave it "
            "out, or convert with recipe fp8"
        )


def fp8_table(table: Tensor) -> Fp8Rows:
    """The embedding [V, D] in FP8 with a scale per row, some rows at a time."""
    parts = [quantize_ops(rows) for rows in table.split(ROWS)]
    return Fp8Rows(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


def memory(device: str) -> int:
    """Bytes that a model may still take on ``device``."""
    place = torch.device(device)
    return free_memory() if place.type == "cpu" else torch.cuda.mem_get_info(place)[0]
