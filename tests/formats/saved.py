"""Checkpoints to read and to damage: copies of the tiny one, and safetensors files written byte by byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import checkpoint

EMBEDDING = "model.decoder.embed_tokens.weight"
SCALAR, ENCODER_SCALAR = "model.decoder.layers.0.layer_scalar", "model.encoder.language_model.layers.0.layer_scalar"

Tensors = dict[str, torch.Tensor]


def copied(folder: Path, change: Callable[[Tensors], None] | None = None) -> Path:
    """The tiny checkpoint in ``folder``, its tensors changed in place by ``change``."""
    shutil.copytree(checkpoint(), folder)
    if change:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header at all; ``length`` lies about the header's."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: Iterable[int], start: int, dtype: str = "F32", item: int = 4) -> dict[str, Any]:
    """A correct header row."""
    shape = list(shape)
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + item * int(np.prod(shape))]}
