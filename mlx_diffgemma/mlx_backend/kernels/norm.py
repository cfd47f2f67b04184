"""RMS norms of a layer and what stands between them: sums with the stream, the layer scalar, the router's input.

A norm is taken in float32 and multiplied by its float32 weight before it is rounded to the model's dtype; every sum
and product after that is rounded as well. Source: transformers 5.23, ``modeling_diffusion_gemma.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx

from .launch import Kernel


@dataclass(frozen=True)
class AfterAttention:
    """Weights of ``after_attention``: three norms, float32 [D], and the router's scale [D] in the model's dtype."""

    post_attention: mx.array
    pre_feedforward: mx.array
    pre_feedforward_2: mx.array
    router: mx.array


@dataclass(frozen=True)
class Parts:
    """The stream behind the attention and what the dense MLP, the experts and the router read of it.

    All [..., D] in the model's dtype.
    """

    stream: mx.array
    dense: mx.array
    experts: mx.array
    router: mx.array


@dataclass(frozen=True)
class AfterExperts:
    """Weights of ``after_experts``, float32 [D]: of the dense MLP's output, of the experts', of their sum."""

    dense: mx.array
    experts: mx.array
    both: mx.array


# ---- plain


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """In float32 with the product by the float32 weight, then rounded to the dtype of ``x``."""
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


def after_attention_ops(h: mx.array, attention: mx.array, weights: AfterAttention, eps: float) -> Parts:
    """``h``, the stream, and ``attention``, the output of ``o_proj``: [..., D], to the new stream and its norms."""
    stream = h + rms_norm(attention, weights.post_attention, eps)
    z = rms_norm(stream, None, eps) * weights.router
    # A Python factor would be rounded to bfloat16 first; torch multiplies by the float32 value.
    router = (z.astype(mx.float32) * h.shape[-1] ** -0.5).astype(h.dtype)
    dense, experts = (rms_norm(stream, w, eps) for w in (weights.pre_feedforward, weights.pre_feedforward_2))
    return Parts(stream, dense, experts, router)


def after_experts_ops(
    stream: mx.array,
    dense: mx.array,
    mixed: mx.array,
    weights: AfterExperts,
    scalar: mx.array,
    eps: float,
    following: mx.array,
) -> tuple[mx.array, mx.array]:
    """The stream behind the layer and its norm by ``following``, both [..., D].

    Args:
        stream, dense, mixed: [..., D], of the dense MLP and of the experts' sum.
        scalar: the layer's, [1] in the model's dtype.
        following: float32 [D], weight of the next layer's first norm or of the last one.
    """
    both = rms_norm(dense, weights.dense, eps) + rms_norm(mixed, weights.experts, eps)
    stream = (stream + rms_norm(both, weights.both, eps)) * scalar
    return stream, rms_norm(stream, following, eps)


# ---- kernels

MOST_THREADS = 384  # per row, which every pipeline takes; a thread holds three rows' worth of its pieces
PER_THREAD = 8  # values, where that gives no more threads than that: 352 threads at 2,816
HEADER = """
// N neighbouring values, read and written as one.
template <typename T, int N>
struct alignas(N * sizeof(T)) Piece {
  T of[N];
};

// The pieces of a row [WIDTH] that thread ``me`` holds, in float32: every one in THREADS. Zeros past the end.
template <int WIDTH, int PIECE, int THREADS, int HELD, typename T>
METAL_FUNC void load_row(thread float (&x)[HELD], const device T* row, uint me) {
  UNROLLED for (int i = 0; i < HELD; i += PIECE) {
    const int at = i * THREADS + int(me) * PIECE;
    Piece<T, PIECE> piece = {};
    if (at < WIDTH) piece = *(const device Piece<T, PIECE>*)(row + at);
    UNROLLED for (int j = 0; j < PIECE; j++) x[i + j] = float(piece.of[j]);
  }
}

template <int WIDTH, int PIECE, int THREADS, int HELD, typename T>
METAL_FUNC void store_row(device T* row, thread const float (&x)[HELD], uint me) {
  UNROLLED for (int i = 0; i < HELD; i += PIECE) {
    const int at = i * THREADS + int(me) * PIECE;
    Piece<T, PIECE> piece;
    UNROLLED for (int j = 0; j < PIECE; j++) piece.of[j] = T(x[i + j]);
    if (at < WIDTH) *(device Piece<T, PIECE>*)(row + at) = piece;
  }
}

template <typename T>
METAL_FUNC float rounded(float x) {
  return float(T(x));
}

// The sum of squares of a row: each simdgroup leaves its part in ``parts``; behind a barrier all add them up alike.
template <int HELD>
METAL_FUNC void leave_squares(threadgroup float* parts, thread const float (&x)[HELD], uint group, uint lane) {
  float sum = 0;
  UNROLLED for (int i = 0; i < HELD; i++) sum += x[i] * x[i];
  sum = metal::simd_sum(sum);
  if (lane == 0) parts[group] = sum;
}

template <int WIDTH, int SIMDGROUPS>
METAL_FUNC float inverse_rms(threadgroup const float* parts, float eps, uint lane) {
  const float sum = metal::simd_sum(int(lane) < SIMDGROUPS ? parts[lane] : 0.0f);
  return metal::precise::rsqrt(sum / float(WIDTH) + eps);
}
"""
# What both bodies begin with: a threadgroup takes a row, which its threads hold in registers.
HERE = """
    const uint me = thread_position_in_threadgroup.x;
    const uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    const size_t start = size_t(threadgroup_position_in_grid.y) * WIDTH;
    constexpr int HELD = (WIDTH + PIECE * THREADS - 1) / (PIECE * THREADS) * PIECE;
"""
AFTER_ATTENTION = Kernel(
    name="after_attention",
    inputs=("h", "attention", "post_attention", "pre_feedforward", "pre_feedforward_2", "scale", "numbers"),
    outputs=("stream", "dense", "experts", "router"),
    header=HEADER,
    # Weights are asked for before the barrier behind which they are needed.
    source=HERE
    + """
    const float eps = numbers[0], root = numbers[1];
    threadgroup float parts[2][32];  // one for each sum: nothing is overwritten that another may still read
    float x[HELD], y[HELD], a[HELD], b[HELD], c[HELD];
    load_row<WIDTH, PIECE, THREADS>(y, attention + start, me);
    load_row<WIDTH, PIECE, THREADS>(x, h + start, me);
    load_row<WIDTH, PIECE, THREADS>(a, post_attention, me);
    leave_squares(parts[0], y, group, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    const float attended = inverse_rms<WIDTH, THREADS / 32>(parts[0], eps, lane);
    UNROLLED for (int i = 0; i < HELD; i++) x[i] = rounded<T>(x[i] + rounded<T>(y[i] * attended * a[i]));
    store_row<WIDTH, PIECE, THREADS>(stream + start, x, me);
    load_row<WIDTH, PIECE, THREADS>(a, pre_feedforward, me);
    load_row<WIDTH, PIECE, THREADS>(b, pre_feedforward_2, me);
    load_row<WIDTH, PIECE, THREADS>(c, scale, me);
    leave_squares(parts[1], x, group, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    const float of_stream = inverse_rms<WIDTH, THREADS / 32>(parts[1], eps, lane);
    UNROLLED for (int i = 0; i < HELD; i++) {
      const float bare = x[i] * of_stream;
      a[i] = bare * a[i];
      b[i] = bare * b[i];
      c[i] = rounded<T>(rounded<T>(bare) * c[i]) * root;
    }
    store_row<WIDTH, PIECE, THREADS>(dense + start, a, me);
    store_row<WIDTH, PIECE, THREADS>(experts + start, b, me);
    store_row<WIDTH, PIECE, THREADS>(router + start, c, me);
    """,
)
AFTER_EXPERTS = Kernel(
    name="after_experts",
    inputs=("h", "dense", "mixed", "post_dense", "post_experts", "post_both", "scalar", "following", "numbers"),
    outputs=("stream", "normed"),
    header=HEADER,
    source=HERE
    + """
    const float eps = numbers[0], factor = float(scalar[0]);
    threadgroup float parts[4][32];
    float x[HELD], y[HELD], z[HELD], a[HELD], b[HELD];
    load_row<WIDTH, PIECE, THREADS>(y, dense + start, me);
    load_row<WIDTH, PIECE, THREADS>(z, mixed + start, me);
    load_row<WIDTH, PIECE, THREADS>(x, h + start, me);
    load_row<WIDTH, PIECE, THREADS>(a, post_dense, me);
    load_row<WIDTH, PIECE, THREADS>(b, post_experts, me);
    leave_squares(parts[0], y, group, lane);
    leave_squares(parts[1], z, group, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    const float of_dense = inverse_rms<WIDTH, THREADS / 32>(parts[0], eps, lane);
    const float of_experts = inverse_rms<WIDTH, THREADS / 32>(parts[1], eps, lane);
    UNROLLED for (int i = 0; i < HELD; i++)
      y[i] = rounded<T>(rounded<T>(y[i] * of_dense * a[i]) + rounded<T>(z[i] * of_experts * b[i]));
    load_row<WIDTH, PIECE, THREADS>(a, post_both, me);
    leave_squares(parts[2], y, group, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    const float of_both = inverse_rms<WIDTH, THREADS / 32>(parts[2], eps, lane);
    UNROLLED for (int i = 0; i < HELD; i++)
      x[i] = rounded<T>(rounded<T>(x[i] + rounded<T>(y[i] * of_both * a[i])) * factor);
    store_row<WIDTH, PIECE, THREADS>(stream + start, x, me);
    load_row<WIDTH, PIECE, THREADS>(b, following, me);
    leave_squares(parts[3], x, group, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    const float of_stream = inverse_rms<WIDTH, THREADS / 32>(parts[3], eps, lane);
    UNROLLED for (int i = 0; i < HELD; i++) x[i] = x[i] * of_stream * b[i];
    store_row<WIDTH, PIECE, THREADS>(normed + start, x, me);
    """,
)


def after_attention_kernel(h: mx.array, attention: mx.array, weights: AfterAttention, eps: float) -> Parts:
    """As ``after_attention_ops``. Every row is read once; two barriers."""
    vectors = (weights.post_attention, weights.pre_feedforward, weights.pre_feedforward_2, weights.router)
    return Parts(*over_rows(AFTER_ATTENTION, h, attention, *vectors, eps=eps))


def after_experts_kernel(
    stream: mx.array,
    dense: mx.array,
    mixed: mx.array,
    weights: AfterExperts,
    scalar: mx.array,
    eps: float,
    following: mx.array,
) -> tuple[mx.array, mx.array]:
    """As ``after_experts_ops``. Every row is read once; three barriers."""
    vectors = (weights.dense, weights.experts, weights.both, scalar, following)
    behind, normed = over_rows(AFTER_EXPERTS, stream, dense, mixed, *vectors, eps=eps)
    return behind, normed


def over_rows(kernel: Kernel, h: mx.array, *inputs: mx.array, eps: float) -> list[mx.array]:
    """A threadgroup per row of ``h`` [..., D]; all outputs have its shape and dtype."""
    width = h.shape[-1]
    assert width >= 8, "MLX hands smaller arrays over in another address space"
    piece = 4 if width % 4 == 0 else 1
    threads = row_threads(width, piece)
    return kernel(
        h,
        *inputs,
        numbers(eps, width),
        template={"T": h.dtype, "WIDTH": width, "PIECE": piece, "THREADS": threads},
        grid=(threads, h.size // width, 1),
        threadgroup=(threads, 1, 1),
        shapes=[h.shape] * len(kernel.outputs),
        dtypes=[h.dtype] * len(kernel.outputs),
    )


def row_threads(width: int, piece: int) -> int:
    """Whole simdgroups, of which the last is as full as can be: each thread takes equally many pieces, or one fewer."""
    pieces = width // piece
    each = max(PER_THREAD // piece, -(-pieces // MOST_THREADS))
    return -(-pieces // each // 32) * 32


@functools.cache
def numbers(eps: float, width: int) -> mx.array:
    """What the kernels take as run-time numbers, float32 [2]: eps, and the router's factor."""
    return mx.array([eps, width**-0.5])
