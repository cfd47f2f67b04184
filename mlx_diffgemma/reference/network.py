"""The transformer of DiffusionGemma in NumPy, one row at a time: shapes are [T, D], heads are [T, H, d].

It has two roles with the same weights. The encoder reads tokens causally and leaves keys and values; the decoder reads
a canvas with bidirectional attention over those and itself. They differ in the layer scalars, and the decoder alone has
self-conditioning. Source: transformers 5.23, ``modeling_diffusion_gemma.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import TextConfig
from ..tensors import DECODER, encoder_scalar, layer_name

F = np.float32
KeyValues = tuple[np.ndarray, np.ndarray]  # k and v, [P, K, d]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return F(0.5) * x * (F(1) + np.tanh(F(np.sqrt(2 / np.pi)) * (x + F(0.044715) * x * x * x)))


def rms_norm(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    """x / rms(x) * weight. The weight is used as it is, not 1 + weight; some norms have none."""
    y = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + F(eps))
    return y if weight is None else y * weight


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE on [T, H, d]: element i pairs with i + d / 2."""
    a, b = np.split(x, 2, -1)
    return x * cos[:, None] + np.concatenate([-b, a], -1) * sin[:, None]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray | None) -> np.ndarray:
    """q [T, H, d] over k, v [S, K, d]; query head h reads head h // (H / K). The score scale is 1. Gives [T, H * d]."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("thd,shd->hts", q, k)
    if visible is not None:
        scores = np.where(visible, scores, F(-1e30))
    return np.einsum("hts,shd->thd", softmax(scores), v).reshape(len(q), -1)


@dataclass(frozen=True)
class Network:
    config: TextConfig
    weights: dict[str, np.ndarray]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def bare_norm(self, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, None, self.config.rms_norm_eps)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T

    @property
    def table(self) -> np.ndarray:
        """The embedding [V, D], which is also the output head."""
        return self.weights[f"{DECODER}.embed_tokens.weight"]

    # ---- parts of a layer

    def rope(self, positions: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin [T, d]. Full layers turn the first pairs only, with the exponent over the whole head."""
        dim, rope = self.config.head_dims[layer], self.config.ropes[layer]
        frequency = np.zeros(dim // 2)
        turning = rope.turning(dim)
        frequency[:turning] = 1 / rope.theta ** (np.arange(0, 2 * turning, 2) / dim) / rope.factor
        angle = positions[:, None].astype(F) * frequency.astype(F)
        angle = np.concatenate([angle, angle], -1)
        return np.cos(angle), np.sin(angle)

    def queries_keys_values(self, x: np.ndarray, positions: np.ndarray, layer: int) -> tuple[np.ndarray, KeyValues]:
        at, dim = f"{layer_name(layer)}.self_attn", self.config.head_dims[layer]
        cos, sin = self.rope(positions, layer)
        q = self.linear(x, f"{at}.q_proj").reshape(len(x), -1, dim)
        raw = self.linear(x, f"{at}.k_proj").reshape(len(x), -1, dim)
        v = raw if self.config.full(layer) else self.linear(x, f"{at}.v_proj").reshape(len(x), -1, dim)
        k = rotate(self.norm(raw, f"{at}.k_norm"), cos, sin)
        return rotate(self.norm(q, f"{at}.q_norm"), cos, sin), (k, self.bare_norm(v))

    def gated_mlp(self, x: np.ndarray, at: str) -> np.ndarray:
        gate, up = self.linear(x, f"{at}.gate_proj"), self.linear(x, f"{at}.up_proj")
        return self.linear(gelu_tanh(gate) * up, f"{at}.down_proj")

    def route(self, h: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights [T, k], experts [T, k] (best first) and all probabilities [T, E], from the un-normed stream."""
        at = f"{layer_name(layer)}.router"
        z = self.bare_norm(h) * self.weights[f"{at}.scale"] * F(h.shape[-1] ** -0.5)
        p = softmax(self.linear(z, f"{at}.proj"))
        chosen = np.argsort(-p, -1, kind="stable")[:, : self.config.top_k_experts]
        weight = np.take_along_axis(p, chosen, -1)
        weight = weight / weight.sum(-1, keepdims=True) * self.weights[f"{at}.per_expert_scale"][chosen]
        return weight, chosen, p

    def experts(self, x: np.ndarray, weight: np.ndarray, chosen: np.ndarray, layer: int) -> np.ndarray:
        at = f"{layer_name(layer)}.experts"
        gate_up, down = self.weights[f"{at}.gate_up_proj"], self.weights[f"{at}.down_proj"]
        out = np.zeros_like(x)
        for expert in np.unique(chosen):
            rows, rank = np.nonzero(chosen == expert)
            gate, up = np.split(x[rows] @ gate_up[expert].T, 2, -1)
            out[rows] += weight[rows, rank, None] * ((gelu_tanh(gate) * up) @ down[expert].T)
        return out

    # ---- the stack

    def layer(
        self, h: np.ndarray, positions: np.ndarray, prefix: KeyValues, visible: np.ndarray | None, layer: int, scalar: F
    ) -> tuple[np.ndarray, KeyValues, np.ndarray, np.ndarray]:
        """The stream [T, D] through one layer; also the new keys and values, and the router's choice and odds."""
        at = layer_name(layer)
        q, new = self.queries_keys_values(self.norm(h, f"{at}.input_layernorm"), positions, layer)
        k, v = (np.concatenate(pair) for pair in zip(prefix, new, strict=True))
        attention = self.linear(attend(q, k, v, visible), f"{at}.self_attn.o_proj")
        h = h + self.norm(attention, f"{at}.post_attention_layernorm")
        dense = self.gated_mlp(self.norm(h, f"{at}.pre_feedforward_layernorm"), f"{at}.mlp")
        weight, chosen, odds = self.route(h, layer)
        mixed = self.experts(self.norm(h, f"{at}.pre_feedforward_layernorm_2"), weight, chosen, layer)
        dense = self.norm(dense, f"{at}.post_feedforward_layernorm_1")
        mixed = self.norm(mixed, f"{at}.post_feedforward_layernorm_2")
        h = h + self.norm(dense + mixed, f"{at}.post_feedforward_layernorm")
        return h * scalar, new, chosen, odds

    def encode(self, tokens: np.ndarray, prefix: list[KeyValues]) -> tuple[np.ndarray, list[KeyValues]]:
        """Causal pass over ``tokens`` [T] behind ``prefix``: states after the last norm, and all keys and values."""
        past = len(prefix[0][0])
        q, k = np.arange(past, past + len(tokens))[:, None], np.arange(past + len(tokens))
        causal = k <= q
        window = causal & (k > q - self.config.sliding_window)
        h, kept = self.embed(tokens), []
        for i in range(self.config.num_hidden_layers):
            visible = causal if self.config.full(i) else window
            h, new, _, _ = self.layer(h, q[:, 0], prefix[i], visible, i, self.weights[encoder_scalar(i)][0])
            kept.append((np.concatenate([prefix[i][0], new[0]]), np.concatenate([prefix[i][1], new[1]])))
        return self.norm(h, f"{DECODER}.norm"), kept

    def decode(
        self, canvas: np.ndarray, prefix: list[KeyValues], soft: np.ndarray | None
    ) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Bidirectional pass over ``canvas`` [C]; hidden states [C, D], router choices and odds per layer.

        In sliding layers every canvas position sees the same last W - 1 cached positions, and the whole canvas.
        """
        past = len(prefix[0][0])
        positions = np.arange(past, past + len(canvas))
        h = self.condition(self.embed(canvas), soft)
        choices, odds = [], []
        for i in range(self.config.num_hidden_layers):
            first = 0 if self.config.full(i) else max(0, past - self.config.window_keys)
            seen = (prefix[i][0][first:], prefix[i][1][first:])
            scalar = self.weights[f"{layer_name(i)}.layer_scalar"][0]
            h, _, chosen, p = self.layer(h, positions, seen, None, i, scalar)
            choices.append(chosen)
            odds.append(p)
        return self.norm(h, f"{DECODER}.norm"), choices, odds

    # ---- ends

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return self.table[tokens] * F(np.sqrt(self.config.hidden_size))

    def condition(self, x: np.ndarray, soft: np.ndarray | None) -> np.ndarray:
        """Mix in the soft embedding of the step before. The bare norm runs at the first step too."""
        at = f"{DECODER}.self_conditioning"
        soft = np.zeros_like(x) if soft is None else soft
        return self.bare_norm(x + self.gated_mlp(self.norm(soft, f"{at}.pre_norm"), at))

    def soften(self, shaped: np.ndarray) -> np.ndarray:
        """Soft embedding [C, D] of temperature-divided logits [C, V]: the expected embedding, scaled like any."""
        return (softmax(shaped) @ self.table) * F(np.sqrt(self.config.hidden_size))

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        raw, cap = hidden @ self.table.T, self.config.final_logit_softcapping
        return raw if cap is None else np.tanh(raw / F(cap)) * F(cap)

    def empty(self) -> list[KeyValues]:
        shapes = zip(self.config.num_key_value_heads, self.config.head_dims, strict=True)
        return [(np.zeros((0, heads, dim), F),) * 2 for heads, dim in shapes]
