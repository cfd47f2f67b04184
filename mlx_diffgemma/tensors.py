"""The tensor table: every tensor of a checkpoint, with shape and role, from the config alone.

It drives loading, converting, quantization recipes (by role, never by a part of a name), the tiny random fixtures and
the check that a checkpoint is complete. Text weights are stored once, under the decoder; the encoder and the output
head share them. Only the layer scalars exist twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .config import ModelConfig, TextConfig, VisionConfig

Role = Literal[
    "embedding", "norm", "attention", "mlp", "experts", "router", "scalar", "self_conditioning", "vision", "projector"
]
VISION: tuple[Role, ...] = ("vision", "projector")  # no backend runs these yet
DECODER, ENCODER = "model.decoder", "model.encoder.language_model"


@dataclass(frozen=True)
class Tensor:
    """One row: canonical name, shape, role, and the other names under which the same values may appear."""

    name: str
    shape: tuple[int, ...]
    role: Role
    ties: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def tensor_table(config: ModelConfig) -> dict[str, Tensor]:
    """All tensors of the checkpoint by name: 1,047 for the 26B model (model card, safetensors index)."""
    return {row.name: row for row in _rows(config)}


def layer_name(layer: int) -> str:
    return f"{DECODER}.layers.{layer}"


def encoder_scalar(layer: int) -> str:
    return f"{ENCODER}.layers.{layer}.layer_scalar"


def item_bytes(config: ModelConfig) -> int:
    """Bytes of an element in the config's dtype."""
    return 4 if config.dtype == "float32" else 2


def _rows(config: ModelConfig) -> Iterator[Tensor]:
    text = config.text
    head = (f"{ENCODER}.embed_tokens.weight", "lm_head.weight")
    yield Tensor(f"{DECODER}.embed_tokens.weight", (text.vocab_size, text.hidden_size), "embedding", head)
    yield _tied(f"{DECODER}.norm.weight", (text.hidden_size,), "norm")
    yield from _self_conditioning(text)
    for layer in range(text.num_hidden_layers):
        yield from _layer(text, layer)
        yield Tensor(encoder_scalar(layer), (1,), "scalar")
    if config.vision:
        yield from _vision(config.vision, text.hidden_size)


def _tied(name: str, shape: tuple[int, ...], role: Role) -> Tensor:
    return Tensor(name, shape, role, (name.replace(DECODER, ENCODER, 1),))


def _self_conditioning(text: TextConfig) -> Iterator[Tensor]:
    base, hidden, wide = f"{DECODER}.self_conditioning", text.hidden_size, text.intermediate_size
    yield Tensor(f"{base}.pre_norm.weight", (hidden,), "norm")
    for name, shape in _gated(hidden, wide):
        yield Tensor(f"{base}.{name}.weight", shape, "self_conditioning")


def _gated(hidden: int, wide: int) -> list[tuple[str, tuple[int, int]]]:
    return [("gate_proj", (wide, hidden)), ("up_proj", (wide, hidden)), ("down_proj", (hidden, wide))]


NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
)


def _layer(text: TextConfig, layer: int) -> Iterator[Tensor]:
    base, hidden = layer_name(layer), text.hidden_size
    for norm in NORMS:
        yield _tied(f"{base}.{norm}.weight", (hidden,), "norm")
    yield Tensor(f"{base}.layer_scalar", (1,), "scalar")
    head_dim, heads = text.head_dims[layer], text.num_attention_heads
    keys = text.num_key_value_heads[layer] * head_dim
    projections = {"q_proj": (heads * head_dim, hidden), "k_proj": (keys, hidden), "o_proj": (hidden, heads * head_dim)}
    if not text.full(layer):  # full layers take their values from the raw keys
        projections["v_proj"] = (keys, hidden)
    for name, shape in projections.items():
        yield _tied(f"{base}.self_attn.{name}.weight", shape, "attention")
    for name in ("q_norm", "k_norm"):
        yield _tied(f"{base}.self_attn.{name}.weight", (head_dim,), "norm")
    for name, shape in _gated(hidden, text.intermediate_size):
        yield _tied(f"{base}.mlp.{name}.weight", shape, "mlp")
    experts, wide = text.num_experts, text.moe_intermediate_size
    yield _tied(f"{base}.router.proj.weight", (experts, hidden), "router")
    yield _tied(f"{base}.router.scale", (hidden,), "router")
    yield _tied(f"{base}.router.per_expert_scale", (experts,), "router")
    yield _tied(f"{base}.experts.gate_up_proj", (experts, 2 * wide, hidden), "experts")
    yield _tied(f"{base}.experts.down_proj", (experts, hidden, wide), "experts")


def _vision(vision: VisionConfig, text_hidden: int) -> Iterator[Tensor]:
    base, hidden = "model.encoder.vision_tower", vision.hidden_size
    yield Tensor("model.encoder.embed_vision.embedding_projection.weight", (text_hidden, hidden), "projector")
    yield Tensor(f"{base}.patch_embedder.input_proj.weight", (hidden, 3 * vision.patch_size**2), "vision")
    table = (2, vision.position_embedding_size, hidden)
    yield Tensor(f"{base}.patch_embedder.position_embedding_table", table, "vision")
    if vision.standardize:
        yield Tensor(f"{base}.std_bias", (hidden,), "vision")
        yield Tensor(f"{base}.std_scale", (hidden,), "vision")
    heads, keys = vision.num_attention_heads * vision.head_dim, vision.num_key_value_heads * vision.head_dim
    shapes = {"self_attn.q_proj.linear": (heads, hidden), "self_attn.k_proj.linear": (keys, hidden)}
    shapes |= {"self_attn.v_proj.linear": (keys, hidden), "self_attn.o_proj.linear": (hidden, heads)}
    shapes |= {f"mlp.{name}.linear": shape for name, shape in _gated(hidden, vision.intermediate_size)}
    for layer in range(vision.num_hidden_layers):
        at = f"{base}.encoder.layers.{layer}"
        for norm in NORMS[:4]:
            yield Tensor(f"{at}.{norm}.weight", (hidden,), "vision")
        for norm in ("q_norm", "k_norm"):
            yield Tensor(f"{at}.self_attn.{norm}.weight", (vision.head_dim,), "vision")
        for name, shape in shapes.items():
            yield Tensor(f"{at}.{name}.weight", shape, "vision")
