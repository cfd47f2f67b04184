"""The Metal text of ``head.look_kernel``: one threadgroup of GROUPS simdgroups per row of logits.

Every logit is read from memory once, coalesced. Of each span of SPAN ids its greatest y and its sum of weights stay in
threadgroup memory, so that the draw looks again at one span only and the survivors at those that have some. Which
simdgroup takes which span, and the order of every sum, is fixed.
"""

from __future__ import annotations

from .logits import HEADER

LOOK_HEADER = (
    HEADER
    + """
// y of the span from ``start``: of SPAN ids this lane gets VEC in a row, 32 * VEC further on the next, and so on.
template <typename T, int V, int SPAN, int VEC, bool CAPPED, bool BIASED, typename C, typename W>
METAL_FUNC void span_of(
    thread float* y, const device T* x, uint start, uint lane, float cap, float temperature, C classes, W values
) {
    UNROLLED for (uint step = 0; step < SPAN / (32 * VEC); step++) {
        const uint id = start + (step * 32 + lane) * VEC;
        if (id < V) {
            const Several<T, VEC> loaded = *(const device Several<T, VEC>*)(x + id);
            UNROLLED for (uint e = 0; e < VEC; e++)
                y[step * VEC + e] =
                    shaped<CAPPED, BIASED>(float(loaded.at[e]), id + e, cap, temperature, classes, values);
        } else {
            UNROLLED for (uint e = 0; e < VEC; e++) y[step * VEC + e] = -INFINITY;
        }
    }
}
"""
)
WEIGH = """
    const uint row = threadgroup_position_in_grid.x, tid = thread_position_in_threadgroup.x;
    const uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    constexpr uint STEPS = SPAN / (32 * VEC), ITEMS = SPAN / 32, THREADS = 32 * GROUPS;
    constexpr uint EACH = (SPANS + THREADS - 1) / THREADS;
    threadgroup float peak[SPANS];
    threadgroup float about[SPANS];
    threadgroup float sums[SPANS];  // of exp(y - about)
    threadgroup float tops[GROUPS];
    threadgroup float masses[GROUPS];
    threadgroup float moments[GROUPS];
    threadgroup float low_masses[GROUPS];
    threadgroup uint bests[GROUPS];
    const device T* x = logits + size_t(row) * V;
    const auto added = values + row * KINDS;
    const float heat = temperature[row], limit = cap[0];
    float y[ITEMS];

    // Sums are about ``top``, the greatest so far, and are moved along with it.
    float top = LOWEST, low_top = rounded<T>(LOWEST), mass = 0, moment = 0, low_mass = 0;
    uint best = NONE;
    for (uint span = group; span < SPANS; span += GROUPS) {
        span_of<T, V, SPAN, VEC, CAPPED, BIASED>(y, x, span * SPAN, lane, limit, heat, classes, added);
        float high = y[0];
        UNROLLED for (uint i = 1; i < ITEMS; i++) high = metal::max(high, y[i]);
        high = simd_max(high);
        if (high > top || span == group) {
            const float moved = near(top - high), scale = weight_of(moved);
            moment = scale * (moment + mass * moved);
            mass *= scale;
            const float low_high = rounded<T>(high);
            low_mass *= weight_of(low_top - low_high);
            top = high;
            low_top = low_high;
            uint id = NONE;
            UNROLLED for (uint i = ITEMS; i-- > 0;)
                if (y[i] == high) id = span * SPAN + (i / VEC * 32 + lane) * VEC + i % VEC;
            best = simd_min(id);
        }
        float here = 0;
        UNROLLED for (uint i = 0; i < ITEMS; i++) {
            const float shifted = near(y[i] - top), weight = metal::precise::exp(shifted);
            here += weight;
            moment += weight * shifted;
            if (!metal::is_same_v<T, float>) low_mass += weight_of(rounded<T>(y[i]) - low_top);
        }
        mass += here;
        here = simd_sum(here);
        if (lane == 0) {
            peak[span] = high;
            about[span] = top;
            sums[span] = here;
        }
    }
    mass = simd_sum(mass);
    moment = simd_sum(moment);
    low_mass = simd_sum(low_mass);
    if (lane == 0) {
        tops[group] = top;
        masses[group] = mass;
        moments[group] = moment;
        low_masses[group] = low_mass;
        bests[group] = best;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float most = tops[0];
    for (uint i = 1; i < GROUPS; i++) most = metal::max(most, tops[i]);
    const float low_most = rounded<T>(most);
    if (group == 0) {
        const bool mine = lane < GROUPS;
        const float its = mine ? tops[lane] : LOWEST;
        const float moved = near(its - most), scale = mine ? weight_of(moved) : 0.0f;
        const float whole = simd_sum(mine ? masses[lane] * scale : 0.0f);
        const float spread = simd_sum(mine ? (moments[lane] + masses[lane] * moved) * scale : 0.0f);
        const float low = simd_sum(mine ? low_masses[lane] * weight_of(rounded<T>(its) - low_most) : 0.0f);
        const uint id = simd_min(mine && its == most ? bests[lane] : NONE);
        if (lane == 0) {
            argmax[row] = int(metal::min(id, uint(V - 1)));
            entropy[row] = metal::precise::log(whole) - spread / whole;
            confidence[row] = 1.0f / whole;
            greatest[row] = low_most;
            total[row] = metal::is_same_v<T, float> ? whole : low;
        }
    }
"""
# The span in which the cumulated weight passes the target, then the place in it. Each thread has EACH spans in a row.
DRAW = """
    threadgroup float bases[GROUPS];
    threadgroup uint firsts[GROUPS];
    threadgroup float shares[GROUPS];
    threadgroup int lasts[GROUPS];
    float own = 0;
    for (uint i = 0; i < EACH; i++) {
        const uint span = tid * EACH + i;
        if (span < SPANS) own += sums[span] * weight_of(about[span] - most);
    }
    float upto = simd_prefix_exclusive_sum(own);
    if (lane == 31) bases[group] = upto + own;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sum = 0;
    for (uint i = 0; i < GROUPS; i++) {
        if (i == group) upto += sum;
        sum += bases[i];
    }
    const float target = uniform[row] * sum;
    uint first = NONE;
    int last = -1;
    float share = 1;
    for (uint i = 0; i < EACH; i++) {
        const uint span = tid * EACH + i;
        const float weight = span < SPANS ? sums[span] * weight_of(about[span] - most) : 0.0f;
        if (weight > 0) {
            if (first == NONE && upto + weight > target) {
                first = span;
                share = metal::clamp((target - upto) / weight, 0.0f, 1.0f);
            }
            last = int(span);
        }
        upto += weight;
    }
    const uint found = simd_min(first);
    last = simd_max(last);
    if (found == NONE ? lane == 0 : first == found) {
        firsts[group] = found;
        shares[group] = share;
        lasts[group] = last;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 0) {
        uint chosen = NONE;
        int end = 0;
        share = 1;  // past all of them: the last weight there is
        for (uint i = GROUPS; i-- > 0;) {
            if (firsts[i] != NONE) {
                chosen = firsts[i];
                share = shares[i];
            }
            end = metal::max(end, lasts[i]);
        }
        if (chosen == NONE) chosen = uint(end);
        span_of<T, V, SPAN, VEC, CAPPED, BIASED>(y, x, chosen * SPAN, lane, limit, heat, classes, added);
        float inner = 0;
        UNROLLED for (uint i = 0; i < ITEMS; i++) {
            y[i] = weight_of(y[i] - peak[chosen]);
            inner += y[i];
        }
        const float inner_target = share * simd_sum(inner);
        float before = 0;
        uint id = NONE;
        int ending = -1;
        UNROLLED for (uint step = 0; step < STEPS; step++) {
            float lane_sum = 0;
            UNROLLED for (uint e = 0; e < VEC; e++) lane_sum += y[step * VEC + e];
            float at = before + simd_prefix_exclusive_sum(lane_sum);
            before += simd_sum(lane_sum);
            UNROLLED for (uint e = 0; e < VEC; e++) {
                const float weight = y[step * VEC + e];
                const uint here = chosen * SPAN + (step * 32 + lane) * VEC + e;
                at += weight;
                if (weight > 0) {
                    ending = int(here);
                    if (id == NONE && at > inner_target) id = here;
                }
            }
        }
        id = simd_min(id);
        ending = simd_max(ending);
        if (lane == 0) drawn[row] = metal::clamp(id == NONE ? ending : int(id), 0, V - 1);
    }
"""
# Only spans whose greatest survives are looked at again: to count, and if the list has room, to write.
SURVIVE = """
    threadgroup uint counts[SPANS];
    threadgroup uint count_bases[GROUPS];
    for (uint span = group; span < SPANS; span += GROUPS) {
        uint some = 0;
        if (rounded<T>(peak[span]) - low_most >= -REACH) {
            span_of<T, V, SPAN, VEC, CAPPED, BIASED>(y, x, span * SPAN, lane, limit, heat, classes, added);
            UNROLLED for (uint i = 0; i < ITEMS; i++) some += y[i] > -INFINITY && rounded<T>(y[i]) - low_most >= -REACH;
            some = simd_sum(some);
        }
        if (lane == 0) counts[span] = some;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint few = 0;
    for (uint i = 0; i < EACH; i++) few += tid * EACH + i < SPANS ? counts[tid * EACH + i] : 0;
    uint place = simd_prefix_exclusive_sum(few);
    if (lane == 31) count_bases[group] = place + few;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint all = 0;
    for (uint i = 0; i < GROUPS; i++) {
        if (i == group) place += all;
        all += count_bases[i];
    }
    for (uint i = 0; i < EACH; i++) {  // from how many a span has to where its first one goes
        const uint span = tid * EACH + i;
        if (span < SPANS) {
            const uint has = counts[span];
            counts[span] = place;
            place += has;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid == 0) count[row] = int(all);
    const uint listed = all <= KEEP ? all : 0;
    for (uint span = group; span < SPANS; span += GROUPS) {
        if (listed == 0 || rounded<T>(peak[span]) - low_most < -REACH) continue;
        span_of<T, V, SPAN, VEC, CAPPED, BIASED>(y, x, span * SPAN, lane, limit, heat, classes, added);
        uint to = counts[span];
        UNROLLED for (uint step = 0; step < STEPS; step++) {
            uint here = 0;
            UNROLLED for (uint e = 0; e < VEC; e++) {
                const float its = y[step * VEC + e];
                here |= uint(its > -INFINITY && rounded<T>(its) - low_most >= -REACH) << e;
            }
            uint at = to + simd_prefix_exclusive_sum(metal::popcount(here));
            to += simd_sum(metal::popcount(here));
            UNROLLED for (uint e = 0; e < VEC; e++)
                if (here >> e & 1) ids[size_t(row) * KEEP + at++] = int(span * SPAN + (step * 32 + lane) * VEC + e);
        }
    }
    for (uint i = listed + tid; i < KEEP; i += THREADS) ids[size_t(row) * KEEP + i] = -1;
"""
