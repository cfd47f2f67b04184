"""The weights on the device. Attribute names are the checkpoint's; matrices that read the same input lie in one.

Queries, keys and values are one matrix, and so are gate and up: an output column of a product does not depend on its
neighbours, so this changes no number. Matrices stay packed as they are stored, but for the embedding, which every step
reads whole, twice: it is unpacked here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mlx_diffgemma.backend import Remarks
from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.formats.checkpoint import EMBEDDING
from mlx_diffgemma.formats.encoding import Encoded
from mlx_diffgemma.formats.stored import Stored
from mlx_diffgemma.tensors import DECODER, NORMS, encoder_scalar, layer_name

from .linear import PIECE, Dense, Quantized, Stack, Weight, fp8_product, takes_fp8
from .remarks import remarks

STORED = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "uint32": torch.uint32,
    "uint8": torch.uint8,
}


Held = TypeVar("Held", Tensor, Weight)


@dataclass(frozen=True)
class Attention:
    qkv_proj: Weight  # [(H + 2 K) d, D]; full layers have no v_proj: [(H + K) d, D]
    o_proj: Weight  # [D, H d]
    q_norm: Tensor  # float32 [d]
    k_norm: Tensor  # float32 [d]


@dataclass(frozen=True)
class GatedMlp:
    gate_up_proj: Weight  # [2 I, D]
    down_proj: Weight  # [D, I]


@dataclass(frozen=True)
class Router:
    proj: Weight  # [E, D]
    scale: Tensor  # [D]
    per_expert_scale: Tensor  # [E]


@dataclass(frozen=True)
class Experts:
    gate_up_proj: Weight  # [E, 2 M, D]
    down_proj: Weight  # [E, D, M]


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
    remarks: Remarks

    @functools.cached_property
    def scalars(self) -> tuple[Tensor, Tensor]:
        """The layer scalars [layers] of both roles: of tokens read causally, and of a canvas."""
        return (
            torch.cat([layer.encoder_layer_scalar for layer in self.layers]),
            torch.cat([layer.layer_scalar for layer in self.layers]),
        )


class Reader:
    """Tensors of a checkpoint on one device, in one dtype where they are dense; counts what it hands out.

    ``fp8``: weights in FP8 with a scale per row take activations in FP8, where their size allows the product.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, fp8: bool):
        self.checkpoint, self.device, self.dtype, self.fp8 = checkpoint, device, dtype, fp8
        self.nbytes = 0

    def weight(self, *names: str) -> Weight:
        """The named matrices joined along their rows; side by side where they are stored unlike."""
        pieces = [self.checkpoint.tensors[name] for name in names]
        if _alike(pieces):
            return self._counted(self._joined([piece.read() for piece in pieces], self.dtype))
        return self._counted(Stack(tuple(self._joined([piece.read()], self.dtype) for piece in pieces)))

    def values(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor that no product reads, unpacked."""
        wanted = dtype or self.dtype
        return self._counted(self._joined([self.checkpoint.encoded(name)], wanted).dense(wanted))

    def norm(self, name: str) -> Tensor:
        return self.values(f"{name}.weight", torch.float32)

    def table(self, name: str) -> Tensor:
        """The embedding, unpacked, some rows at a time."""
        stored = self.checkpoint.tensors[name]
        table = torch.empty(stored.shape, dtype=self.dtype, device=self.device)
        for start, stop in stored.chunks(PIECE, stored.encoding.block or 1):
            table[start:stop] = self._joined([stored.read(start, stop)], self.dtype).dense(self.dtype)
        return self._counted(table)

    def gated_mlp(self, at: str) -> GatedMlp:
        return GatedMlp(
            gate_up_proj=self.weight(f"{at}.gate_proj.weight", f"{at}.up_proj.weight"),
            down_proj=self.weight(f"{at}.down_proj.weight"),
        )

    def experts(self, at: str) -> Experts:
        """Both banks take FP8 activations, or neither: what lies between them is made for the second by the first."""
        gate_up, down = (self.weight(f"{at}.{name}") for name in ("gate_up_proj", "down_proj"))
        if takes_fp8(gate_up) and takes_fp8(down):
            return Experts(gate_up, down)
        return Experts(in_full(gate_up), in_full(down))

    def _counted(self, held: Held) -> Held:
        self.nbytes += held.nbytes
        return held

    def _joined(self, pieces: Sequence[Encoded], dtype: torch.dtype) -> Dense | Quantized:
        """Pieces that are ``_alike``; what of them was copied on the host goes when this returns."""
        first = pieces[0]
        if not first.encoding.quantized:
            return Dense(host_copy([piece.decode() for piece in pieces]).to(self.device, dtype))
        parts = {name: host_copy([piece.parts[name] for piece in pieces]).to(self.device) for name in first.parts}
        shape = (sum(piece.shape[0] for piece in pieces), *first.shape[1:])
        weight = Quantized(first.encoding, shape, parts)
        return for_fp8(weight) if self.fp8 and fp8_product(first.encoding, shape) else weight


def for_fp8(weight: Quantized) -> Quantized:
    """The same weight, multiplied with activations in FP8; the product takes its scales in float32."""
    parts = {**weight.parts, "scales": weight.parts["scales"].float()}
    return replace(weight, parts=parts, fp8_activations=True)


def in_full(weight: Weight) -> Weight:
    """The same weight, multiplied with activations in the model's dtype."""
    return replace(weight, fp8_activations=False) if isinstance(weight, Quantized) else weight


def _alike(pieces: Sequence[Stored]) -> bool:
    """Whether they can lie in one: all dense, or of one encoding without a block that would reach into the next."""
    if not any(piece.encoding.quantized for piece in pieces):
        return True
    edge = pieces[0].encoding.block or 1
    return len({piece.encoding for piece in pieces}) == 1 and not any(piece.shape[0] % edge for piece in pieces[:-1])


def host_copy(arrays: Sequence[np.ndarray]) -> Tensor:
    """The arrays joined along their first axis, copied once from the file."""
    if len({array.dtype for array in arrays}) > 1:
        arrays = [array.astype(np.float32) for array in arrays]
    rows = sum(len(array) for array in arrays)
    host = torch.empty((rows, *arrays[0].shape[1:]), dtype=STORED[str(arrays[0].dtype)])
    # as bytes, for NumPy and torch share no bfloat16; a broadcast array has no bytes of its own
    sources = [np.ascontiguousarray(array).view(np.uint8) for array in arrays]
    np.concatenate(sources, out=host.view(torch.uint8).numpy())
    return host


def read_weights(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> Weights:
    """All text weights of a checked checkpoint on ``device``, dense ones in ``dtype``. The vision tower is left out.

    ``fp8``: see ``Reader``.
    """
    read = Reader(checkpoint, device, dtype, fp8)
    conditioning = f"{DECODER}.self_conditioning"
    text = checkpoint.config.text
    return Weights(
        embed_tokens=read.table(EMBEDDING),
        norm=read.norm(f"{DECODER}.norm"),
        pre_norm=read.norm(f"{conditioning}.pre_norm"),
        self_conditioning=read.gated_mlp(conditioning),
        layers=tuple(layer_of(read, i, text.full(i)) for i in range(text.num_hidden_layers)),
        nbytes=read.nbytes,
        remarks=remarks(checkpoint, str(dtype).removeprefix("torch.")),
    )


def layer_of(read: Reader, layer: int, full: bool) -> Layer:
    at = layer_name(layer)
    projections = ("q_proj", "k_proj") if full else ("q_proj", "k_proj", "v_proj")
    return Layer(
        self_attn=Attention(
            qkv_proj=read.weight(*(f"{at}.self_attn.{name}.weight" for name in projections)),
            o_proj=read.weight(f"{at}.self_attn.o_proj.weight"),
            q_norm=read.norm(f"{at}.self_attn.q_norm"),
            k_norm=read.norm(f"{at}.self_attn.k_norm"),
        ),
        mlp=read.gated_mlp(f"{at}.mlp"),
        router=Router(
            proj=read.weight(f"{at}.router.proj.weight"),
            scale=read.values(f"{at}.router.scale"),
            per_expert_scale=read.values(f"{at}.router.per_expert_scale"),
        ),
        experts=read.experts(f"{at}.experts"),
        norms={name: read.norm(f"{at}.{name}") for name in NORMS},
        layer_scalar=read.values(f"{at}.layer_scalar"),
        encoder_layer_scalar=read.values(encoder_scalar(layer)),
    )
