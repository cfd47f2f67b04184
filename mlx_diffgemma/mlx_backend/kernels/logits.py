"""From logits as the head made them to what a step looks at: y = (cap tanh(x / cap) + bias) / temperature, in float32.

x are logits in the model's dtype; bias is that of a position and a class of ids. ``HEADER`` has the same for kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...sampling.bans import LOWEST, NEVER, classes_of_bans
from .elementary import tanh

__all__ = [
    "HEADER",
    "LOWEST",
    "NEVER",
    "SHAPE",
    "Bias",
    "Template",
    "bias_of_bans",
    "nothing",
    "rounded",
    "shape_inputs",
    "shape_template",
    "shaped",
    "softcap",
    "vector",
]


# Pointers are template arguments where MLX decides, by the size of an array, which address space they are of.
HEADER = """
constant constexpr float FAR = -1000.0f;  // exp of it is 0
constant constexpr float LOWEST = -2e38f;
constant constexpr float REACH = 10.0f;
constant constexpr uint NONE = 0xFFFFFFFFu;

template <typename T, int COUNT> struct alignas(COUNT * sizeof(T)) Several { T at[COUNT]; };  // one load

// As everywhere here, a comparison and not max, which would hide what is not a number.
METAL_FUNC float finite(float y) { return y < LOWEST ? LOWEST : y; }

template <bool CAPPED, bool BIASED, typename C, typename W>
METAL_FUNC float shaped(float x, uint id, float cap, float temperature, C classes, W values) {
    const float y = CAPPED ? metal::precise::tanh(x / cap) * cap : x;
    return BIASED ? finite((y + values[classes[id]]) / temperature) : y / temperature;
}

template <typename T> METAL_FUNC float rounded(float y) { return metal::is_same_v<T, float> ? y : finite(float(T(y))); }

// Differences stop where their weight is 0, so that 0 times one is 0.
METAL_FUNC float near(float difference) { return difference < FAR ? FAR : difference; }

METAL_FUNC float weight_of(float difference) { return metal::precise::exp(difference); }
"""


@dataclass(frozen=True)
class Bias:
    """What is added to softcapped logits before the temperature: ``values[n, classes[v]]`` to id v of position n.

    Ids that are treated alike at every position form a class, so this takes V + N K numbers, not N V.

    Args:
        classes: uint8 or uint16 [V], each from 0 to K - 1.
        values: float32 [N, K]; ``NEVER`` forbids a class.
    """

    classes: mx.array
    values: mx.array

    def rows(self, at: slice | mx.array) -> Bias:
        return Bias(self.classes, self.values[at])


def bias_of_bans(bans: Sequence[tuple[Sequence[int], int]], length: int, vocab_size: int) -> Bias | None:
    """``classes_of_bans`` as arrays; ``None`` where nothing is banned."""
    found = classes_of_bans(bans, length, vocab_size)
    if found is None:
        return None
    classes, values = found
    return Bias(mx.array(classes.astype(np.uint8 if values.shape[1] <= 256 else np.uint16)), mx.array(values))


def softcap(raw: mx.array, cap: float | None) -> mx.array:
    return raw if cap is None else tanh(raw / cap) * cap


def shaped(logits: mx.array, cap: float | None, temperature: mx.array, bias: Bias | None) -> mx.array:
    """y float32 [N, V] of ``logits`` [N, V] with ``temperature`` float32 [N]."""
    y = softcap(logits.astype(mx.float32), cap)
    if bias is None:
        return y / temperature[:, None]
    return mx.maximum((y + bias.values[:, bias.classes.astype(mx.int32)]) / temperature[:, None], LOWEST)


def rounded(y: mx.array, dtype: mx.Dtype) -> mx.array:
    """y as ``dtype`` has it, float32; finite where float16 has no such number."""
    return y if dtype == mx.float32 else mx.maximum(y.astype(dtype).astype(mx.float32), LOWEST)


# ---- arguments of kernels

Template = dict[str, mx.Dtype | int | bool]
SHAPE = ("logits", "cap", "temperature", "classes", "values")


def shape_inputs(cap: float | None, temperature: mx.array, bias: Bias | None) -> tuple[mx.array, ...]:
    """What ``SHAPE`` names, but the logits."""
    added = (nothing(), temperature) if bias is None else (bias.classes, bias.values)
    return (_constant(1.0 if cap is None else cap), temperature, *added)


def shape_template(logits: mx.array, cap: float | None, bias: Bias | None) -> Template:
    """T, V, VEC, CAPPED, BIASED, KINDS (classes of the bias)."""
    vocab, kinds = logits.shape[-1], 0 if bias is None else bias.values.shape[1]
    made: Template = {"T": logits.dtype, "V": vocab, "VEC": vector(vocab)}
    return made | {"CAPPED": cap is not None, "BIASED": bias is not None, "KINDS": kinds}


def vector(width: int) -> int:
    """How many neighbours of a row of ``width`` one load takes: rows must start where such a load may."""
    return 4 if width % 4 == 0 else 1


@functools.cache
def _constant(value: float) -> mx.array:
    return mx.array([value], dtype=mx.float32)


@functools.cache
def nothing() -> mx.array:
    """For an input that is not there."""
    return mx.array([0], dtype=mx.uint8)
