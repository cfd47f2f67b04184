"""The transformer in torch. Streams are flat, [N, D]: row b T + t is token t of row b of the batch; heads [B, T, H, d].

One forward may hold tokens in both roles: a finished canvas, read causally into the cache, and the next one, denoised
bidirectionally behind it. They share every product; what differs is how they attend and a scalar per layer.

What is computed, and how it is rounded, is Hugging Face's; each operation stands in ``kernels``, plain and fused.
Source: transformers 5.23, ``modeling_diffusion_gemma.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_diffgemma.config import Rope, TextConfig

from .cache import Chunk, Prefix, TorchCache, Turns
from .kernels.norm import AfterAttention, AfterExperts
from .kernels.ops import Ops
from .kernels.quantize import Rows
from .kernels.router import route_ops
from .linear import Weight, takes_fp8
from .weights import Layer, Weights

Turn = tuple[Tensor, Tensor]  # cos and sin, [B or 1, T, 1, d / 2]
Attend = Callable[[int, Tensor], Tensor]  # layer, mixed queries, keys and values [N, X] -> heads [N, H d]


@dataclass
class Trace:
    """What ``inspect`` wants to know of the routers, layer by layer."""

    chosen: list[Tensor] = field(default_factory=list)  # [N, k], best first
    odds: list[Tensor] = field(default_factory=list)  # float32 [N, E]


@dataclass(frozen=True)
class Network:
    config: TextConfig
    weights: Weights
    ops: Ops

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed_tokens.dtype

    @functools.cached_property
    def scale(self) -> float:
        """sqrt(D), rounded to the embedding's dtype: 53.0 for 2,816 in bfloat16."""
        return torch.tensor(self.config.hidden_size**0.5).to(self.dtype).item()

    # ---- what a forward is made of

    def denoise(self, canvas: Tensor, soft: Tensor | None, prefix: Prefix, *, trace: Trace | None = None) -> Tensor:
        """Canvas ids [B, C] and soft embedding [B C, D] to hidden states [B C, D] after the last norm.

        ``soft`` is None at the first step of a block. The canvas's keys and values go to the slots that the cache
        keeps for them; the prefix is read where it lies.
        """
        return self._run(
            self.condition(self.embed(canvas), soft), self._canvas(prefix), self._scalars(0, canvas), trace
        )

    def encode(self, tokens: Tensor, cache: TorchCache, chunk: Chunk) -> Tensor:
        """Causal pass over ``tokens`` [B, T] behind the cache, which they join: hidden states [B T, D]."""
        return self._run(self.embed(tokens), self._causal(cache, chunk), self._scalars(tokens, 0), None)

    def commit_and_denoise(
        self, tokens: Tensor, cache: TorchCache, chunk: Chunk, canvas: Tensor, prefix: Prefix
    ) -> Tensor:
        """``encode`` of ``tokens`` [B, T] and the first ``denoise`` of the canvas [B, C] behind them, as one forward.

        Layer by layer the tokens' keys are cached before the canvas attends, so both see what they would see alone.
        """
        edge = tokens.numel()
        causal, bidirectional = self._causal(cache, chunk), self._canvas(prefix)

        def attend(layer: int, mixed: Tensor) -> Tensor:
            return torch.cat([causal(layer, mixed[:edge]), bidirectional(layer, mixed[edge:])])

        h = torch.cat([self.embed(tokens), self.condition(self.embed(canvas), None)])
        return self._run(h, attend, self._scalars(tokens, canvas), None)[edge:]

    def _run(self, h: Tensor, attend: Attend, scalars: Tensor, trace: Trace | None) -> Tensor:
        """The stack and the last norm. h [N, D]; ``scalars`` [layers, N] are the layer scalars of each row."""
        layers, eps = self.weights.layers, self.config.rms_norm_eps
        first = layers[0]
        x = self.ops.norm(h, first.norms["input_layernorm"], eps, fp8=takes_fp8(first.self_attn.qkv_proj))
        for i, layer in enumerate(layers):
            heads = attend(i, self.ops.linear(x, layer.self_attn.qkv_proj))
            joined = self._linear(heads, layer.self_attn.o_proj)
            h, x = self._feed_forward(h, joined, i, scalars[i], trace)
        return x

    def _feed_forward(
        self, h: Tensor, joined: Tensor, i: int, scalar: Tensor, trace: Trace | None
    ) -> tuple[Tensor, Rows]:
        """The dense MLP and the experts side by side; out come the stream and its norm for the layer behind."""
        layer, eps = self.weights.layers[i], self.config.rms_norm_eps
        parts = self.ops.after_attention(
            h,
            joined,
            after_attention(layer),
            eps,
            fp8_dense=takes_fp8(layer.mlp.gate_up_proj),
            fp8_experts=takes_fp8(layer.experts.gate_up_proj),
        )
        mixed = self.ops.linear(parts.dense, layer.mlp.gate_up_proj)
        dense = self.ops.linear(self.ops.geglu(mixed, fp8=takes_fp8(layer.mlp.down_proj)), layer.mlp.down_proj)
        scores = self.ops.linear(parts.router, layer.router.proj)
        route = self.ops.route if trace is None else functools.partial(route_ops, odds=True)
        routes = route(scores, layer.router.per_expert_scale, self.config.top_k_experts)
        if trace is not None:
            trace.chosen.append(routes.chosen)
            assert routes.odds is not None
            trace.odds.append(routes.odds)
        experts = layer.experts
        pairs = self.ops.experts(parts.experts, routes, experts.gate_up_proj, experts.down_proj, h.dtype)
        following = self.weights.layers[i + 1] if i + 1 < len(self.weights.layers) else None
        return self.ops.after_experts(
            parts.stream,
            dense,
            pairs,
            routes.weight,
            after_experts(layer),
            scalar,
            eps,
            self.weights.norm if following is None else following.norms["input_layernorm"],
            fp8=following is not None and takes_fp8(following.self_attn.qkv_proj),
        )

    def _linear(self, x: Tensor, weight: Weight) -> Tensor:
        return self.ops.linear(self.ops.quantize(x) if takes_fp8(weight) else x, weight)

    def _scalars(self, tokens: Tensor | int, canvas: Tensor | int) -> Tensor:
        """[layers, N]: those of tokens read causally, then those of a canvas; either may be absent (0)."""
        counts = [ids if isinstance(ids, int) else ids.numel() for ids in (tokens, canvas)]
        columns = [column[:, None].expand(-1, n) for column, n in zip(self.weights.scalars, counts, strict=True)]
        return torch.cat(columns, 1)

    # ---- attention

    def _canvas(self, prefix: Prefix) -> Attend:
        """Every token of the canvas sees the canvas and the prefix, in slots of the cache."""

        def attend(layer: int, mixed: Tensor) -> Tensor:
            full, keys, values = self.config.full(layer), prefix.keys[layer], prefix.values[layer]
            q = self._heads(layer, mixed, prefix.turns[full], keys, values)
            return self.ops.canvas_attention(q, keys, values, prefix.lengths[full]).flatten(0, 1)

        return attend

    def _causal(self, cache: TorchCache, chunk: Chunk) -> Attend:
        """Tokens see themselves, those before them in the chunk, and the cache, which they then join."""
        turns = self.turns(chunk.positions)

        def attend(layer: int, mixed: Tensor) -> Tensor:
            full, own = self.config.full(layer), cache.scratch(layer, chunk)
            q = self._heads(layer, mixed, turns[full], *own)
            window = None if full else self.config.sliding_window
            seen = cache.seen(layer, chunk)
            out = self.ops.chunk_attention(q, *own, *seen, chunk.before, window, cache.config.canvas_length)
            cache.store(layer, *own, chunk)
            return out.flatten(0, 1)

        return attend

    def _heads(self, layer: int, mixed: Tensor, turn: Turn, keys: Tensor, values: Tensor) -> Tensor:
        """Queries [B, T, H, d], normed and turned; keys and values go to the first T slots of the buffers given."""
        attention, config = self.weights.layers[layer].self_attn, self.config
        return self.ops.heads(
            mixed.unflatten(0, (len(keys), -1)),
            attention.q_norm,
            attention.k_norm,
            *turn,
            config.num_attention_heads,
            config.num_key_value_heads[layer],
            config.rms_norm_eps,
            keys,
            values,
        )

    def turns(self, positions: Tensor) -> Turns:
        """cos and sin of ``positions`` int64 [B or 1, T] for each kind of layer."""
        kinds = {self.config.full(i): i for i in range(self.config.num_hidden_layers)}
        return {
            full: turn_of(positions, self.config.ropes[i], self.config.head_dims[i], self.dtype)
            for full, i in kinds.items()
        }

    # ---- ends

    def embed(self, tokens: Tensor) -> Tensor:
        """ids [B, T] -> [B T, D]."""
        return F.embedding(tokens.flatten(), self.weights.embed_tokens) * self.scale

    def condition(self, x: Tensor, soft: Tensor | None) -> Tensor:
        """Mix in the soft embedding of the step before. Without one the signal is 0, and the bare norm still runs."""
        eps = self.config.rms_norm_eps
        if soft is not None:
            mlp = self.weights.self_conditioning
            n = self.ops.norm(soft, self.weights.pre_norm, eps, fp8=takes_fp8(mlp.gate_up_proj))
            act = self.ops.geglu(self.ops.linear(n, mlp.gate_up_proj), fp8=takes_fp8(mlp.down_proj))
            x = x + self.ops.linear(act, mlp.down_proj)
        return self.ops.norm(x, None, eps, fp8=False)


def after_attention(layer: Layer) -> AfterAttention:
    return AfterAttention(
        layer.norms["post_attention_layernorm"],
        layer.norms["pre_feedforward_layernorm"],
        layer.norms["pre_feedforward_layernorm_2"],
        layer.router.scale,
    )


def after_experts(layer: Layer) -> AfterExperts:
    return AfterExperts(
        layer.norms["post_feedforward_layernorm_1"],
        layer.norms["post_feedforward_layernorm_2"],
        layer.norms["post_feedforward_layernorm"],
    )


def turn_of(positions: Tensor, rope: Rope, head_dim: int, dtype: torch.dtype) -> Turn:
    """cos and sin [B, T, 1, d / 2]: angles in float32, rounded to ``dtype`` at the end.

    Full layers turn the first pairs only, with the exponent over the whole head.
    """
    turning = rope.turning(head_dim)
    exponent = torch.arange(0, 2 * turning, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequency = F.pad(1.0 / rope.theta**exponent / rope.factor, (0, head_dim // 2 - turning))
    angle = positions[..., None, None].float() * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)
