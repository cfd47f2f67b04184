"""Bytes and operations of the parts of a layer; see ``work`` for what is counted how. ``w`` is bytes per activation."""

from __future__ import annotations

from ..tensors import layer_name
from .work import READ_ONCE, Cost, Load, norm, passes, product, rounded_up, touched, widen


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

    Plain: q and k are widened, normed and rounded; each half of the turned ones is a pass that reads both (3 w), and
    joining them is a copy. The kernel reads each once and writes it once; in full layers, keys and values are read as
    one.
    """
    text, w = load.text, load.width
    queries, keys = load.rows * text.num_attention_heads * text.head_dims[layer], load.rows * _keys(load, layer)
    if fused:
        return passes(queries, 2 * w) + passes(keys, 3 * w if text.full(layer) else 4 * w)
    return passes(queries + keys, norm(load) + 3 * w + 2 * w) + passes(keys, 2 * w)


def attention(load: Load, layer: int, fused: bool) -> Cost:
    """Every query over the prefix that its layer sees, and over the canvas.

    Plain, per score 6 w: written by two products, read and written by the join and by the softmax, read by two
    products; 2 w for a mask over a prefix that was rounded up, w where the softmax reads twice. Per query 7 w: read by
    two products, written by one, read and written by the other, and copied into the order of what follows. The kernel
    reads q and what is visible of both ranges, and writes the result.
    """
    text, w, canvas = load.text, load.width, load.config.canvas_length
    held, dim = visible(load, layer), text.head_dims[layer]
    extent = held if fused else visible(load, layer, rounded=True)
    queries = load.rows * text.num_attention_heads
    past, scores = queries * extent, queries * (extent + canvas)
    work = Cost(2 * load.batch * (extent + canvas) * _keys(load, layer) * w, 4 * scores * dim)
    if fused:
        return work + passes(queries * dim, 2 * w)
    work += passes(scores, 6 * w if extent + canvas <= READ_ONCE else 7 * w) + passes(queries * dim, 7 * w)
    return work + passes(0 if extent == held else past, 2 * w)


def visible(load: Load, layer: int, *, rounded: bool = False) -> int:
    """Slots of the prefix that a canvas sees; ``rounded`` as the shapes of plain operations are."""
    slots = rounded_up(load.prompt) if rounded else load.prompt
    return slots if load.text.full(layer) else min(slots, load.text.window_keys)


def norms(load: Load, layer: int, fused: bool) -> Cost:
    """The norms of a layer, the router's own, the residual sums and the layer scalar; the first layer's input norm.

    Plain. Behind attention: widened, normed, rounded and added to the stream; that is normed and scaled for the router,
    widened once and normed twice, both rounded. Behind the experts: both widened and normed; rounded, added and widened
    in one pass; normed; rounded, added to the stream and scaled; widened, normed for what follows, rounded. The kernels
    read two arrays and write four, then read three and write two.
    """
    w, elements, one = load.width, load.rows * load.text.hidden_size, 2 * 4
    first = passes(elements if layer == 0 else 0, norm(load))
    if fused:
        return first + passes(elements, (6 + 5) * w)
    residual = 4 + w + w
    attention = widen(load) + one + residual + (2 * w + 2 * w) + widen(load) + 2 * (one + widen(load))
    experts = 2 * (widen(load) + one) + (4 + 4 + 4) + one + residual + norm(load)
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

    Plain, per score: widened, softmax (8), made a key of 8 bytes in two passes (8 + 12) and sorted (16). Per pair: the
    expert read off its key (12), its probability gathered (12), summed (4), its scale gathered (12), divided and scaled
    (12); a key of expert and pair (4 + 12), sorted (8), taken apart (3 times 8), and the way back sorted (8).
    """
    text, w = load.text, load.width
    scores, pairs = load.rows * text.num_experts, load.rows * text.top_k_experts
    at = f"{layer_name(layer)}.router.proj.weight"
    made = product(load, at, (text.num_experts, text.hidden_size), load.rows)
    if fused:
        return made + passes(scores, w) + passes(pairs, 6 * 4)
    return made + passes(scores, widen(load) + 8 + 8 + 12 + 16) + passes(pairs, 12 + 12 + 4 + 12 + 12 + 16 + 8 + 24 + 8)


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
