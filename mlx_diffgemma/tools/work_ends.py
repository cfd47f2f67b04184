"""Bytes and operations before and behind the layers, and the sum of a whole step; see ``work`` for what counts how."""

from __future__ import annotations

from collections.abc import Callable

from ..tensors import DECODER
from . import work_layers
from .work import Cost, Load, norm, passes, product

TABLE = f"{DECODER}.embed_tokens.weight"


def embedding(load: Load, fused: bool) -> Cost:
    """Rows of the table, unpacked and scaled; the soft embedding of the step before through its gated MLP, added."""
    hidden, w = load.text.hidden_size, load.width
    elements, row = load.rows * hidden, load.stored(TABLE, (load.text.vocab_size, hidden)) / load.text.vocab_size
    packed = TABLE in load.encodings
    rows = Cost(load.rows * 2 * row) + (passes(elements, row / hidden + 4) if packed else Cost())
    scaled = passes(elements, (4 if packed else w) + w)
    mixed = passes(elements, norm(load) + 3 * w + 2 * w)
    return rows + scaled + mixed + work_layers.gated(load, f"{DECODER}.self_conditioning")


def head(load: Load, fused: bool) -> Cost:
    """The logits in the model's dtype; the table is read once for every slice of rows."""
    shape = (load.text.vocab_size, load.text.hidden_size)
    again = (load.slices(fused) - 1) * load.stored(TABLE, shape)
    return product(load, TABLE, shape, load.read_rows) + Cost(again)


def vocabulary(load: Load, fused: bool) -> Cost:
    """What is read off the logits: argmax, draw, entropy, confidence.

    Plain, in float32, per logit: capped and divided by the temperature (w + 4), the maximum (4), shifted (8), its exp
    (8), sums of runs (4), the product for the entropy (8), argmax (4). The kernel reads each logit once.
    """
    logits = load.read_rows * load.text.vocab_size
    return passes(logits, load.width if fused else (load.width + 4) + 4 + 8 + 8 + 4 + 8 + 4)


def soft(load: Load, fused: bool) -> Cost:
    """The soft embedding. Dense: probabilities in the model's dtype, times the table, scaled.

    Plain bfloat16, per logit: rounded, and its exp (8), the sum (4), divided and rounded (4 + w); in float32 the
    weights at hand serve. The kernel reads a logit and writes a probability. Slices are scaled (2 w per feature) and
    joined. ``survivors``, with the kernel: ids, logits and rows of the table of the survivors, each row as often as it
    is gathered; in plain operations it saves nothing, and is counted as dense.
    """
    text, w = load.text, load.width
    rows, vocab, hidden = load.read_rows, text.vocab_size, text.hidden_size
    table = load.stored(TABLE, (vocab, hidden))
    if fused and load.self_conditioning == "survivors":
        found = rows * min(load.survivors, vocab)
        return Cost(found * (4 + w + table / vocab) + rows * hidden * w, 2 * found * hidden)
    made = Cost(load.slices(fused) * table + rows * (vocab + hidden) * w, 2 * rows * vocab * hidden)
    odds = 2 * w if fused else 0 if w == 4 else 8 + 4 + (4 + w)
    joined = 2 * w if load.slices(fused) > 1 else 0
    return made + passes(rows * vocab, odds) + passes(rows * hidden, 2 * w + joined)


def sampler(load: Load, fused: bool) -> Cost:
    """Ranks of entropies by comparing all pairs of positions, then some 30 small arrays [B, C] of 4 bytes."""
    return passes(load.rows * load.config.canvas_length, 2) + passes(load.rows, 30 * 4)


LAYERS: dict[str, Callable[[Load, int, bool], Cost]] = {
    "q, k, v, o products": work_layers.projections,
    "q, k norm and RoPE": work_layers.heads,
    "canvas attention": work_layers.attention,
    "norms and residuals": work_layers.norms,
    "dense MLP": work_layers.dense_mlp,
    "router": work_layers.router,
    "experts": work_layers.experts,
    "un-sort, weigh, sum": work_layers.mixing,
}
BEFORE: dict[str, Callable[[Load, bool], Cost]] = {"embedding, conditioning": embedding}
BEHIND: dict[str, Callable[[Load, bool], Cost]] = {
    "head product": head,
    "vocabulary passes": vocabulary,
    "soft embedding": soft,
    "sampler": sampler,
}
PARTS = (*BEFORE, *LAYERS, *BEHIND)
VOCABULARY = ("head product", "vocabulary passes", "soft embedding")
TARGET = (*VOCABULARY, "canvas attention")  # what kernels are meant to relieve


def costs(load: Load, fused: bool) -> dict[str, Cost]:
    """Every part of a step, in the order in which they run."""
    found = {name: part(load, fused) for name, part in BEFORE.items()}
    for name, of_layer in LAYERS.items():
        found[name] = Cost()
        for layer in range(load.text.num_hidden_layers):
            found[name] += of_layer(load, layer, fused)
    return found | {name: part(load, fused) for name, part in BEHIND.items()}


def total(found: dict[str, Cost], parts: tuple[str, ...] = PARTS) -> Cost:
    return sum((found[part] for part in parts), Cost())


def joined(load: Load) -> float:
    """Bytes that a step would move if it joined every layer's prefix and canvas into new arrays, as others do. Neither
    version here copies a prefix, for attention reads the two where they are; plain operations join scores instead."""
    text, moved = load.text, 0
    for layer, (heads, dim) in enumerate(zip(text.num_key_value_heads, text.head_dims, strict=True)):
        prefix = work_layers.visible(load, layer)
        moved += 2 * load.batch * (prefix + load.config.canvas_length) * heads * dim
    return 2 * load.width * moved
