"""Products with a weight as it is stored: tiles of it are unpacked between memory and tensor core.

``operand`` says what of a weight a kernel reads and how; ``product`` multiplies. A value is unpacked as in the plain
version and rounded once to the dtype of the activations, so their products are the same numbers. Two factors of whole
rows are kept for the sum: the scale of an FP8 row and the global scale of an nvfp4 row. There a kernel rounds less than
the plain version, and all that is left to unpack is exact in bfloat16.

The weight is the left side of the product: its rows fill the 64 that a Hopper tensor core wants, also where there are
only a few tokens, and a left side may come from registers, where unpacking leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear import Dense, Quantized, Weight
from .cards import Card
from .jit import tl, triton
from .language import INTERPRETED, dot, from_e2m1, from_e4m3, from_e8m0, narrowed
from .launch import Config
from .quantize import Fp8Rows, Rows


@dataclass(frozen=True)
class Operand:
    """A weight [..., out, in] for kernels.

    Args:
        weight: what is read of it: values, or uint8 with one or two codes in a byte.
        scales, biases: [..., out, in / group], or absent.
        row_scale: [..., out], for the sum, or absent.
        value: how a value is stored: "same" as the activations, "e4m3", "e4m3 byte", "int8", "int4" or "e2m1".
        scale: how its scale is: "" if there is none, "e4m3 byte", "e8m0" or "affine" with a bias.
        bits: of a value.
        group: values of a row that share a scale, 1 where none do.
    """

    weight: Tensor
    scales: Tensor | None
    biases: Tensor | None
    row_scale: Tensor | None
    value: str
    scale: str
    bits: int
    group: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.scales, self.biases, self.row_scale

    @property
    def constants(self) -> dict[str, str | int]:
        return {"VALUE": self.value, "SCALE": self.scale, "GROUP": self.group}


def unsupported(weight: Weight, card: Card) -> str:
    """Why kernels cannot read ``weight``, for a person; empty if they can."""
    if isinstance(weight, Dense):
        return ""
    if not isinstance(weight, Quantized):
        return "its pieces are stored unlike"
    encoding = weight.encoding
    if encoding.mode == "fp8" and encoding.block:
        return "FP8 with scales of blocks"
    if encoding.mode == "affine" and encoding.bits not in (4, 8):
        return f"affine codes of {encoding.bits} bits"
    return ""


def operand(weight: Weight, x: Rows, card: Card) -> Operand:
    """``weight``, which is supported, for a product with ``x``."""
    quantized = isinstance(x, Fp8Rows)
    if isinstance(weight, Dense):
        assert isinstance(x, Tensor) and x.dtype == weight.values.dtype, "two sides of one dtype"
        return Operand(weight.values, None, None, None, "same", "", weight.values.element_size() * 8, 1)
    assert isinstance(weight, Quantized) and not unsupported(weight, card)
    encoding, parts = weight.encoding, weight.parts
    scales = parts["scales"]
    if encoding.mode == "fp8":
        value = "same" if quantized else _e4m3(card)
        return Operand(_codes(parts["weight"], value), None, None, scales, value, "", 8, 1)
    assert not quantized, "activations in FP8 are for FP8 weights"
    value, scale = {
        "affine": (f"int{encoding.bits}", "affine"),
        "mxfp8": (_e4m3(card), "e8m0"),
        "mxfp4": ("e2m1", "e8m0"),
        "nvfp4": ("e2m1", "e4m3 byte"),
    }[encoding.mode]
    codes = _codes(parts["weight"], value)
    more = parts.get("biases"), parts.get("global_scale")
    return Operand(codes, scales, *more, value, scale, encoding.bits, encoding.group_size)


def _e4m3(card: Card) -> str:
    return "e4m3" if card.fp8 else "e4m3 byte"


def _codes(weight: Tensor, value: str) -> Tensor:
    return weight.view(torch.float8_e4m3fn if value in ("same", "e4m3") else torch.uint8)


BLOCKS = {32: 32, 16: 64, 8: 128, 4: 128}  # values of a row in one turn, by their bits: where it can be, 128 bytes
LEAST = 64  # that a turn is cut down to
RESERVED = 8 * 1024  # bytes of shared memory that are not for the pipeline: scales, the turn of a result
DIRECT = (90, 100)  # tensor cores that read shared memory; others read registers and let go of a buffer a turn earlier


def configuration(weight: Operand, x: Tensor, out: int, tokens: int, card: Card) -> Config:
    """For tiles of ``out`` rows of the weight and ``tokens`` of x: a pipeline so deep that two programs fit.

    What is unpacked takes many registers and instructions, so each 64 rows have a warp group of their own; FP8 and
    dense tiles go to the tensor cores untouched, and one warp group can feed them as long as the sums fit.
    """
    per_value = out * weight.bits // 8 + tokens * x.element_size()
    room = (card.shared - RESERVED) // 2
    block = BLOCKS[weight.bits]
    while 3 * block * per_value > room and block // 2 >= max(weight.group, LEAST):
        block //= 2
    stages = max(2, min(6, room // (block * per_value) + (card.sm not in DIRECT)))
    groups = out // 64 if weight.value != "same" or tokens > 64 else 1
    return Config({"OUT": out, "TOKENS": tokens, "BLOCK_K": block}, num_warps=4 * groups, num_stages=stages)


@triton.jit
def product(
    x,
    x_rows,
    inside,
    weight,
    scales,
    biases,
    rows,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of the weight times rows of x: float32 [OUT, TOKENS], short of row scales.

    Scales are loaded a turn ahead, by hand: a few bytes of a row are too little for the compiler's own pipeline.

    Args:
        x: [..., WIDTH]; x_rows: int64 [TOKENS], which of its rows; inside: where there is one, elsewhere is zero.
        rows: int64 [OUT], which rows of the weight, all of them its own.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    SHARED: tl.constexpr = 2 if VALUE == "int4" or VALUE == "e2m1" else 1  # codes in a byte
    GROUPS: tl.constexpr = BLOCK_K // GROUP if SCALE != "" else 0
    acc = tl.zeros((OUT, TOKENS), tl.float32)
    scale, bias = 0, 0
    if SCALE != "":
        scale = stored(scales, rows, 0, WIDTH // GROUP, GROUPS)
    if SCALE == "affine":
        bias = stored(biases, rows, 0, WIDTH // GROUP, GROUPS)
    x_at = x + x_rows[None, :] * WIDTH
    for k in range(0, WIDTH, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        seen = inside[None, :] if WIDTH % BLOCK_K == 0 else inside[None, :] & (at < WIDTH)[:, None]
        right = tl.load(x_at + at[:, None], mask=seen, other=0.0)
        left = stored(weight, rows, k // SHARED, WIDTH // SHARED, BLOCK_K // SHARED)
        next_scale, next_bias = scale, bias
        if SCALE != "":
            next_scale = stored(scales, rows, k // GROUP + GROUPS, WIDTH // GROUP, GROUPS, True)
        if SCALE == "affine":
            next_bias = stored(biases, rows, k // GROUP + GROUPS, WIDTH // GROUP, GROUPS, True)
        if VALUE != "same":
            left = unpacked(left, scale, bias, DTYPE, VALUE, SCALE, GROUP, OUT, BLOCK_K)
        acc = dot(left, right, acc)
        scale, bias = next_scale, next_bias
    return acc


@triton.jit
def stored(part, rows, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr = False):
    """Columns first.. of a part [..., WIDTH]: [OUT, BLOCK], zeros behind its edge. ``AHEAD`` may begin behind it."""
    at = first + tl.arange(0, BLOCK)
    places = part + rows[:, None] * WIDTH + at[None, :]
    if WIDTH % BLOCK == 0 and not AHEAD:
        return tl.load(places)
    else:
        return tl.load(places, mask=(at < WIDTH)[None, :], other=0.0)


@triton.jit
def unpacked(
    code,
    scale,
    bias,
    DTYPE: tl.constexpr,
    VALUE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes as they lie in memory, [OUT, BLOCK_K] or half as many bytes of two, with scales and biases
    [OUT, BLOCK_K / GROUP] -> DTYPE [OUT, BLOCK_K]."""
    SHORT: tl.constexpr = (VALUE == "int4" or VALUE == "int8") and scale.dtype == tl.bfloat16
    if tl.bfloat16 == DTYPE and (VALUE == "e2m1" or SHORT):
        value = in_bfloat16(code, VALUE, OUT, BLOCK_K)
        factor = 4.0 if VALUE == "int4" else 64.0 if VALUE == "int8" else 1.0
        scale = narrowed(decoded(scale, SCALE) * factor, tl.bfloat16)
    else:
        value = in_float32(code, VALUE, OUT, BLOCK_K)
        if SCALE != "":
            scale = decoded(scale, SCALE)
    if SCALE != "":
        value = value.reshape(OUT, BLOCK_K // GROUP, GROUP)
        scale = scale[:, :, None].broadcast_to(OUT, BLOCK_K // GROUP, GROUP)
        if SCALE == "affine":
            bias = bias.to(value.dtype)[:, :, None].broadcast_to(OUT, BLOCK_K // GROUP, GROUP)
            value = times_plus(value, scale, bias)
        else:
            value = times(value, scale)
        value = value.reshape(OUT, BLOCK_K)
    return value if value.dtype == DTYPE else narrowed(value, DTYPE)


@triton.jit
def in_float32(code, VALUE: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """float32 [OUT, BLOCK_K] of any codes."""
    if VALUE == "int4" or VALUE == "e2m1":
        return tl.join(decoded(code & 15, VALUE), decoded(code >> 4, VALUE)).reshape(OUT, BLOCK_K)
    else:
        return decoded(code, VALUE)


@triton.jit
def in_bfloat16(code, VALUE: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """bfloat16 [OUT, BLOCK_K]: codes of e2m1, of int4 by 4, of int8 by 64.

    Unpacking is what limits a product with 4-bit weights, so its instructions count, and one in bfloat16 does for two
    values. Codes are put where they stand, in bfloat16, for 2^-126 of e2m1, 2^-129 of int4 and 2^-133 of int8, most
    of them subnormal, and brought up by one exact product.
    """
    if VALUE == "int8":
        value = code.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        both = code.to(tl.uint32)
        both = (both | (both << 12)) & 0x000F000F  # each in its half of a word
        both = (both * 0x1040) & 0x81C081C0 if VALUE == "e2m1" else both << 4
        low = (both & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (both >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        value = tl.join(low, high).reshape(OUT, BLOCK_K)
    return times(value, tl.full((OUT, BLOCK_K), 2.0**126 if VALUE == "e2m1" else 2.0**127, tl.float32))


@triton.jit
def decoded(code, KIND: tl.constexpr):
    """Codes of values or scales -> float32."""
    if KIND == "e4m3 byte":
        return from_e4m3(code)
    elif KIND == "e2m1":
        return from_e2m1(code)
    elif KIND == "e8m0":
        return from_e8m0(code)
    elif KIND == "int4" or KIND == "int8":  # in the last places of 2^23, for conversion is slow
        return (code.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    else:
        return code.to(tl.float32)


@triton.jit
def times(a, b):
    """a * b in the dtype of a; the interpreter cannot do that in bfloat16."""
    if INTERPRETED:
        return narrowed(widened(a) * widened(b), a.dtype)
    else:
        return a * b.to(a.dtype)


@triton.jit
def times_plus(a, b, c):
    """a * b + c, rounded once in bfloat16. In float32 the product of a code and a 16-bit scale is exact anyway."""
    if INTERPRETED:
        return narrowed(widened(a) * widened(b) + widened(c), a.dtype)
    else:
        return tl.fma(a, b, c)


@triton.jit
def widened(x):
    """-> float32. The interpreter's own cast of subnormal bfloat16 is wrong."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def scaled(acc, row_scale, rows, x_scale, x_rows, inside):
    """The sums [OUT, TOKENS] times the scales of whole rows, each of which may be absent."""
    if row_scale is not None:
        acc *= tl.load(row_scale + rows).to(tl.float32)[:, None]
    if x_scale is not None:
        acc *= tl.load(x_scale + x_rows, mask=inside, other=0.0)[None, :]
    return acc
