"""The transformer in MLX: shapes are [B, T, D], heads are [B, H, T, d]. Same names and order as ``reference.network``.

Precision follows transformers: norms, RoPE angles, GELU, routing weights and the sum over experts in float32, rounded
to the model's dtype; everything else in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from ..config import TextConfig
from ..tensors import DECODER, encoder_scalar, layer_name
from . import experts
from .cache import MLXCache, Visible, plan_chunk, visible_slots
from .linear import Linear

Attention = Callable[[mx.array, mx.array, mx.array], mx.array]
Rotation = tuple[mx.array, mx.array]  # cos and sin, [B, 1, T, d / 2]


@dataclass(frozen=True)
class Layout:
    """What stays the same during a block: one entry per layer."""

    rotations: list[Rotation]
    visible: list[Visible]


@dataclass(frozen=True)
class Network:
    """``matrices`` and ``weights``, which are all the others, by canonical name; ``dtype`` is that of activations."""

    config: TextConfig
    matrices: dict[str, Linear]
    weights: dict[str, mx.array]
    dtype: mx.Dtype

    @property
    def table(self) -> Linear:
        """The embedding [V, D], which is also the output head."""
        return self.matrices[f"{DECODER}.embed_tokens.weight"]

    @property
    def scale(self) -> mx.array:
        """The embedding scale, rounded to the dtype of the weights: 53 in bfloat16 at 2,816 features."""
        return mx.array(self.config.hidden_size**0.5, dtype=self.dtype)

    def norm(self, x: mx.array, name: str) -> mx.array:
        # The weight is float32, so the product is rounded once, after the multiplication.
        return mx.fast.rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_norm_eps).astype(x.dtype)

    def bare_norm(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, None, self.config.rms_norm_eps)

    def linear(self, x: mx.array, name: str) -> mx.array:
        return self.matrices[f"{name}.weight"].apply(x)

    # ---- parts of a layer

    def rotations(self, positions: np.ndarray) -> list[Rotation]:
        """cos and sin per layer for positions int [B, T]; layers of one kind share theirs.

        Made on the host in float32: a few KB per block, and no device's own cosine enters.
        """
        made: dict[tuple, Rotation] = {}
        for dim, rope in zip(self.config.head_dims, self.config.ropes, strict=True):
            if (dim, rope) in made:
                continue
            frequency, turning = np.zeros(dim // 2), rope.turning(dim)
            frequency[:turning] = 1 / rope.theta ** (np.arange(0, 2 * turning, 2) / dim) / rope.factor
            angle = positions[:, None, :, None].astype(np.float32) * frequency.astype(np.float32)
            made[dim, rope] = (mx.array(np.cos(angle)).astype(self.dtype), mx.array(np.sin(angle)).astype(self.dtype))
        return [made[key] for key in zip(self.config.head_dims, self.config.ropes, strict=True)]

    def keys_values(self, x: mx.array, rotation: Rotation, layer: int) -> tuple[mx.array, mx.array]:
        """k after norm and RoPE, v after its bare norm, [B, K, T, d]. Full layers take v from the raw keys."""
        at, dim = f"{layer_name(layer)}.self_attn", self.config.head_dims[layer]
        raw = heads(self.linear(x, f"{at}.k_proj"), dim)
        v = raw if self.config.full(layer) else heads(self.linear(x, f"{at}.v_proj"), dim)
        return rotate(self.norm(raw, f"{at}.k_norm"), rotation), self.bare_norm(v)

    def attention(self, x: mx.array, rotation: Rotation, layer: int, attended: Attention) -> mx.array:
        at, dim = f"{layer_name(layer)}.self_attn", self.config.head_dims[layer]
        q = rotate(self.norm(heads(self.linear(x, f"{at}.q_proj"), dim), f"{at}.q_norm"), rotation)
        out = attended(q, *self.keys_values(x, rotation, layer))
        return self.linear(out.swapaxes(1, 2).flatten(2), f"{at}.o_proj")

    def gated_mlp(self, x: mx.array, at: str) -> mx.array:
        gate = experts.gelu_tanh(self.linear(x, f"{at}.gate_proj"))
        return self.linear(gate * self.linear(x, f"{at}.up_proj"), f"{at}.down_proj")

    def route(self, h: mx.array, layer: int) -> tuple[mx.array, mx.array, mx.array]:
        """Weights [N, k], experts [N, k] and odds [N, E] for [N, D] rows of the un-normed stream."""
        at = f"{layer_name(layer)}.router"
        z = self.bare_norm(h) * self.weights[f"{at}.scale"]
        # A Python factor would be rounded to bfloat16 first; torch multiplies by the float32 value.
        z = (z.astype(mx.float32) * h.shape[-1] ** -0.5).astype(h.dtype)
        scores = self.linear(z, f"{at}.proj")
        return experts.choose(scores, self.weights[f"{at}.per_expert_scale"], self.config.top_k_experts)

    # ---- the stack

    def layer(
        self, h: mx.array, rotation: Rotation, layer: int, scalar: mx.array, attended: Attention
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The stream [B, T, D] through one layer; also the router's choice [B, T, k] and odds [B, T, E]."""
        at = layer_name(layer)
        attention = self.attention(self.norm(h, f"{at}.input_layernorm"), rotation, layer, attended)
        h = h + self.norm(attention, f"{at}.post_attention_layernorm")
        dense = self.gated_mlp(self.norm(h, f"{at}.pre_feedforward_layernorm"), f"{at}.mlp")
        weight, chosen, odds = self.route(h.flatten(0, 1), layer)
        banks = (self.matrices[f"{at}.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
        inner = self.norm(h, f"{at}.pre_feedforward_layernorm_2").flatten(0, 1)
        mixed = experts.mix(inner, weight, chosen, *banks).reshape(h.shape)
        both = self.norm(dense, f"{at}.post_feedforward_layernorm_1")
        both = both + self.norm(mixed, f"{at}.post_feedforward_layernorm_2")
        h = h + self.norm(both, f"{at}.post_feedforward_layernorm")
        return h * scalar, chosen.reshape(*h.shape[:2], -1), odds.reshape(*h.shape[:2], -1)

    def encode(self, tokens: mx.array, cache: MLXCache, counts: np.ndarray, *, hidden: bool) -> mx.array | None:
        """Causal pass over one chunk [B, T]; the cache, which has room for it, takes ``counts`` [B] tokens per row.

        Hidden states [B, T, D] after the last norm come back when asked for; else the last layer only makes its keys.
        """
        chunk = plan_chunk(cache.lengths, counts, tokens.shape[1], self.config.sliding_window)
        rotations = self.rotations(cache.lengths[:, None] + np.arange(tokens.shape[1]))
        h, last = self.embed(tokens), self.config.num_hidden_layers - 1
        for i, kept in enumerate(cache.layers):
            if i == last and not hidden:
                x = self.norm(h, f"{layer_name(i)}.input_layernorm")
                kept.put(*self.keys_values(x, rotations[i], i), chunk)
                break
            attended = partial(kept.attend_chunk, chunk=chunk)
            h, _, _ = self.layer(h, rotations[i], i, self.weights[encoder_scalar(i)], attended)
        cache.lengths = cache.lengths + counts
        return self.norm(h, f"{DECODER}.norm") if hidden else None

    def layout(self, cache: MLXCache, canvas: int) -> Layout:
        """Rotations and visible slots of a canvas of ``canvas`` tokens behind each row of the cache."""
        full = visible_slots(cache.lengths, canvas, None)
        sliding = visible_slots(cache.lengths, canvas, self.config.window_keys)
        kinds = [full if self.config.full(i) else sliding for i in range(self.config.num_hidden_layers)]
        return Layout(self.rotations(cache.lengths[:, None] + np.arange(canvas)), kinds)

    def decode(
        self, canvas: mx.array, cache: MLXCache, layout: Layout, soft: mx.array | None
    ) -> tuple[mx.array, list[mx.array], list[mx.array]]:
        """Bidirectional pass over ``canvas`` [B, C]; hidden states [B, C, D], router choices and odds per layer."""
        h = self.condition(self.embed(canvas), soft)
        choices, odds = [], []
        for i, kept in enumerate(cache.layers):
            attended = partial(kept.attend_canvas, visible=layout.visible[i])
            scalar = self.weights[f"{layer_name(i)}.layer_scalar"]
            h, chosen, p = self.layer(h, layout.rotations[i], i, scalar, attended)
            choices.append(chosen)
            odds.append(p)
        return self.norm(h, f"{DECODER}.norm"), choices, odds

    # ---- ends

    def embed(self, tokens: mx.array) -> mx.array:
        return self.table.rows(tokens).astype(self.dtype) * self.scale

    def condition(self, x: mx.array, soft: mx.array | None) -> mx.array:
        """Mix in the soft embedding of the step before. Without one that is exactly zero; the norm always runs."""
        at = f"{DECODER}.self_conditioning"
        return self.bare_norm(x if soft is None else x + self.gated_mlp(self.norm(soft, f"{at}.pre_norm"), at))

    def soften(self, shaped: mx.array) -> mx.array:
        """Soft embedding [..., D] of temperature-divided logits [..., V], rounded to the embedding's dtype first."""
        odds = mx.softmax(shaped.astype(self.dtype).astype(mx.float32), -1, precise=True)
        return self.table.combine(odds.astype(self.dtype)) * self.scale

    def logits(self, hidden: mx.array) -> mx.array:
        """float32 [..., V]: the head in the model's dtype, then the softcap in float32."""
        return softcap(self.table.apply(hidden).astype(mx.float32), self.config.final_logit_softcapping)


def heads(x: mx.array, dim: int) -> mx.array:
    """[B, T, H * d] to [B, H, T, d]."""
    return x.reshape(*x.shape[:2], -1, dim).swapaxes(1, 2)


def rotate(x: mx.array, rotation: Rotation) -> mx.array:
    """RoPE on [B, H, T, d]: element i pairs with i + d / 2."""
    cos, sin = rotation
    a, b = mx.split(x, 2, -1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softcap(raw: mx.array, cap: float | None) -> mx.array:
    return raw if cap is None else mx.tanh(raw / cap) * cap
