"""From router scores to routes, and from what the experts made back to tokens. MLX's gather products stand between.

A pair is one token at one of its experts; pair n * k + j is token n at its j-th best. Pairs are sorted by expert, so
that each expert's weights are read once for all its tokens.

Source: transformers 5.23, ``modeling_diffusion_gemma.py``, ``DiffusionGemmaTextRouter`` and its experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .launch import Kernel

SIMDGROUPS = 16  # of the one threadgroup that makes routes, where its counters fit; not every pipeline takes 32
COUNTERS = 7168  # of 4 bytes, one per simdgroup and expert: 28 KiB of the 32
MOST_EXPERTS = 512  # one lane keeps 16 scores in registers
MOST_CHOSEN = 32  # one to a lane
THREADS = 128
LOAD_BYTES = 16

ROUTE = Kernel(
    name="route",
    inputs=("scores", "per_expert_scale"),
    outputs=("weight", "chosen", "expert", "token", "place"),
    header="""
    // Rises with x; 0 is free for what is taken. -0 is 0, and no number is the greatest.
    METAL_FUNC uint rising(float x) {
        const uint bits = as_type<uint>(x), size = bits & 0x7FFFFFFFu;
        if (size > 0x7F800000u) return 0xFFFFFFFFu;
        if (size == 0) return 0x80000000u;
        return bits >> 31 ? ~bits : bits | 0x80000000u;
    }
    METAL_FUNC float value_of(uint key) { return as_type<float>(key >> 31 ? key ^ 0x80000000u : ~key); }
    """,
    source="""
    threadgroup uint counts[SEGMENTS * E];
    threadgroup uint starts[E];
    constexpr uint OWN = (E + 31) / 32;
    const uint lane = thread_index_in_simdgroup, segment = simdgroup_index_in_threadgroup;
    // One simdgroup takes one run of rows, so that those before it in the sort are those of the simdgroups before it.
    const uint rows = scores_shape[0], share = (rows + SEGMENTS - 1) / SEGMENTS;
    const uint first = metal::min(segment * share, rows), last = metal::min(first + share, rows);
    threadgroup uint* mine = counts + segment * E;
    for (uint e = lane; e < E; e += 32) mine[e] = 0;
    simdgroup_barrier(mem_flags::mem_threadgroup);

    for (uint n = first; n < last; ++n) {
        float score[OWN];
        uint key[OWN];
        UNROLLED for (uint i = 0; i < OWN; ++i) {
            const uint e = lane + 32 * i;
            // Past the end it loses to every expert, all ids being lower.
            score[i] = e < E ? float(scores[size_t(n) * E + e]) : -INFINITY;
            key[i] = rising(score[i]);
        }
        uint best = 0, taken = 0, taken_key = 0;  // lane j remembers the j-th
        for (uint j = 0; j < K; ++j) {
            uint high = 0, at = 0;
            UNROLLED for (uint i = 0; i < OWN; ++i) {
                if (key[i] > high) { high = key[i]; at = lane + 32 * i; }
            }
            const uint greatest = simd_max(high);
            const uint lowest = simd_min(high == greatest ? at : uint(E));
            if (j == 0) best = greatest;
            if (lane == j) { taken = lowest; taken_key = greatest; }
            UNROLLED for (uint i = 0; i < OWN; ++i) {
                if (lane + 32 * i == lowest) key[i] = 0;
            }
        }
        float part = 0;
        UNROLLED for (uint i = 0; i < OWN; ++i) part += metal::precise::exp(score[i] - value_of(best));
        const float total = simd_sum(part);
        const float odds = lane < K ? metal::precise::exp(value_of(taken_key) - value_of(best)) / total : 0.0f;
        const float kept = simd_sum(odds);
        if (lane < K) {
            weight[size_t(n) * K + lane] = odds / kept * per_expert_scale[taken];
            chosen[size_t(n) * K + lane] = taken;
            mine[taken] += 1;  // a row's experts differ, so no two lanes count at one place
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Of each expert: how many pairs the simdgroups before have, and how many there are.
    for (uint e = thread_index_in_threadgroup; e < E; e += 32 * SEGMENTS) {
        uint sum = 0;
        for (uint s = 0; s < SEGMENTS; ++s) {
            const uint count = counts[s * E + e];
            counts[s * E + e] = sum;
            sum += count;
        }
        starts[e] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (segment == 0) {
        uint sum = 0;
        for (uint e = lane * OWN; e < metal::min((lane + 1) * OWN, uint(E)); ++e) sum += starts[e];
        uint start = simd_prefix_exclusive_sum(sum);
        for (uint e = lane * OWN; e < metal::min((lane + 1) * OWN, uint(E)); ++e) {
            const uint count = starts[e];
            starts[e] = start;
            start += count;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (uint n = first; n < last; ++n) {
        if (lane < K) {
            const size_t pair = size_t(n) * K + lane;
            const uint e = chosen[pair];  // written by this very thread
            const uint to = starts[e] + mine[e];
            mine[e] += 1;
            expert[to] = e;
            token[to] = n;
            place[pair] = to;
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    """,
)

GATHER_SUM = Kernel(
    name="gather_sum",
    inputs=("pairs", "weight", "place"),
    outputs=("out",),
    header="""
    template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T values[N]; };
    """,
    source="""
    const uint column = thread_position_in_grid.x * WIDE, n = thread_position_in_grid.y;
    if (column >= D) return;
    float sum[WIDE] = {};
    for (uint j = 0; j < K; ++j) {
        const float w = weight[size_t(n) * K + j];
        const size_t at = size_t(place[size_t(n) * K + j]) * D + column;
        const Pack<T, WIDE> row = *(const device Pack<T, WIDE>*)(pairs + at);
        UNROLLED for (uint i = 0; i < WIDE; ++i) sum[i] += w * float(row.values[i]);
    }
    Pack<O, WIDE> rounded;
    UNROLLED for (uint i = 0; i < WIDE; ++i) rounded.values[i] = O(sum[i]);
    *(device Pack<O, WIDE>*)(out + size_t(n) * D + column) = rounded;
    """,
)


@dataclass(frozen=True)
class Routes:
    """Where N tokens go: k of E experts each.

    Args:
        weight: float32 [N, k].
        chosen: uint32 [N, k], best first; of equals the lowest first.
        expert: uint32 [N * k], the expert of each pair in sorted order, ascending.
        token: uint32 [N * k], the row that each of these pairs reads; those of one expert ascending.
        place: uint32 [N, k], where pair (n, j) stands in sorted order.
    """

    weight: mx.array
    chosen: mx.array
    expert: mx.array
    token: mx.array
    place: mx.array


def odds_of(scores: mx.array) -> mx.array:
    """Probabilities of all experts, float32 [N, E], of scores [N, E] in any float dtype."""
    return mx.softmax(scores.astype(mx.float32), -1, precise=True)


def route_ops(scores: mx.array, per_expert_scale: mx.array, k: int) -> Routes:
    """Routes of router scores [N, E] in any float dtype; ``per_expert_scale`` is float32 [E].

    Softmax over all experts in float32; the weights of a token's ``k`` sum to 1 before each expert's own scale, so they
    need not sum to 1 after it. Scores are sorted, not probabilities, which can be equal where scores are not.
    """
    chosen = _best(scores.astype(mx.float32), k)
    weight = mx.take_along_axis(odds_of(scores), chosen, -1)
    weight = weight / weight.sum(-1, keepdims=True) * per_expert_scale[chosen]
    # No two keys are equal, so the order does not rest on MLX's sort being stable.
    pairs = chosen.size
    key = mx.sort(chosen.flatten() * pairs + mx.arange(pairs, dtype=mx.uint32))
    pair = key % pairs
    return Routes(weight, chosen, key // pairs, pair // k, mx.argsort(pair).reshape(chosen.shape))


def route_kernel(scores: mx.array, per_expert_scale: mx.array, k: int) -> Routes:
    """As ``route_ops``, in one launch of one threadgroup, for any N.

    Sorting needs the choices of all rows, and threadgroups cannot wait for each other. Each simdgroup takes one run of
    rows, finds a row's best by k rounds of maximum over its lanes, and counts them by expert; sums over these counts
    say where its pairs of each expert begin, and it places them in their order. All of that is integers, so the order
    of threads cannot show.

    Cost, by reasoning: a simdgroup spends about 400 instructions on a row of 128 scores with k = 8. That is 0.1 million
    for the 256 rows of a canvas, 4 a cycle on the one core that works on them: 20 to 40 microseconds, where the plain
    version starts 30 kernels. For a chunk of 4,096 rows it is 0.3 ms, where the experts' products take 30 ms.
    """
    rows, experts = scores.shape
    if experts > MOST_EXPERTS or k > min(experts, MOST_CHOSEN):
        raise ValueError(f"the route kernel takes {MOST_EXPERTS} experts and {MOST_CHOSEN} chosen: {experts=}, {k=}")
    segments = min(SIMDGROUPS, (COUNTERS - experts) // experts)
    pairs = rows * k
    weight, chosen, expert, token, place = ROUTE(
        scores,
        per_expert_scale,
        template={"T": scores.dtype, "E": experts, "K": k, "SEGMENTS": segments},
        grid=(32 * segments, 1, 1),
        threadgroup=(32 * segments, 1, 1),
        shapes=[(rows, k), (rows, k), (pairs,), (pairs,), (rows, k)],
        dtypes=[mx.float32, mx.uint32, mx.uint32, mx.uint32, mx.uint32],
    )
    return Routes(weight, chosen, expert, token, place)


def _best(scores: mx.array, k: int) -> mx.array:
    """The ``k`` experts of the highest float32 scores [N, E], uint32 [N, k]: of equals the lowest, no number first."""
    # -0 is 0, and no number has one encoding. Then the bits of a float, read as an integer, rise with it; those of
    # negative numbers fall, and are turned.
    bits = mx.where(scores == 0, 0.0, mx.where(mx.isnan(scores), mx.nan, scores)).view(mx.int32)
    falling = -1 - (bits ^ ((bits >> 31) & 0x7FFFFFFF))  # ~ in a form that can be exported
    key = (falling.astype(mx.int64) << 32) | mx.arange(scores.shape[1], dtype=mx.int64)
    return (mx.sort(key)[:, :k] & 0xFFFFFFFF).astype(mx.uint32)


def gather_sum_ops(out: mx.array, routes: Routes, dtype: mx.Dtype) -> mx.array:
    """Weighted sum of the experts' rows ``out`` [N * k, D], in sorted order: [N, D] of ``dtype``.

    The sum is float32 and rounded once; the kernel adds in the order of ``routes.chosen``.
    """
    return (out[routes.place].astype(mx.float32) * routes.weight[..., None]).sum(1).astype(dtype)


def gather_sum_kernel(out: mx.array, routes: Routes, dtype: mx.Dtype) -> mx.array:
    """As ``gather_sum_ops``: un-sort, weighting and sum in one pass, each row read once and nothing else written.

    At the real size that is 13 MB per canvas and layer; the plain version's gather, product and sum move 88 MB.
    """
    rows, k = routes.chosen.shape
    width = out.shape[-1]
    assert out.size >= 8, "MLX hands such small inputs over in another address space"
    # The widest aligned load that divides a row. An array starts aligned unless it is a part of another.
    wide = LOAD_BYTES // max(out.dtype.size, dtype.size)
    while width % wide:
        wide //= 2
    threads = min(THREADS, -(-width // wide // 32) * 32)
    (summed,) = GATHER_SUM(
        out,
        routes.weight,
        routes.place,
        template={"T": out.dtype, "O": dtype, "D": width, "K": k, "WIDE": wide},
        grid=(-(-width // wide // threads) * threads, rows, 1),
        threadgroup=(threads, 1, 1),
        shapes=[(rows, width)],
        dtypes=[dtype],
    )
    return summed
