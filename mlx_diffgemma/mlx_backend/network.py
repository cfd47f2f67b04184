"""The transformer in MLX: shapes are [B, T, D], heads are [B, H, T, d]. Same names and order as ``reference.network``.

Precision follows transformers: norms, RoPE angles, GELU, routing weights and the sum over experts in float32, rounded
to the model's dtype; everything else in that dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..config import TextConfig
from ..tensors import DECODER, encoder_scalar, layer_name
from . import experts
from .cache import MLXCache, plan_chunk, visible_slots
from .kernels.attention import Visible
from .kernels.logits import softcap
from .kernels.moe import odds_of
from .kernels.norm import AfterAttention, AfterExperts
from .kernels.ops import PLAIN, Ops
from .linear import Linear

Attention = Callable[[mx.array, mx.array, mx.array], mx.array]  # q, k, v, heads first -> [B, T, H d]
Rotation = tuple[mx.array, mx.array]  # cos and sin, [B, 1, T, d / 2]


@dataclass(frozen=True)
class Prefix:
    """What the canvases of a block see of the cache: nothing else of it enters a step.

    Args:
        keys, values: per layer, the whole buffers [B, K, S, d].
        rotations, visible: of sliding layers, then of full ones.
    """

    keys: tuple[mx.array, ...]
    values: tuple[mx.array, ...]
    rotations: tuple[Rotation, Rotation]
    visible: tuple[Visible, ...]


@dataclass
class Trace:
    """What ``inspect`` wants to know of the routers, layer by layer."""

    chosen: list[mx.array] = field(default_factory=list)  # [N, k], best first
    odds: list[mx.array] = field(default_factory=list)  # float32 [N, E]


@dataclass(frozen=True)
class Network:
    """``matrices`` and ``weights``, which are all the others, by canonical name; ``dtype`` is that of activations."""

    config: TextConfig
    matrices: dict[str, Linear]
    weights: dict[str, mx.array]
    dtype: mx.Dtype
    ops: Ops = PLAIN

    @property
    def table(self) -> Linear:
        """The embedding [V, D], which is also the output head."""
        return self.matrices[f"{DECODER}.embed_tokens.weight"]

    @functools.cached_property
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

    def rotations(self, positions: np.ndarray) -> tuple[Rotation, Rotation]:
        """cos and sin for positions int [B, T]: of sliding layers, then of full ones.

        Made on the host in float32: a few KB per block, and no device's own cosine enters.
        """
        made: dict[bool, Rotation] = {}
        for i, (dim, rope) in enumerate(zip(self.config.head_dims, self.config.ropes, strict=True)):
            if self.config.full(i) in made:
                continue
            frequency, turning = np.zeros(dim // 2), rope.turning(dim)
            frequency[:turning] = 1 / rope.theta ** (np.arange(0, 2 * turning, 2) / dim) / rope.factor
            angle = positions[:, None, :, None].astype(np.float32) * frequency.astype(np.float32)
            turn = (mx.array(np.cos(angle)).astype(self.dtype), mx.array(np.sin(angle)).astype(self.dtype))
            made[self.config.full(i)] = turn
        only = next(iter(made.values()))
        return made.get(False, only), made.get(True, only)

    def heads(
        self, x: mx.array, rotation: Rotation, layer: int, *, queries: bool = True
    ) -> tuple[mx.array | None, mx.array, mx.array]:
        """q [B, H, T, d], k and v [B, K, T, d] of normed rows [B, T, D], as attention reads and the cache keeps them.

        Full layers have no value projection: v comes from the raw keys.
        """
        at = f"{layer_name(layer)}.self_attn"
        return self.ops.heads(
            self.linear(x, f"{at}.q_proj") if queries else None,
            self.linear(x, f"{at}.k_proj"),
            None if self.config.full(layer) else self.linear(x, f"{at}.v_proj"),
            self.weights[f"{at}.q_norm.weight"],
            self.weights[f"{at}.k_norm.weight"],
            *rotation,
            self.config.rms_norm_eps,
        )

    def gated_mlp(self, x: mx.array, at: str) -> mx.array:
        act = self.ops.geglu(self.linear(x, f"{at}.gate_proj"), self.linear(x, f"{at}.up_proj"))
        return self.linear(act, f"{at}.down_proj")

    @functools.cached_property
    def joints(self) -> list[tuple[AfterAttention, AfterExperts, mx.array]]:
        """Of each layer the norms behind attention, those behind the experts, and that of the layer which follows."""
        found, names = [], [layer_name(i) for i in range(self.config.num_hidden_layers)]
        followers = [*(f"{name}.input_layernorm" for name in names[1:]), f"{DECODER}.norm"]
        for at, following in zip(names, followers, strict=True):

            def weight(name: str, at: str = at) -> mx.array:
                return self.weights[f"{at}.{name}"]

            after_attention = AfterAttention(
                post_attention=weight("post_attention_layernorm.weight"),
                pre_feedforward=weight("pre_feedforward_layernorm.weight"),
                pre_feedforward_2=weight("pre_feedforward_layernorm_2.weight"),
                router=weight("router.scale"),
            )
            after_experts = AfterExperts(
                dense=weight("post_feedforward_layernorm_1.weight"),
                experts=weight("post_feedforward_layernorm_2.weight"),
                both=weight("post_feedforward_layernorm.weight"),
            )
            found.append((after_attention, after_experts, self.weights[f"{following}.weight"]))
        return found

    # ---- the stack

    def layer(
        self,
        h: mx.array,
        x: mx.array,
        rotation: Rotation,
        layer: int,
        scalar: mx.array,
        attended: Attention,
        trace: Trace | None = None,
    ) -> tuple[mx.array, mx.array]:
        """The stream h [B, T, D] and its norm x through one layer; the dense MLP and the experts stand side by side."""
        at, eps, (after_attention, after_experts, following) = (
            layer_name(layer),
            self.config.rms_norm_eps,
            self.joints[layer],
        )
        q, k, v = self.heads(x, rotation, layer)
        assert q is not None
        joined = self.linear(attended(q, k, v), f"{at}.self_attn.o_proj")
        parts = self.ops.after_attention(h, joined, after_attention, eps)
        dense = self.gated_mlp(parts.dense, f"{at}.mlp")
        scores = self.linear(parts.router, f"{at}.router.proj").flatten(0, 1)
        routes = self.ops.route(scores, self.weights[f"{at}.router.per_expert_scale"], self.config.top_k_experts)
        if trace is not None:
            trace.chosen.append(routes.chosen)
            trace.odds.append(odds_of(scores))
        gate_up, down = (self.matrices[f"{at}.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
        mixed = experts.mix(parts.experts.flatten(0, 1), routes, gate_up, down, self.ops, self.dtype)
        return self.ops.after_experts(
            parts.stream, dense, mixed.reshape(h.shape), after_experts, scalar, eps, following
        )

    def first_norm(self, h: mx.array) -> mx.array:
        return self.norm(h, f"{layer_name(0)}.input_layernorm")

    def encode(self, tokens: mx.array, cache: MLXCache, counts: np.ndarray, *, hidden: bool) -> mx.array | None:
        """Causal pass over one chunk [B, T]; the cache, which has room for it, takes ``counts`` [B] tokens per row.

        Hidden states [B, T, D] after the last norm come back when asked for; else the last layer only makes its keys.
        """
        chunk = plan_chunk(cache.lengths, counts, tokens.shape[1], self.config.sliding_window)
        rotations = self.rotations(cache.lengths[:, None] + np.arange(tokens.shape[1]))
        h, last = self.embed(tokens), self.config.num_hidden_layers - 1
        x = self.first_norm(h)
        for i, kept in enumerate(cache.layers):
            rotation = rotations[self.config.full(i)]
            if i == last and not hidden:
                _, k, v = self.heads(x, rotation, i, queries=False)
                kept.put(k, v, chunk)
                break
            attended = functools.partial(kept.attend_chunk, chunk=chunk)
            h, x = self.layer(h, x, rotation, i, self.weights[encoder_scalar(i)], attended)
        cache.lengths = cache.lengths + counts
        return x if hidden else None

    def prefix(self, cache: MLXCache, canvas: int, *, rounded: bool = False) -> Prefix:
        """What canvases of ``canvas`` tokens see of the cache, each behind its row.

        ``rounded``: the extent is rounded up, see ``visible_slots``.
        """
        limits = (self.config.window_keys, None)
        return Prefix(
            tuple(layer.k for layer in cache.layers),
            tuple(layer.v for layer in cache.layers),
            self.rotations(cache.lengths[:, None] + np.arange(canvas)),
            tuple(visible_slots(cache.lengths, limit, rounded=rounded) for limit in limits),
        )

    def decode(
        self, canvas: mx.array, prefix: Prefix, soft: mx.array | None, *, trace: Trace | None = None
    ) -> mx.array:
        """Bidirectional pass over ``canvas`` [B, C]: hidden states [B, C, D] after the last norm."""
        h = self.condition(self.embed(canvas), soft)
        x = self.first_norm(h)
        for i, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            full, scalar = self.config.full(i), self.weights[f"{layer_name(i)}.layer_scalar"]
            visible = prefix.visible[full]
            attended = functools.partial(self.ops.canvas_attention, prefix_k=keys, prefix_v=values, visible=visible)
            h, x = self.layer(h, x, prefix.rotations[full], i, scalar, attended, trace)
        return x

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
