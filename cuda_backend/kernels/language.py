"""What kernels share: products, FP8 codes, functions that Triton lacks on some path.

Triton's interpreter, which runs kernels on a CPU, is wrong in three places without saying so: ``tl.dot`` of bfloat16
multiplies bit patterns, a cast to e4m3 wraps instead of rounding, and a cast to bfloat16 cuts off. ``dot``, ``to_e4m3``
and ``narrowed`` go round them. Elsewhere the rule is: load, widen to float32 at once, and narrow only to store.
"""

from __future__ import annotations

from . import jit
from .jit import tl, triton

INTERPRETED = tl.constexpr(jit.INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; of float32 in full precision.

    Hopper's tensor cores sum FP8 in about 14 bits, so there each product is added in float32. (Asking the compiler for
    that, by ``max_num_imprecise_acc``, makes it wait for every instruction.)
    """
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float8e4nv:
        return acc + tl.dot(a, b)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 rounded to ``dtype`` and back: the numbers that pass through memory in a model of that dtype."""
    return narrowed(x, dtype).to(tl.float32)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 -> ``dtype``, to nearest even; the interpreter's own cast to bfloat16 cuts off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, even, x)
    return x.to(dtype)


@triton.jit
def to_e4m3(x):
    """float32 -> e4m3, to nearest even, saturating at 448."""
    if INTERPRETED:
        return e4m3_code(x).to(tl.float8e4nv, bitcast=True)
    else:
        return tl.clamp(x, -448.0, 448.0).to(tl.float8e4nv)


@triton.jit
def e4m3_code(x):
    """float32 -> the code of e4m3 as uint8, by integer operations alone."""
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    value = tl.minimum(tl.abs(x), 448.0)
    bits = value.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # 23 bits of mantissa to 3, bias 127 to 7
    small = (value + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000  # below 2^-6: to multiples of 2^-9
    return (tl.where(value < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def from_e4m3(code):
    """The code of e4m3 as uint8 -> float32, on any card. In float16's places it stands for 1/256 of the value."""
    code = code.to(tl.uint16)
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def from_e2m1(code):
    """The code of e2m1, below 16, as uint8 -> float32. In float16's places it stands for 1/16384 of the value."""
    code = code.to(tl.uint16)
    half = ((code & 8) << 12) | ((code & 7) << 9)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def from_e8m0(code):
    """The code of e8m0 as uint8 -> float32: 2^(code - 127), the smallest a subnormal."""
    code = code.to(tl.uint32)
    return tl.where(code == 0, 0x00400000, code << 23).to(tl.float32, bitcast=True)


@triton.jit
def tanh(x):
    """By the exponential of a negative number, so that nothing overflows."""
    shrunk = tl.exp(-2.0 * tl.abs(x))
    value = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -value, value)


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
