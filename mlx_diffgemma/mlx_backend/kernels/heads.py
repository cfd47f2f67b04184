"""Queries, keys and values out of their products: normed head by head, turned (RoPE), heads before tokens.

The norm is rounded to the model's dtype, and every product and sum of the rotation as well: so does torch.
Source: transformers 5.23, ``modeling_diffusion_gemma.py``, ``DiffusionGemmaTextAttention``.
"""

from __future__ import annotations

import mlx.core as mx

from .launch import Kernel
from .norm import HEADER, numbers, rms_norm


def split_heads(x: mx.array, dim: int) -> mx.array:
    """[B, T, H * d] to [B, H, T, d]."""
    return x.reshape(*x.shape[:2], -1, dim).swapaxes(1, 2)


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """RoPE on [B, H, T, d]: element i pairs with i + d / 2; cos and sin [B or 1, 1, T, d / 2] serve both."""
    a, b = mx.split(x, 2, -1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def heads_ops(
    q: mx.array | None,
    k: mx.array,
    v: mx.array | None,
    q_norm: mx.array,
    k_norm: mx.array,
    cos: mx.array,
    sin: mx.array,
    eps: float,
) -> tuple[mx.array | None, mx.array, mx.array]:
    """Queries [B, H, T, d], or None without ``q``, keys and values [B, K, T, d].

    Args:
        q: [B, T, H * d].  k, v: [B, T, K * d]. Without ``v`` the values come of the raw ``k``, as in full layers.
        q_norm, k_norm: float32 [d]. Values have a norm without a weight.
        cos, sin: [B or 1, 1, T, d / 2] in the dtype of ``k``.
    """
    dim = k_norm.size
    raw = split_heads(k, dim)
    turned = rotate(rms_norm(raw, k_norm, eps), cos, sin)
    values = rms_norm(raw if v is None else split_heads(v, dim), None, eps)
    queries = None if q is None else rotate(rms_norm(split_heads(q, dim), q_norm, eps), cos, sin)
    return queries, turned, values


# ---- kernel

HEADS_PER_GROUP = 8  # a simdgroup takes one head of one token, so they share no more than cached cosines
SOURCE = """
    const uint lane = thread_position_in_grid.x, part = thread_position_in_grid.y;
    const uint length = cos_shape[2];
    const uint row = thread_position_in_grid.z, batch = row / length, token = row % length;
    constexpr int DIM = 2 * HALF, HELD = (HALF + PIECE * 32 - 1) / (PIECE * 32) * PIECE;
    // The heads of a token, one after another: queries, keys and, where they are not the raw keys, values.
    const bool query = part < HEADS, value = part >= HEADS + GROUPS;
    const uint head = query ? part : (part - HEADS) % GROUPS, count = query ? HEADS : GROUPS;
    const device T* raw = (query ? q : value ? v : k) + (size_t(row) * count + head) * DIM;
    const size_t there = ((size_t(batch) * count + head) * length + token) * DIM;
    const device float* norm = query ? q_norm : k_norm;
    const size_t turn = size_t(cos_shape[0] == 1 ? token : row) * HALF;
    float a[HELD], b[HELD], w_a[HELD], w_b[HELD], c[HELD], s[HELD];
    load_row<HALF, PIECE, 32>(a, raw, lane);
    load_row<HALF, PIECE, 32>(b, raw + HALF, lane);
    load_row<HALF, PIECE, 32>(w_a, norm, lane);  // asked for before the sum, behind which they are needed
    load_row<HALF, PIECE, 32>(w_b, norm + HALF, lane);
    load_row<HALF, PIECE, 32>(c, cos + turn, lane);
    load_row<HALF, PIECE, 32>(s, sin + turn, lane);
    float sum = 0;
    UNROLLED for (int i = 0; i < HELD; i++) sum += a[i] * a[i] + b[i] * b[i];
    const float inverse = metal::precise::rsqrt(metal::simd_sum(sum) / float(DIM) + numbers[0]);
    UNROLLED for (int i = 0; i < HELD; i++) {
      a[i] *= inverse;
      b[i] *= inverse;
    }
    if (value || (RAW_VALUES && !query)) {
      store_row<HALF, PIECE, 32>(values + there, a, lane);
      store_row<HALF, PIECE, 32>(values + there + HALF, b, lane);
    }
    if (value) return;
    UNROLLED for (int i = 0; i < HELD; i++) {
      const float x = rounded<T>(a[i] * w_a[i]), y = rounded<T>(b[i] * w_b[i]);
      a[i] = rounded<T>(x * c[i]) - rounded<T>(y * s[i]);
      b[i] = rounded<T>(y * c[i]) + rounded<T>(x * s[i]);
    }
    device T* to = (query ? queries : keys) + there;
    store_row<HALF, PIECE, 32>(to, a, lane);
    store_row<HALF, PIECE, 32>(to + HALF, b, lane);
"""
ALL = Kernel(
    name="heads",
    inputs=("q", "k", "v", "q_norm", "k_norm", "cos", "sin", "numbers"),
    outputs=("queries", "keys", "values"),
    source=SOURCE,
    header=HEADER,
)
KEYS_VALUES = Kernel(
    name="keys_values",
    inputs=("k", "v", "k_norm", "cos", "sin", "numbers"),
    outputs=("keys", "values"),
    # HEADS is 0, so these only stand for what there is not.
    source="""
    const device T* q = k;
    const device float* q_norm = k_norm;
    device T* queries = keys;
"""
    + SOURCE,
    header=HEADER,
)


def heads_kernel(
    q: mx.array | None,
    k: mx.array,
    v: mx.array | None,
    q_norm: mx.array,
    k_norm: mx.array,
    cos: mx.array,
    sin: mx.array,
    eps: float,
) -> tuple[mx.array | None, mx.array, mx.array]:
    """As ``heads_ops``. A simdgroup per head and token, so no barrier; the raw keys are read once for both."""
    batch, length, width = k.shape
    dim = k_norm.size
    groups, heads = width // dim, 0 if q is None else q.shape[-1] // dim
    assert dim % 2 == 0 and dim >= 16, "MLX hands arrays under 8 values over in another address space"
    assert cos.shape == sin.shape and cos.shape[0] in (1, batch) and cos.shape[1:] == (1, length, dim // 2)
    kernel = KEYS_VALUES if q is None else ALL
    given = {"q": q, "k": k, "v": k if v is None else v, "q_norm": q_norm, "k_norm": k_norm, "cos": cos, "sin": sin}
    given["numbers"] = numbers(eps, dim)
    shapes = [(batch, count, length, dim) for count in (heads, groups, groups) if count]
    parts = heads + (1 if v is None else 2) * groups
    made = kernel(
        *(x for name in kernel.inputs if (x := given[name]) is not None),
        template={
            "T": k.dtype,
            "HALF": dim // 2,
            "PIECE": 4 if dim % 8 == 0 else 1,
            "HEADS": heads,
            "GROUPS": groups,
            "RAW_VALUES": v is None,
        },
        grid=(32, parts, batch * length),
        threadgroup=(32, min(HEADS_PER_GROUP, parts), 1),
        shapes=shapes,
        dtypes=[k.dtype] * len(shapes),
    )
    return (None, made[0], made[1]) if q is None else (made[0], made[1], made[2])
