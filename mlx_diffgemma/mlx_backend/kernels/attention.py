"""Attention of a canvas over two ranges of keys and values where they lie: the prefix's slots, and the canvas's own.

The kernel keeps the scores on the chip. Its threadgroup owns 32 queries of one key-value head (the query heads that
share it are stacked, so that each key is read once for all of them) and walks over the keys in tiles. A head dimension
of 512 is too much for the registers of one simdgroup, so every simdgroup owns 64 columns: of the queries, of the keys
(its part of each score; the parts are added through threadgroup memory, in order), of the values and of the result.
Thus a threadgroup reads every key and value once, straight into matrices. How many slots count is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .elementary import softmax
from .launch import Kernel

MOST_COLUMNS = 512


@dataclass(frozen=True)
class Visible:
    """What a canvas sees of the prefix in one kind of layer.

    Args:
        extent: slots of the prefix that any row may hold. Known without the device: shapes depend on it.
        held: int32 [B], slots that each row holds, from the first on; 0 to ``extent``.
        every: whether every row holds exactly ``extent``, so that nothing has to be masked.
    """

    extent: int
    held: mx.array
    every: bool


def canvas_attention_ops(
    q: mx.array, k: mx.array, v: mx.array, prefix_k: mx.array, prefix_v: mx.array, visible: Visible
) -> mx.array:
    """Every query sees the whole canvas and the slots of the prefix that its row holds. Scores are not scaled.

    q [B, H, C, d], query head h reads key-value head h // (H / K); k, v [B, K, C, d]; prefix_k, prefix_v [B, K, S, d]
    with S at least 1 and ``extent``. Returns [B, C, H d]. Rounds where the unfused path of
    ``mx.fast.scaled_dot_product_attention`` does: scores, then weights after a float32 softmax; scores are joined,
    keys and values are not.
    """
    rows, heads, canvas, dim = q.shape
    extent = visible.extent
    stacked = q.reshape(rows, k.shape[1], -1, dim)
    scores = stacked @ k.swapaxes(2, 3)
    if extent:
        past_k, past_v = prefix_k[:, :, :extent], prefix_v[:, :, :extent]
        past = stacked @ past_k.swapaxes(2, 3)
        if not visible.every:
            seen = mx.arange(extent) < visible.held[:, None, None, None]
            past = mx.where(seen, past, mx.array(-mx.inf, past.dtype))
        odds = softmax(mx.concatenate([past, scores], -1))
        out = mx.addmm(odds[..., extent:] @ v, odds[..., :extent], past_v)
    else:
        out = softmax(scores) @ v
    return out.reshape(rows, heads, canvas, dim).swapaxes(1, 2).flatten(2)


# ---- kernel

# A lane holds two neighbours of an 8 x 8 matrix, at (y, x) and (y, x + 1): the layout that MLX's own kernels rely on.
HEADER = """

// 8 x 8 of rows ``stride`` apart; rows from ``count`` on are not read, and zero.
template <typename T>
METAL_FUNC void load_rows(
    thread simdgroup_matrix<T, 8, 8>& to, const device T* from, int stride, int count, int y, int x) {
  if (count >= 8) {
    simdgroup_load(to, from, stride);
  } else {
    UNROLLED for (int e = 0; e < 2; e++) to.thread_elements()[e] = y < count ? from[y * stride + x + e] : T(0);
  }
}

// Its transpose: columns from ``count`` on are zero.
template <typename T>
METAL_FUNC void load_columns(
    thread simdgroup_matrix<T, 8, 8>& to, const device T* from, int stride, int count, int y, int x) {
  UNROLLED for (int e = 0; e < 2; e++) to.thread_elements()[e] = x + e < count ? from[(x + e) * stride + y] : T(0);
}
"""

SOURCE = """
    constexpr int ROWS = ROW_TILES * 8, KEYS = KEY_TILES * 8;
    constexpr int TILES = (D / 8 + SIMDS - 1) / SIMDS;  // of 8 columns, of one simdgroup
    constexpr bool EVEN = TILES * SIMDS * 8 == D;       // else the last simdgroups own fewer
    constexpr int PITCH = ROWS + 4, ODDS_PITCH = KEYS + 16 / sizeof(T);  // apart from each other's banks
    constexpr int SHARERS = SIMDS * 32 / ROWS;          // neighbouring threads that share a row of the softmax
    threadgroup float parts[SIMDS * KEYS * PITCH];      // of scores, [simdgroup, key, row]
    threadgroup T odds[ROWS * ODDS_PITCH];              // weights of one tile of keys, [row, key]
    threadgroup float shrink[ROWS];                     // by how much the rows so far weigh less
    threadgroup float norm[ROWS];

    const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
    const int y = ((lane / 4) & 4) + (lane / 2) % 4, x = ((lane / 4) & 2) * 2 + lane % 2 * 2;
    const int row = int(thread_index_in_threadgroup) / SHARERS, sharer = int(thread_index_in_threadgroup) % SHARERS;
    const int heads = q_shape[1], canvas = q_shape[2], groups = prefix_k_shape[1], slots = prefix_k_shape[2];
    const int rows = heads / groups * canvas;           // row r is query head r / canvas of this group
    const int batch = threadgroup_position_in_grid.z, group = threadgroup_position_in_grid.y;
    const int first = int(threadgroup_position_in_grid.x) * ROWS, column = simd * TILES * 8;

    simdgroup_matrix<T, 8, 8> query[ROW_TILES][TILES];  // transposed: scores are made as keys times queries
    simdgroup_matrix<float, 8, 8> sum[ROW_TILES][TILES];
    const device T* own_q = q + (size_t(batch * groups + group) * rows + first) * D + column;
    UNROLLED for (int i = 0; i < ROW_TILES; i++) {
        UNROLLED for (int j = 0; j < TILES; j++) {
            const bool inside = EVEN || column + j * 8 < D;
            load_columns(query[i][j], own_q + i * 8 * D + j * 8, D, inside ? rows - first - i * 8 : 0, y, x);
            sum[i][j] = simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }

    const int seen = held[batch];
    const int past = (seen + KEYS - 1) / KEYS, tiles = past + (canvas + KEYS - 1) / KEYS;
    float top = -INFINITY, total = 0.0f;
    for (int tile = 0; tile < tiles; tile++) {
        const bool own = tile >= past;
        const int start = (own ? tile - past : tile) * KEYS;
        const int count = min((own ? canvas : seen) - start, KEYS);
        const size_t at = (size_t(batch * groups + group) * (own ? canvas : slots) + start) * D + column;
        const device T* keys = (own ? k : prefix_k) + at;
        const device T* values = (own ? v : prefix_v) + at;

        for (int n = 0; n * 8 < count; n++) {
            simdgroup_matrix<float, 8, 8> score[ROW_TILES];
            UNROLLED for (int i = 0; i < ROW_TILES; i++) score[i] = simdgroup_matrix<float, 8, 8>(0.0f);
            UNROLLED for (int j = 0; j < TILES; j++) {
                if (!EVEN && column + j * 8 >= D) continue;
                simdgroup_matrix<T, 8, 8> key;
                load_rows(key, keys + n * 8 * D + j * 8, D, count - n * 8, y, x);
                UNROLLED for (int i = 0; i < ROW_TILES; i++)
                    simdgroup_multiply_accumulate(score[i], key, query[i][j], score[i]);
            }
            UNROLLED for (int i = 0; i < ROW_TILES; i++)
                simdgroup_store(score[i], parts + (simd * KEYS + n * 8) * PITCH + i * 8, PITCH);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        float score[KEYS / SHARERS];
        float greatest = top;
        UNROLLED for (int e = 0; e < KEYS / SHARERS; e++) {
            const int key = e * SHARERS + sharer;
            score[e] = key < count ? 0.0f : -INFINITY;
            if (key < count) {
                UNROLLED for (int s = 0; s < SIMDS; s++) score[e] += parts[(s * KEYS + key) * PITCH + row];
            }
            greatest = max(greatest, score[e]);
        }
        UNROLLED for (int s = 1; s < SHARERS; s *= 2) greatest = max(greatest, simd_shuffle_xor(greatest, ushort(s)));
        float more = 0.0f;
        UNROLLED for (int e = 0; e < KEYS / SHARERS; e++) {
            const float weight = metal::precise::exp(score[e] - greatest);
            odds[row * ODDS_PITCH + e * SHARERS + sharer] = T(weight);
            more += weight;
        }
        UNROLLED for (int s = 1; s < SHARERS; s *= 2) more += simd_shuffle_xor(more, ushort(s));
        const float less = metal::precise::exp(top - greatest);
        top = greatest;
        total = total * less + more;
        if (sharer == 0) shrink[row] = less;
        threadgroup_barrier(mem_flags::mem_threadgroup);

        UNROLLED for (int i = 0; i < ROW_TILES; i++) {
            const float factor = shrink[i * 8 + y];
            UNROLLED for (int j = 0; j < TILES; j++)
                UNROLLED for (int e = 0; e < 2; e++) sum[i][j].thread_elements()[e] *= factor;
        }
        for (int n = 0; n * 8 < count; n++) {
            simdgroup_matrix<T, 8, 8> weight[ROW_TILES];
            UNROLLED for (int i = 0; i < ROW_TILES; i++)
                simdgroup_load(weight[i], odds + i * 8 * ODDS_PITCH + n * 8, ODDS_PITCH);
            UNROLLED for (int j = 0; j < TILES; j++) {
                if (!EVEN && column + j * 8 >= D) continue;
                simdgroup_matrix<T, 8, 8> value;
                load_rows(value, values + n * 8 * D + j * 8, D, count - n * 8, y, x);
                UNROLLED for (int i = 0; i < ROW_TILES; i++)
                    simdgroup_multiply_accumulate(sum[i][j], weight[i], value, sum[i][j]);
            }
        }
    }

    if (sharer == 0) norm[row] = total;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLLED for (int i = 0; i < ROW_TILES; i++) {
        const int r = first + i * 8 + y;
        if (r >= rows) continue;
        const int head = group * (heads / groups) + r / canvas;
        device T* to = out + ((size_t(batch) * canvas + r % canvas) * heads + head) * D + column + x;
        UNROLLED for (int j = 0; j < TILES; j++) {
            if (!EVEN && column + j * 8 >= D) continue;
            UNROLLED for (int e = 0; e < 2; e++) to[j * 8 + e] = T(sum[i][j].thread_elements()[e] / norm[i * 8 + y]);
        }
    }
"""

KERNEL = Kernel(
    name="canvas_attention",
    inputs=("q", "k", "v", "prefix_k", "prefix_v", "held"),
    outputs=("out",),
    source=SOURCE,
    header=HEADER,
)


@dataclass(frozen=True)
class Tiling:
    """How a threadgroup is cut: ``simds`` simdgroups, ``rows`` queries, ``keys`` keys at a time."""

    simds: int
    rows: int
    keys: int


def tiling(dim: int, dtype: mx.Dtype) -> Tiling:
    """For head dimension ``dim``. At most 64 columns per simdgroup, whose number is a power of two.

    A lane holds, per 8 x 8 matrix, 2 floats of the result and 2 numbers of the queries: with 32 rows and 64 columns
    64 registers and, in 16 bits, 32. Of 128 that leaves 32. In float32, which is for tests, 16 rows make 64 and no
    more. The parts of the scores are ``simds * keys * rows`` floats of threadgroup memory, of which there are 32 KiB.
    """
    simds = next(n for n in (1, 2, 4, 8) if -(-dim // (8 * n)) <= 8)
    return Tiling(simds, 16 if dtype == mx.float32 else 32, 16 if simds == 8 else 32)


def canvas_attention_kernel(
    q: mx.array, k: mx.array, v: mx.array, prefix_k: mx.array, prefix_v: mx.array, visible: Visible
) -> mx.array:
    """As ``canvas_attention_ops``, with unrounded scores. d is a multiple of 8, at most 512; C and S are any."""
    batch, heads, canvas, dim = q.shape
    groups = k.shape[1]
    assert dim % 8 == 0 and dim <= MOST_COLUMNS and heads % groups == 0, (q.shape, k.shape)
    cut = tiling(dim, q.dtype)
    threads = cut.simds * 32
    (out,) = KERNEL(
        *(q, k, v, prefix_k, prefix_v, visible.held),
        template={"T": q.dtype, "D": dim, "SIMDS": cut.simds, "ROW_TILES": cut.rows // 8, "KEY_TILES": cut.keys // 8},
        grid=(-(-heads // groups * canvas // cut.rows) * threads, groups, batch),
        threadgroup=(threads, 1, 1),
        shapes=[(batch, canvas, heads * dim)],
        dtypes=[q.dtype],
    )
    return out
