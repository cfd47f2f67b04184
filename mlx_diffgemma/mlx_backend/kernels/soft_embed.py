"""Soft embeddings from survivors alone: rows of the table weighted by probabilities, far smaller ones left out.

A row's survivors are the ids with a probability of at least e^-10 of its greatest; the others count as 0 and nothing is
renormalised. With p the probabilities and e the rows of the table

    |soft - dense| <= scale * max |e| * (the sum of p left out), and that sum is below V e^-10 max p:

1.2 % for max p = 0.001 and V = 262,144, and nothing where all ids are alike, for then they all survive.
"""

from __future__ import annotations

import mlx.core as mx

from ..linear import Dense, Linear, Quantized
from .head import REACH, Seen, odds_ops
from .launch import Kernel
from .logits import HEADER, SHAPE, Bias, Template, nothing, rounded, shape_inputs, shape_template, shaped, vector


def survivors_ops(
    logits: mx.array,
    cap: float | None,
    *,
    temperature: mx.array,
    bias: Bias | None,
    seen: Seen,
    table: Linear,
    skip: mx.array,
) -> mx.array:
    """[N, D] in the dtype of ``logits`` [N, V]: survivors' probabilities times their rows of ``table`` [V, D].

    ``seen`` is of ``look`` with the same arguments; rows with ``skip`` bool [N] are 0.
    """
    odds = odds_ops(logits, cap, temperature=temperature, bias=bias, seen=seen)
    low = rounded(shaped(logits, cap, temperature, bias), logits.dtype)
    near = low - seen.greatest[:, None] >= -REACH
    return table.combine(mx.where(near & ~skip[:, None], odds, 0).astype(odds.dtype))


# ---- kernel

THREADS = 128  # each with some neighbouring columns; a threadgroup has one row, and THREADS of its ids at a time
FORMATS = {"dense": 0, "affine": 1, "mxfp4": 2, "mxfp8": 3, "nvfp4": 4}
SIZES = (32, 64, 128)  # of groups of affine codes
TABLE_HEADER = (
    HEADER
    + """
constant constexpr int DENSE = 0, AFFINE = 1, MXFP8 = 3, NVFP4 = 4;

// Small floats, by their bits: as MLX decodes them, without numbers below the normal ones on the way.
METAL_FUNC float e2m1(uint code) {
    const uint size = code & 7;
    const float x = size < 2 ? 0.5f * size : as_type<float>(((size >> 1) + 126) << 23 | (size & 1) << 22);
    return code & 8 ? -x : x;
}

METAL_FUNC float e4m3(uint code) {
    const uint size = code & 127;
    const uint bits = size == 127 ? 0x7FC00000u : (size << 20) + (120u << 23);
    const float x = size < 8 ? float(size) * 0.001953125f : as_type<float>(bits);
    return code & 128 ? -x : x;
}

METAL_FUNC float e8m0(uint code) { return as_type<float>(code == 0 ? 0x00400000u : code << 23); }

template <int FORMAT> METAL_FUNC float number(uint code) { return FORMAT == MXFP8 ? e4m3(code) : e2m1(code); }

template <int FORMAT, typename S> METAL_FUNC float scale_of(S scale) {
    return FORMAT == AFFINE ? float(scale) : FORMAT == NVFP4 ? e4m3(uint(scale)) : e8m0(uint(scale));
}
"""
)
KERNEL = Kernel(
    name="survivors",
    inputs=(*SHAPE, "greatest", "total", "count", "ids", "skip", "weight", "scales", "biases", "row_scale"),
    outputs=("out",),
    source="""
    const uint row = threadgroup_position_in_grid.y, tid = thread_position_in_threadgroup.x;
    const uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    const uint column = thread_position_in_grid.x * PER;
    constexpr uint GROUPS = THREADS / 32;
    threadgroup uint which[THREADS];
    threadgroup float odds[THREADS];
    threadgroup uint bases[GROUPS];
    const auto added = values + row * KINDS;
    const float heat = temperature[row], limit = cap[0], most = greatest[row], whole = total[row];
    float sum[PER];
    UNROLLED for (uint e = 0; e < PER; e++) sum[e] = 0;

    // A row whose survivors are not listed has all its logits looked at. Ascending ids in any case.
    const bool listed = uint(count[row]) <= KEEP;
    const uint length = skip[row] ? 0 : listed ? uint(count[row]) : V;
    for (uint start = 0; start < length; start += THREADS) {
        const uint i = start + tid;
        uint id = 0;
        float p = 0;
        if (i < length) {
            id = listed ? uint(ids[size_t(row) * KEEP + i]) : i;
            const float raw = float(logits[size_t(row) * V + id]);
            const float y = rounded<T>(shaped<CAPPED, BIASED>(raw, id, limit, heat, classes, added));
            p = y - most >= -REACH ? float(T(metal::precise::exp(y - most) / whole)) : 0.0f;
        }
        uint place = simd_prefix_exclusive_sum(uint(p > 0));
        if (lane == 31) bases[group] = place + uint(p > 0);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint some = 0;
        for (uint j = 0; j < GROUPS; j++) {
            if (j == group) place += some;
            some += bases[j];
        }
        if (p > 0) {
            which[place] = id;
            odds[place] = p;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (column < D) {
            for (uint j = 0; j < some; j++) {
                const uint from = which[j];
                const float odd = odds[j];
                const size_t at = size_t(from) * D + column;
                if (FORMAT == DENSE) {
                    const Several<W, PER> loaded = *(const device Several<W, PER>*)(weight + at);
                    UNROLLED for (uint e = 0; e < PER; e++) sum[e] += odd * float(loaded.at[e]);
                    continue;
                }
                // One word of codes, the first in the lowest bits, all of one group.
                const uint word = uint(weight[at / PER]);
                const float scale = scale_of<FORMAT>(scales[at / SIZE]);
                const float bias = FORMAT == AFFINE ? float(biases[at / SIZE]) : 0;
                const float outer = ROWED ? row_scale[from] : 1;
                UNROLLED for (uint e = 0; e < PER; e++) {
                    const uint code = word >> (e * BITS) & ((1u << BITS) - 1);
                    const float x = FORMAT == AFFINE ? scale * float(code) + bias : number<FORMAT>(code) * scale;
                    sum[e] += odd * (ROWED ? x * outer : x);
                }
            }
        }
    }
    if (column >= D) return;
    Several<T, PER> made;
    UNROLLED for (uint e = 0; e < PER; e++) made.at[e] = T(sum[e]);
    *(device Several<T, PER>*)(out + size_t(row) * D + column) = made;
    """,
    header=TABLE_HEADER,
)


def gathers(table: Linear) -> str:
    """Why the kernel cannot read rows of this table; empty where it can."""
    if isinstance(table, Dense):
        return ""
    if not isinstance(table, Quantized):
        return f"a table of class {type(table).__name__}"
    if table.mode == "affine" and (table.bits not in (4, 8) or table.group_size not in SIZES):
        return f"affine codes of {table.bits} bits in groups of {table.group_size}"
    return "" if table.mode in FORMATS else f"codes of mode {table.mode}"


def survivors_kernel(
    logits: mx.array,
    cap: float | None,
    *,
    temperature: mx.array,
    bias: Bias | None,
    seen: Seen,
    table: Linear,
    skip: mx.array,
) -> mx.array:
    """As ``survivors_ops``; sums in float32 in the order of ids. ``seen`` has counted and listed survivors."""
    assert seen.count is not None and seen.ids is not None
    assert isinstance(table, Dense | Quantized) and not gathers(table)
    arrays, width, form = _stored(table)
    columns = vector(width) if isinstance(table, Dense) else 32 // table.bits
    threads = min(THREADS, -(-width // (32 * columns)) * 32)
    sizes: Template = {"KEEP": seen.ids.shape[1], "THREADS": threads, "D": width, "PER": columns}
    (out,) = KERNEL(
        logits,
        *shape_inputs(cap, temperature, bias),
        *(seen.greatest, seen.total, seen.count, seen.ids, skip),
        *arrays,
        template=shape_template(logits, cap, bias) | form | sizes,
        grid=(-(-width // (columns * threads)) * threads, len(logits), 1),
        threadgroup=(threads, 1, 1),
        shapes=[(len(logits), width)],
        dtypes=[logits.dtype],
    )
    return out


def _stored(table: Dense | Quantized) -> tuple[tuple[mx.array, ...], int, Template]:
    """The kernel's last four inputs, D, and what says how to read them."""
    if isinstance(table, Dense):
        form: Template = {"W": table.weight.dtype, "FORMAT": FORMATS["dense"], "SIZE": 1, "BITS": 8, "ROWED": False}
        return (table.weight, nothing(), nothing(), nothing()), table.weight.shape[1], form
    others = (nothing() if x is None else x for x in (table.biases, table.row_scale))
    form = {"W": table.weight.dtype, "FORMAT": FORMATS[table.mode], "SIZE": table.group_size, "BITS": table.bits}
    width = table.weight.shape[1] * 32 // table.bits
    return (table.weight, table.scales, *others), width, form | {"ROWED": table.row_scale is not None}
