"""The weights on the device. Attribute names are the checkpoint's; matrices that read the same input lie in one.

Queries, keys and values are one matrix, and so are gate and up: an output column of a product does not depend on its
neighbours, so this changes no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.tensors import DECODER, NORMS, encoder_scalar, layer_name

STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Attention:
    qkv_proj: Tensor  # [(H + 2 K) d, D]; full layers have no v_proj: [(H + K) d, D]
    o_proj: Tensor  # [D, H d]
    q_norm: Tensor  # float32 [d]
    k_norm: Tensor  # float32 [d]


@dataclass(frozen=True)
class GatedMlp:
    gate_up_proj: Tensor  # [2 I, D]
    down_proj: Tensor  # [D, I]


@dataclass(frozen=True)
class Router:
    proj: Tensor  # [E, D]
    scale: Tensor  # [D]
    per_expert_scale: Tensor  # [E]


@dataclass(frozen=True)
class Experts:
    gate_up_proj: Tensor  # [E, 2 M, D]
    down_proj: Tensor  # [E, D, M]


@dataclass(frozen=True)
class Layer:
    """One layer in both roles. Norm weights are float32, for a norm multiplies by its weight before rounding."""

    self_attn: Attention
    mlp: GatedMlp
    router: Router
    experts: Experts
    norms: dict[str, Tensor]  # by the names in ``tensors.NORMS``, float32 [D]
    layer_scalar: Tensor  # [1]
    encoder_layer_scalar: Tensor  # [1]


@dataclass(frozen=True)
class Weights:
    embed_tokens: Tensor  # [V, D], also the output head
    norm: Tensor  # float32 [D]
    pre_norm: Tensor  # float32 [D], of the self-conditioning
    self_conditioning: GatedMlp
    layers: tuple[Layer, ...]
    nbytes: int


class Reader:
    """Tensors of a checkpoint on one device, in one dtype; counts what it hands out."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.nbytes = 0

    def stack(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Tensor:
        """The named tensors joined along their first axis, copied once from the file."""
        arrays = [self.checkpoint.read(name) for name in names]
        assert len({array.dtype for array in arrays}) == 1, names
        rows = sum(len(array) for array in arrays)
        host = torch.empty((rows, *arrays[0].shape[1:]), dtype=STORED[str(arrays[0].dtype)])
        # as bytes, for NumPy and torch share no bfloat16
        np.concatenate([a.view(np.uint8) for a in arrays], out=host.view(torch.uint8).numpy())
        tensor = host.to(self.device, dtype or self.dtype)
        self.nbytes += tensor.nbytes
        return tensor

    def one(self, name: str) -> Tensor:
        return self.stack([name])

    def norm(self, name: str) -> Tensor:
        return self.stack([f"{name}.weight"], torch.float32)

    def gated_mlp(self, at: str) -> GatedMlp:
        return GatedMlp(
            gate_up_proj=self.stack([f"{at}.gate_proj.weight", f"{at}.up_proj.weight"]),
            down_proj=self.one(f"{at}.down_proj.weight"),
        )


def read_weights(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Weights:
    """All text weights of a checked checkpoint, in ``dtype`` on ``device``. The vision tower is left on disk."""
    read = Reader(checkpoint, device, dtype)
    conditioning = f"{DECODER}.self_conditioning"
    text = checkpoint.config.text
    return Weights(
        embed_tokens=read.one(f"{DECODER}.embed_tokens.weight"),
        norm=read.norm(f"{DECODER}.norm"),
        pre_norm=read.norm(f"{conditioning}.pre_norm"),
        self_conditioning=read.gated_mlp(conditioning),
        layers=tuple(_layer(read, i, text.full(i)) for i in range(text.num_hidden_layers)),
        nbytes=read.nbytes,
    )


def _layer(read: Reader, layer: int, full: bool) -> Layer:
    at = layer_name(layer)
    projections = ("q_proj", "k_proj") if full else ("q_proj", "k_proj", "v_proj")
    return Layer(
        self_attn=Attention(
            qkv_proj=read.stack([f"{at}.self_attn.{name}.weight" for name in projections]),
            o_proj=read.one(f"{at}.self_attn.o_proj.weight"),
            q_norm=read.norm(f"{at}.self_attn.q_norm"),
            k_norm=read.norm(f"{at}.self_attn.k_norm"),
        ),
        mlp=read.gated_mlp(f"{at}.mlp"),
        router=Router(
            proj=read.one(f"{at}.router.proj.weight"),
            scale=read.one(f"{at}.router.scale"),
            per_expert_scale=read.one(f"{at}.router.per_expert_scale"),
        ),
        experts=Experts(read.one(f"{at}.experts.gate_up_proj"), read.one(f"{at}.experts.down_proj")),
        norms={name: read.norm(f"{at}.{name}") for name in NORMS},
        layer_scalar=read.one(f"{at}.layer_scalar"),
        encoder_layer_scalar=read.one(encoder_scalar(layer)),
    )
