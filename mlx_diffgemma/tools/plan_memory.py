"""What a model takes in MLX, added up from shapes: weights, cache, and what is alive at once in a step.

Weights and cache are exact, the tests say so against MLX's own count. Activations and logits are bounds, counted
operation by operation as if nothing were freed before its part of the layer is over.
"""

from __future__ import annotations

from ..memory import MemoryPlan
from ..tensors import VISION, Tensor, tensor_table
from .work import LEAST_SLOTS, SLICE_BYTES, SLICE_ELEMENTS, Load, rounded_up
from .work_ends import TABLE

CHUNK = 512  # tokens of a row that are read together
NOISE = 8 * 48  # bytes per position: what is drawn and what a rejected position becomes, for 48 steps


def memory_plan(load: Load, fused: bool, tokens: int | None = None) -> MemoryPlan:
    """Of ``load``, with kernels or without; ``tokens`` of prompt and answer are what the cache holds."""
    tokens = load.prompt if tokens is None else tokens
    held = weights(load)
    parts = {
        "weights": sum(held.values()) - held[TABLE],
        "embedding": held[TABLE],
        "cache": cache(load, tokens),
        "activations": activations(load, fused, tokens),
        "logits": logits(load, fused),
    }
    return MemoryPlan(parts, tokens, load.batch)


def weights(load: Load) -> dict[str, int]:
    """Bytes by tensor, without the vision tower. What enters float32 arithmetic is float32."""
    return {row.name: held(row, load) for row in tensor_table(load.config).values() if row.role not in VISION}


def held(row: Tensor, load: Load) -> int:
    if len(row.shape) > 1:
        return load.stored(row.name, row.shape)
    wide = row.role == "norm" or row.name.endswith("per_expert_scale")
    return row.size * (4 if wide else load.width)


def cache(load: Load, tokens: int) -> int:
    """Keys and values of all rows, in the buffers that reading ``tokens`` at once makes."""
    text, slots = load.text, 0
    for layer, (heads, dim) in enumerate(zip(text.num_key_value_heads, text.head_dims, strict=True)):
        slots += 2 * heads * dim * capacity(tokens, None if text.full(layer) else text.window_keys)
    return load.batch * load.width * slots


def capacity(tokens: int, ring: int | None) -> int:
    """Slots of a layer's buffer: a new one is doubled at least once if it is too small, and a ring stops growing."""
    whole = max(rounded_up(tokens), 2 * LEAST_SLOTS) if tokens > LEAST_SLOTS else LEAST_SLOTS
    return whole if ring is None else min(whole, ring)


def activations(load: Load, fused: bool, tokens: int) -> int:
    """The larger of a chunk of the prompt and a step, each with its widest part of a layer."""
    chunk = load.batch * min(tokens, CHUNK)
    reading = _layer(load, fused, chunk) + _attention(load, fused, chunk, tokens, reading=True)
    step = load.rows
    own = step * (NOISE + 8 * load.config.canvas_length + 3 * load.width * load.text.hidden_size)
    canvas = rounded_up(tokens) + load.config.canvas_length
    return max(reading, _layer(load, fused, step) + _attention(load, fused, step, canvas, reading=False) + own)


def logits(load: Load, fused: bool) -> int:
    """A slice over the vocabulary: with kernels its logits and probabilities in the model's dtype; plain, the float32
    arrays of a read (shaped, shifted, weights, probabilities twice) beside them."""
    vocab, w = load.text.vocab_size, load.width
    if fused:
        return min(load.read_rows, max(1, SLICE_BYTES // (vocab * w))) * vocab * 2 * w
    return min(load.read_rows, max(1, SLICE_ELEMENTS // vocab)) * vocab * (2 * w + 5 * 4)


def _layer(load: Load, fused: bool, rows: int) -> int:
    """Around the attention, the dense MLP or the experts, for ``rows`` tokens."""
    text, w = load.text, load.width
    hidden, wide = text.hidden_size, text.moe_intermediate_size
    stream = hidden * (6 * w if fused else 6 * w + 3 * 4)
    dense = 4 * w * text.intermediate_size
    kept, made = (2 * w, 3 * w) if fused else (3 * w + 2 * 4, 5 * w)
    experts = text.top_k_experts * (hidden * kept + wide * made + 32) + text.num_experts * (w + 4 * 4)
    return rows * (stream + max(dense, experts))


def _attention(load: Load, fused: bool, rows: int, seen: int, *, reading: bool) -> int:
    """Heads as projected, widened, normed and turned; scores, joined ones and their softmax, which the kernel does not
    keep; while reading, a sliding layer joins its window and the chunk."""
    text, w, most = load.text, load.width, 0
    for layer, (heads, dim) in enumerate(zip(text.num_key_value_heads, text.head_dims, strict=True)):
        queries, keys = text.num_attention_heads * dim, heads * dim
        per_row = (queries + 2 * keys) * (2 * w if fused else 4 * w + 2 * 4)
        own = rows // load.batch
        span = seen if text.full(layer) else min(seen, text.window_keys + own)
        scores = 0 if fused and not reading else rows * text.num_attention_heads * span * (3 * w + 1)
        joined = 2 * load.batch * span * keys * w if reading else 0
        most = max(most, rows * per_row + scores + joined)
    return most
