"""The demo network as a trainable torch module: same names, shapes and formulas as the official checkpoint.

A twin of transformers' ``DiffusionGemma`` text model, kept because it trains about three times faster on a CPU.
``export.py`` compares the two before anything is packaged.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 6, 128, 4, 2, 32
GLOBAL_KV_HEADS, GLOBAL_HEAD_DIM, MLP, MOE, EXPERTS, TOP_K = 1, 64, 128, 64, 8, 2
WINDOW, VOCAB, CANVAS, EPS, SOFTCAP = 64, 128, 48, 1e-6, 30.0
SLIDING_THETA, FULL_THETA, PARTIAL = 100.0, 1e6, 0.25


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * weight


def rope_table(full: bool, length: int = 512) -> tuple[Tensor, Tensor]:
    """cos and sin, [length, head_dim]; the full layers rotate a quarter of the pairs (model card, "proportional")."""
    if full:
        turning = int(PARTIAL * GLOBAL_HEAD_DIM // 2)
        frequency = FULL_THETA ** (-torch.arange(0, 2 * turning, 2) / GLOBAL_HEAD_DIM)
        frequency = torch.cat([frequency, torch.zeros(GLOBAL_HEAD_DIM // 2 - turning)])
    else:
        frequency = SLIDING_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.arange(length)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, T, H, D]
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


class Norm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.weight)


def linear(rows: int, columns: int) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(layer.weight, std=0.06)
    return layer


class MLPBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = linear(MLP, HIDDEN), linear(MLP, HIDDEN)
        self.down_proj = linear(HIDDEN, MLP)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, full: bool):
        super().__init__()
        self.full = full
        self.dim, self.kv = (GLOBAL_HEAD_DIM, GLOBAL_KV_HEADS) if full else (HEAD_DIM, KV_HEADS)
        self.q_proj, self.k_proj = linear(HEADS * self.dim, HIDDEN), linear(self.kv * self.dim, HIDDEN)
        if not full:
            self.v_proj = linear(self.kv * self.dim, HIDDEN)
        self.o_proj = linear(HIDDEN, HEADS * self.dim)
        self.q_norm, self.k_norm = Norm(self.dim), Norm(self.dim)

    def forward(self, x: Tensor, rope, prefix, mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = x.shape
        q = rotate(self.q_norm(self.q_proj(x).view(batch, length, HEADS, self.dim)), *rope)
        raw = self.k_proj(x).view(batch, length, self.kv, self.dim)
        value = raw if self.full else self.v_proj(x).view(batch, length, self.kv, self.dim)
        k, v = rotate(self.k_norm(raw), *rope), rms(value)
        keys, values = (k, v) if prefix is None else (torch.cat([prefix[0], k], 1), torch.cat([prefix[1], v], 1))
        group = HEADS // self.kv
        keys, values = keys.repeat_interleave(group, 2), values.repeat_interleave(group, 2)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask[:, None], scale=1.0
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), (k, v)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = linear(EXPERTS, HIDDEN)
        self.scale = nn.Parameter(torch.ones(HIDDEN))
        self.per_expert_scale = nn.Parameter(torch.ones(EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = self.proj(rms(x) * self.scale * HIDDEN**-0.5).softmax(-1)
        weight, index = p.topk(TOP_K, -1)
        weight = weight / weight.sum(-1, keepdim=True) * self.per_expert_scale[index]
        return weight, index, p


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * MOE, HIDDEN) * 0.06)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, MOE) * 0.06)

    def forward(self, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        order = index.reshape(-1).argsort(stable=True)
        ends = F.one_hot(index.reshape(-1), EXPERTS).sum(0).cumsum(0).to(torch.int32)
        rows = x[order // TOP_K]
        gate, up = F.grouped_mm(rows, self.gate_up_proj.mT, offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.gelu(gate, approximate="tanh") * up, self.down_proj.mT, offs=ends)
        out = out * weight.reshape(-1)[order, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        return out[back].view(-1, TOP_K, HIDDEN).sum(1)


class Layer(nn.Module):
    def __init__(self, full: bool):
        super().__init__()
        self.self_attn, self.mlp, self.router, self.experts = Attention(full), MLPBlock(), Router(), Experts()
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            setattr(self, f"{name}_layernorm", Norm(HIDDEN))
        for name in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
            setattr(self, name, Norm(HIDDEN))
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, h: Tensor, rope, prefix, mask: Tensor, scalar: Tensor):
        a, kv = self.self_attn(self.input_layernorm(h), rope, prefix, mask)
        h = h + self.post_attention_layernorm(a)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(h)))
        flat = h.reshape(-1, HIDDEN)
        weight, index, p = self.router(flat)
        moe = self.experts(self.pre_feedforward_layernorm_2(flat), weight, index).view_as(h)
        h = h + self.post_feedforward_layernorm(dense + self.post_feedforward_layernorm_2(moe))
        share = F.one_hot(index, EXPERTS).float().mean((0, 1))  # load balance, Switch Transformer eq. 4
        return h * scalar, kv, EXPERTS * (share * p.mean(0)).sum()


class SelfConditioning(nn.Module):
    def __init__(self):
        super().__init__()
        self.pre_norm = Norm(HIDDEN)
        self.gate_proj, self.up_proj, self.down_proj = linear(MLP, HIDDEN), linear(MLP, HIDDEN), linear(HIDDEN, MLP)

    def forward(self, x: Tensor, soft: Tensor) -> Tensor:
        n = self.pre_norm(soft)
        return rms(x + self.down_proj(F.gelu(self.gate_proj(n), approximate="tanh") * self.up_proj(n)))


class Network(nn.Module):
    """Prompt and canvas in, canvas logits out. ``tokens`` [B, P] left-padded, ``valid`` [B, P], ``canvas`` [B, C]."""

    def __init__(self):
        super().__init__()
        decoder, language = nn.Module(), nn.Module()
        decoder.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        nn.init.normal_(decoder.embed_tokens.weight, std=0.06)
        decoder.layers = nn.ModuleList(Layer(full=i == LAYERS - 1) for i in range(LAYERS))
        decoder.norm, decoder.self_conditioning = Norm(HIDDEN), SelfConditioning()
        language.layers = nn.ModuleList(nn.Module() for _ in range(LAYERS))
        for layer in language.layers:
            layer.layer_scalar = nn.Parameter(torch.ones(1))
        self.model = nn.Module()
        self.model.decoder, self.model.encoder = decoder, nn.Module()
        self.model.encoder.language_model = language
        for i, table in enumerate((*rope_table(False), *rope_table(True))):
            self.register_buffer(f"rope{i}", table, persistent=False)

    def rope(self, full: bool, start: int, length: int):
        cos, sin = (self.rope2, self.rope3) if full else (self.rope0, self.rope1)
        return cos[start : start + length], sin[start : start + length]

    def stack(self, h, start, prefix, masks, scalars):
        stored, balance = [], 0.0
        for i, layer in enumerate(self.model.decoder.layers):
            full = layer.self_attn.full
            rope = self.rope(full, start, h.shape[1])
            h, kv, aux = layer(h, rope, prefix[i] if prefix else None, masks[full], scalars[i].layer_scalar)
            stored.append(kv)
            balance = balance + aux / LAYERS
        return h, stored, balance

    def encode(self, tokens: Tensor, valid: Tensor):
        length = tokens.shape[1]
        q, k = torch.arange(length)[:, None], torch.arange(length)
        full = (k <= q) & (valid[:, None] | (k == q))  # a pad row sees itself, or softmax would be empty
        masks = {True: full, False: full & (k > q - WINDOW)}
        h = self.model.decoder.embed_tokens(tokens) * math.sqrt(HIDDEN)
        _, prefix, balance = self.stack(h, 0, None, masks, self.model.encoder.language_model.layers)
        return prefix, balance

    def decode(self, canvas: Tensor, prefix, valid: Tensor, soft: Tensor):
        decoder, past = self.model.decoder, valid.shape[1]
        seen = torch.cat([valid, torch.ones_like(canvas, dtype=torch.bool)], 1)[:, None]
        seen = seen.expand(-1, canvas.shape[1], -1)
        near = torch.arange(past + canvas.shape[1]) >= past - (WINDOW - 1)
        h = decoder.self_conditioning(decoder.embed_tokens(canvas) * math.sqrt(HIDDEN), soft)
        h, _, balance = self.stack(h, past, prefix, {True: seen, False: seen & near}, decoder.layers)
        logits = decoder.norm(h) @ decoder.embed_tokens.weight.T
        return SOFTCAP * torch.tanh(logits / SOFTCAP), balance

    def soften(self, logits: Tensor) -> Tensor:
        """The self-conditioning signal of earlier logits: expected embedding, [B, C, D]."""
        return (logits.softmax(-1) @ self.model.decoder.embed_tokens.weight) * math.sqrt(HIDDEN)
