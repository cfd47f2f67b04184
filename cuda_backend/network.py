"""The transformer in torch: the same parts as the NumPy reference, batched. Streams are [B, T, D], heads [B, T, H, d].

Precision is Hugging Face's: norms, rotary angles, router probabilities, the sum over experts and the softcap in
float32, everything else in the model's dtype. Source: transformers 5.23, ``modeling_diffusion_gemma.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_diffgemma.config import Rope, TextConfig

from .cache import Chunk, Prefix, TorchCache
from .linear import grouped_linear, linear
from .weights import Attention, Experts, GatedMlp, Layer, Router, Weights

Turn = tuple[Tensor, Tensor]  # cos and sin, [B, T, 1, d / 2]


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """In float32 with the weight's product, then back to x's dtype. ``weight`` is float32, or absent."""
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """RoPE on [B, T, H, d]: element i pairs with i + d / 2; cos and sin are the same for both."""
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def gated_mlp(x: Tensor, mlp: GatedMlp) -> Tensor:
    gate, up = linear(x, mlp.gate_up_proj).chunk(2, -1)
    return linear(gelu_tanh(gate) * up, mlp.down_proj)


def attend_canvas(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """q [B, C, H, d] over k, v [B, K, S, d], ``visible`` bool [B, 1, 1, S]: [B, C, H d].

    All queries see the same keys, so those of one key-value head are stacked and nothing is repeated.
    """
    rows, length, heads, dim = q.shape
    stacked = q.transpose(1, 2).reshape(rows, k.shape[1], -1, dim)
    out = F.scaled_dot_product_attention(stacked, k, v, attn_mask=visible, scale=1.0)
    return out.view(rows, heads, length, dim).transpose(1, 2).reshape(rows, length, -1)


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [B, T, H, d] over k, v [B, K, S, d], ``visible`` bool [B or 1, 1, T, S]: [B, T, H d].

    Key-value heads become batch rows and their query heads the heads, so that keys are broadcast, not copied.
    """
    rows, length, heads, dim = q.shape
    groups = k.shape[1]
    stacked = q.transpose(1, 2).reshape(rows * groups, -1, length, dim)
    k, v = (x.flatten(0, 1)[:, None].expand(-1, heads // groups, -1, -1) for x in (k, v))
    if len(visible) > 1:
        visible = visible.repeat_interleave(groups, 0)
    out = F.scaled_dot_product_attention(stacked, k, v, attn_mask=visible, scale=1.0)
    return out.reshape(rows, heads, length, dim).transpose(1, 2).reshape(rows, length, -1)


@dataclass
class Trace:
    """What ``inspect`` wants to know of the routers, layer by layer."""

    chosen: list[Tensor] = field(default_factory=list)  # [B, C, k], best first
    odds: list[Tensor] = field(default_factory=list)  # float32 [B, C, E]


@dataclass(frozen=True)
class Network:
    config: TextConfig
    weights: Weights

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed_tokens.dtype

    @functools.cached_property
    def scale(self) -> float:
        """sqrt(D), rounded to the embedding's dtype: 53.0 for 2,816 in bfloat16."""
        return torch.tensor(self.config.hidden_size**0.5).to(self.dtype).item()

    def norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return rms_norm(x, weight, self.config.rms_norm_eps)

    # ---- parts of a layer

    def turns(self, positions: Tensor) -> list[Turn]:
        """cos and sin of ``positions`` int64 [B or 1, T] for every layer; layers of one kind share them."""
        kinds = list(zip(self.config.ropes, self.config.head_dims, strict=True))
        made = {kind: turn_of(positions, *kind, self.dtype) for kind in set(kinds)}
        return [made[kind] for kind in kinds]

    def queries_keys_values(
        self, x: Tensor, attention: Attention, layer: int, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, d], k and v [B, T, K, d]. A full layer's values are its raw keys."""
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads[layer]
        mixed = linear(x, attention.qkv_proj).unflatten(-1, (-1, self.config.head_dims[layer]))
        q, raw = mixed[:, :, :heads], mixed[:, :, heads : heads + groups]
        v = mixed[:, :, -groups:]  # which are the raw keys where there is no v_proj
        k = rotate(self.norm(raw, attention.k_norm), turn)
        return rotate(self.norm(q, attention.q_norm), turn), k, self.norm(v, None)

    def route(self, h: Tensor, router: Router) -> tuple[Tensor, Tensor, Tensor]:
        """Weights float32 [N, k], experts [N, k] (best first), all probabilities float32 [N, E], of h [N, D]."""
        z = self.norm(h, None) * router.scale * self.config.hidden_size**-0.5
        odds = torch.softmax(linear(z, router.proj), -1, dtype=torch.float32)
        weight, chosen = torch.topk(odds, self.config.top_k_experts, -1)
        weight = weight / weight.sum(-1, keepdim=True) * router.per_expert_scale[chosen]
        return weight, chosen, odds

    def feed_forward(self, h: Tensor, layer: Layer, trace: Trace | None) -> Tensor:
        """The dense MLP and the experts side by side, before the residual is added."""
        norms = layer.norms
        dense = gated_mlp(self.norm(h, norms["pre_feedforward_layernorm"]), layer.mlp)
        weight, chosen, odds = self.route(h.flatten(0, 1), layer.router)
        x = self.norm(h, norms["pre_feedforward_layernorm_2"])
        mixed = run_experts(x.flatten(0, 1), weight, chosen, layer.experts).view_as(h)
        if trace is not None:
            trace.chosen.append(chosen.unflatten(0, h.shape[:2]))
            trace.odds.append(odds.unflatten(0, h.shape[:2]))
        return self.norm(
            self.norm(dense, norms["post_feedforward_layernorm_1"])
            + self.norm(mixed, norms["post_feedforward_layernorm_2"]),
            norms["post_feedforward_layernorm"],
        )

    def rest_of_layer(self, h: Tensor, attention: Tensor, layer: Layer, scalar: Tensor, trace: Trace | None) -> Tensor:
        """Everything behind the attention, whose heads [B, T, H d] come in joined."""
        joined = linear(attention, layer.self_attn.o_proj)
        h = h + self.norm(joined, layer.norms["post_attention_layernorm"])
        return (h + self.feed_forward(h, layer, trace)) * scalar

    # ---- the stack

    def decode(self, canvas: Tensor, soft: Tensor, prefix: Prefix, trace: Trace | None = None) -> Tensor:
        """Canvas ids [B, C] and soft embedding [B, C, D] to hidden states [B, C, D] after the last norm.

        The canvas's keys and values go to the slots that the cache keeps for them; the prefix is read where it lies.
        """
        h = self.condition(self.embed(canvas), soft)
        length = canvas.shape[1]
        for i, layer in enumerate(self.weights.layers):
            x = self.norm(h, layer.norms["input_layernorm"])
            q, k, v = self.queries_keys_values(x, layer.self_attn, i, prefix.turns[i])
            keys, values = prefix.keys[i], prefix.values[i]
            keys[:, :, :length] = k.transpose(1, 2)
            values[:, :, :length] = v.transpose(1, 2)
            attention = attend_canvas(q, keys, values, prefix.visible[i])
            h = self.rest_of_layer(h, attention, layer, layer.layer_scalar, trace)
        return self.norm(h, self.weights.norm)

    def encode(self, tokens: Tensor, cache: TorchCache, chunk: Chunk) -> Tensor:
        """Causal pass over ``tokens`` [B, T] behind the cache, which is extended: the stream [B, T, D], not normed."""
        h, turns = self.embed(tokens), self.turns(chunk.positions)
        for i, layer in enumerate(self.weights.layers):
            x = self.norm(h, layer.norms["input_layernorm"])
            q, k, v = self.queries_keys_values(x, layer.self_attn, i, turns[i])
            seen = cache.extend(i, k.transpose(1, 2), v.transpose(1, 2), chunk)
            h = self.rest_of_layer(h, attend_chunk(q, *seen), layer, layer.encoder_layer_scalar, None)
        return h

    # ---- ends

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weights.embed_tokens) * self.scale

    def condition(self, x: Tensor, soft: Tensor) -> Tensor:
        """Mix in the soft embedding of the step before: zeros at the first step, where the bare norm still runs."""
        signal = gated_mlp(self.norm(soft, self.weights.pre_norm), self.weights.self_conditioning)
        return self.norm(x + signal, None)


def turn_of(positions: Tensor, rope: Rope, head_dim: int, dtype: torch.dtype) -> Turn:
    """cos and sin [B, T, 1, d / 2]: angles in float32, rounded to ``dtype`` at the end.

    Full layers turn the first pairs only, with the exponent over the whole head.
    """
    turning = rope.turning(head_dim)
    exponent = torch.arange(0, 2 * turning, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequency = F.pad(1.0 / rope.theta**exponent / rope.factor, (0, head_dim // 2 - turning))
    angle = positions[..., None, None].float() * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def run_experts(x: Tensor, weight: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
    """x [N, D] through the experts ``chosen`` [N, k], summed with float32 ``weight`` [N, k]: [N, D].

    Pairs are sorted by expert for two grouped products, put back, and summed best expert first: no atomics, so the
    result does not depend on timing; no count is read by the host, so a step can be captured in a graph.
    """
    count, top = chosen.shape
    expert, order = chosen.flatten().sort(stable=True)
    every = torch.arange(experts.gate_up_proj.shape[0], device=x.device)
    ends = torch.searchsorted(expert, every, right=True, out_int32=True)
    gate, up = grouped_linear(x[order // top], experts.gate_up_proj, ends).chunk(2, -1)
    out = grouped_linear(gelu_tanh(gate) * up, experts.down_proj, ends)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return (out[back].view(count, top, -1) * weight[..., None]).sum(1).to(x.dtype)
