"""Bytes and operations of the parts of a layer; see ``work`` for what is counted how. ``w`` is bytes per activation."""

from __future__ import annotations

from ..tensors import layer_name
from .work import Cost, Load, norm, passes, product, touched, widen


def projections(load: Load, layer: int, fused: bool) -> Cost:
    """q, k, v and o; full layers have no v."""
    text, at, rows = load.text, f"{layer_name(layer)}.self_attn", load.rows
    queries, keys = text.num_attention_heads * text.head_dims[layer], _keys(load, layer)
    shapes = {"q_proj": (queries, text.hidden_size), "k_proj": (keys, text.hidden_size)}
    shapes["o_proj"] = (text.hidden_size, queries)
    if not text.full(layer):
        shapes["v_proj"] = (keys, text.hidden_size)
    total = Cost()
    for name, shape in shapes.items():
        total += product(load, f"{at}.{name}.weight", shape, rows)
    return total


def heads(load: Load, layer: int, fused: bool) -> Cost:
    """Norm and RoPE of q and k, norm of v.

    Plain: q and k are widened and normed, rounding and the turn are one pass, and joining the halves is a copy. The
    kernel reads each once and writes it once; in full layers, keys and values are read as one.
    """
    text, w = load.text, load.width
    queries, keys = load.rows * text.num_attention_heads * text.head_dims[layer], load.rows * _keys(load, layer)
    if fused:
        return passes(queries, 2 * w) + passes(keys, 3 * w if text.full(layer) else 4 * w)
    turned = widen(load) + 8 + (4 + w) + 2 * w
    return passes(queries + keys, turned) + passes(keys, 2 * w)


def attention(load: Load, layer: int, fused: bool) -> Cost:
    """Every query over the prefix that its layer sees, and over the canvas.

    Plain: the canvas's keys and values are written in front of the prefix, scores are written, read and written by the
    softmax and read again, and the result is copied into the order of the next product. The kernel reads q and both
    ranges and writes the result.
    """
    text, w, canvas = load.text, load.width, load.config.canvas_length
    prefix = load.prompt if text.full(layer) else min(load.prompt, text.window_keys)
    seen, dim = prefix + canvas, text.head_dims[layer]
    queries = load.rows * text.num_attention_heads * dim
    cached = 2 * load.batch * seen * _keys(load, layer)
    scores = load.rows * text.num_attention_heads * seen
    work = Cost((2 * queries + cached) * w, 4 * scores * dim)
    if fused:
        return work
    stored = 2 * load.rows * _keys(load, layer)
    return work + passes(stored, 2 * w) + passes(scores, 4 * w) + passes(queries, 2 * w)


def norms(load: Load, layer: int, fused: bool) -> Cost:
    """The norms of a layer, the router's own, the residual sums and the layer scalar; the first layer's input norm.

    Plain: sums are one pass with the rounding before and the widening behind them. Behind attention: widened, normed,
    added to the stream, normed three times (the router's without a weight), rounded twice, and scaled for the router.
    Behind the experts: both widened and normed, added, normed, added to the stream and scaled, normed for what
    follows, rounded. The kernels read two arrays and write four, then read three and write two.
    """
    w, elements, one = load.width, load.rows * load.text.hidden_size, 2 * 4
    first = passes(elements if layer == 0 else 0, norm(load))
    if fused:
        return first + passes(elements, (6 + 5) * w)
    both = 0 if w == 4 else 4  # written by a sum beside its rounded result: what the next norm reads
    residual = (4 + w) + (w + both)
    attention = widen(load) + one + residual + 2 * one + 2 * w + 2 * widen(load) + 2 * w
    experts = 2 * widen(load) + 2 * one + (2 * 4 + 4) + one + residual + one + widen(load)
    return first + passes(elements, attention + experts)


def dense_mlp(load: Load, layer: int, fused: bool) -> Cost:
    return gated(load, f"{layer_name(layer)}.mlp")


def gated(load: Load, at: str) -> Cost:
    """Gate and up, GeGLU in one pass, down."""
    hidden, wide, rows = load.text.hidden_size, load.text.intermediate_size, load.rows
    total = product(load, f"{at}.down_proj.weight", (hidden, wide), rows)
    for name in ("gate_proj", "up_proj"):
        total += product(load, f"{at}.{name}.weight", (wide, hidden), rows)
    return total + passes(rows * wide, 3 * load.width)


def router(load: Load, layer: int, fused: bool) -> Cost:
    """Scores, and from them the chosen experts, their weights and the sorted order of the pairs.

    Plain, per score: widened, softmax, negated, sorted. Per pair: probability gathered (12), summed (4), divided and
    scaled (16); pairs sorted by expert (16), gathered (12), their tokens (8), and the way back sorted (16).
    """
    text, w = load.text, load.width
    scores, pairs = load.rows * text.num_experts, load.rows * text.top_k_experts
    at = f"{layer_name(layer)}.router.proj.weight"
    made = product(load, at, (text.num_experts, text.hidden_size), load.rows)
    if fused:
        return made + passes(scores, w) + passes(pairs, 6 * 4)
    return made + passes(scores, widen(load) + 3 * 8) + passes(pairs, 12 + 4 + 16 + 16 + 12 + 8 + 16)


def experts(load: Load, layer: int, fused: bool) -> Cost:
    """Rows gathered for every pair, gate and up of the experts that are visited, GeGLU, down."""
    text, w, at = load.text, load.width, f"{layer_name(layer)}.experts"
    hidden, wide, count = text.hidden_size, text.moe_intermediate_size, text.num_experts
    pairs, share = load.rows * text.top_k_experts, touched(text, load.rows)
    up, down = (count, 2 * wide, hidden), (count, hidden, wide)
    weights = share * (load.stored(f"{at}.gate_up_proj", up) + load.stored(f"{at}.down_proj", down))
    moved = pairs * (2 * hidden + (hidden + 2 * wide) + 3 * wide + (wide + hidden)) * w
    return Cost(weights + moved, 2 * pairs * 3 * wide * hidden)


def mixing(load: Load, layer: int, fused: bool) -> Cost:
    """Pairs back in the order of tokens, weighted and summed in float32, rounded."""
    text, w = load.text, load.width
    elements = load.rows * text.hidden_size
    pairs = elements * text.top_k_experts
    if fused:
        return passes(pairs, w) + passes(elements, w)
    return passes(pairs, 2 * w + (w + 4) + 4) + passes(elements, 4 + widen(load))


def _keys(load: Load, layer: int) -> int:
    """Features of a token's keys."""
    return load.text.num_key_value_heads[layer] * load.text.head_dims[layer]
