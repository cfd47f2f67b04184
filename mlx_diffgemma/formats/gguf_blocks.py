"""GGUF's blocks, and the encodings that hold the very same numbers.

A block is 32 values of a row with their scale: float16 ``d`` (and ``m``), or e8m0 in MXFP4. Its 4-bit codes lie
crosswise, value j in the low and value j + 16 in the high half of byte j; MLX has neighbours side by side.

=====  ==============================  =======================================
type   block                           the same as
=====  ==============================  =======================================
Q8_0   d, 32 x int8                    affine 8-bit g32: scale d, bias -128 d
Q4_0   d, 16 bytes                     affine 4-bit g32: scale d, bias -8 d
Q4_1   d, m, 16 bytes                  affine 4-bit g32: scale d, bias m
Q5_0   d, 32 high bits, 16 bytes       affine 5-bit g32: scale d, bias -16 d
Q5_1   d, m, 32 high bits, 16 bytes    affine 5-bit g32: scale d, bias m
MXFP4  e8m0, 16 bytes                  mxfp4, bit for bit
=====  ==============================  =======================================

Scales and biases become float32, which holds them exactly. Every other type becomes dense float32, by the gguf package.
Source: ggml-quants.c, ``dequantize_row_*``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import CheckpointError
from .encoding import Encoded, Encoding, dense, grouped
from .gguf_file import FLOATS, GGUFTensor
from .hf import dense_part
from .numbers import bits
from .numbers.chunks import group_reduce, parts, scaled
from .stored import Stored

Arrays = dict[str, np.ndarray]
GROUP = 32
BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))
AT_ONCE = 1 << 20  # values that gguf dequantizes at a time
SUPER = frozenset(
    "Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 NVFP4".split()
)  # what gguf 0.19 dequantizes


def stored(shape: tuple[int, ...], part: GGUFTensor) -> Stored:
    """A tensor of ``shape``; a range of the first axis touches nothing else of the file.

    Raises:
        CheckpointError: another shape, a type that is not for weights, or one that needs the gguf package.
    """
    if part.kind in FLOATS:
        return dense_part(shape, part)
    if part.logical != shape:
        raise CheckpointError(
            f"{part.path}: {part.name} has shape {part.logical}, config.json calls for {shape}; are they of one model?"
        )
    if len(shape) < 2 or part.kind not in SUPER | set(EXACT):
        raise CheckpointError(f"{part.path}: {part.name} is {part.kind}, which this library does not read")
    if part.kind in SUPER:
        return _dequantized(shape, part)
    encoding, unpack = EXACT[part.kind]

    def load(start: int, stop: int) -> Encoded:
        raw = part.read(start, stop)
        return Encoded(encoding, (stop - start, *shape[1:]), unpack(raw))

    return Stored(encoding, shape, (part,), load, "" if encoding.mode == "mxfp4" else part.kind, True)


def _dequantized(shape: tuple[int, ...], part: GGUFTensor) -> Stored:
    try:
        import gguf

        kind = gguf.GGMLQuantizationType[part.kind]
    except (ImportError, KeyError) as error:  # KeyError: an old one
        raise CheckpointError(
            f"{part.path}: {part.name} is {part.kind}, which the gguf package reads: pip install 'mlx-diffgemma[gguf]'"
        ) from error
    encoding = dense("float32")

    def load(start: int, stop: int) -> Encoded:
        values = np.empty((stop - start, *shape[1:]), np.float32)
        rows, raw = values.reshape(-1, shape[-1]), part.read(start, stop).reshape(-1, part.row)
        step = max(1, AT_ONCE // shape[-1])
        for at in range(0, len(rows), step):
            rows[at : at + step] = gguf.dequantize(raw[at : at + step], kind)
        return Encoded(encoding, values.shape, {"weight": values})

    return Stored(encoding, shape, (part,), load, part.kind, True)


def held_bytes(part: GGUFTensor, item: int) -> int:
    """Bytes of a tensor in memory: as it is stored where that is exact, else dense with ``item`` bytes per value."""
    if part.kind in EXACT:
        return EXACT[part.kind][0].nbytes(part.logical)
    return int(np.prod(part.logical, dtype=np.int64)) * (item if part.kind in SUPER else part.dtype.itemsize)


def _split(raw: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """The fields of the blocks, uint8 [..., n * sum] -> one [..., n, size] each."""
    blocks = raw.reshape(*raw.shape[:-1], raw.shape[-1] // sum(sizes), sum(sizes))
    return np.split(blocks, np.cumsum(sizes)[:-1], axis=-1)


def _half(field: np.ndarray) -> np.ndarray:
    """float16 bytes [..., n, 2] -> float32 [..., n]."""
    return np.ascontiguousarray(field).view(np.float16)[..., 0].astype(np.float32)


def _words(rows: np.ndarray) -> np.ndarray:
    """uint8 [..., n, bytes] -> uint32 [..., n * bytes / 4]."""
    return np.ascontiguousarray(rows).reshape(*rows.shape[:-2], rows.shape[-2] * rows.shape[-1]).view(np.uint32)


def uncross(nibbles: np.ndarray) -> np.ndarray:
    """Bytes of value j and j + 16 -> bytes of values 2k and 2k + 1; uint8 [..., 16] both."""
    even, odd = nibbles[..., 0::2], nibbles[..., 1::2]
    found = np.empty(nibbles.shape, np.uint8)
    found[..., :8] = (even & 15) | (odd << 4)
    found[..., 8:] = (even >> 4) | (odd & 240)
    return found


def cross(nibbles: np.ndarray) -> np.ndarray:
    """The inverse of ``uncross``."""
    first, second = nibbles[..., :8], nibbles[..., 8:]
    found = np.empty(nibbles.shape, np.uint8)
    found[..., 0::2] = (first & 15) | (second << 4)
    found[..., 1::2] = (first >> 4) | (second & 240)
    return found


def _affine(words: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> Arrays:
    return {"weight": words, "scales": scales, "biases": biases}


def _q8_0(raw: np.ndarray) -> Arrays:
    d, codes = _split(raw, 2, 32)
    scales = _half(d)
    return _affine(_words(codes ^ np.uint8(128)), scales, scales * np.float32(-128))


def _q4_0(raw: np.ndarray) -> Arrays:
    d, nibbles = _split(raw, 2, 16)
    scales = _half(d)
    return _affine(_words(uncross(nibbles)), scales, scales * np.float32(-8))


def _q4_1(raw: np.ndarray) -> Arrays:
    d, m, nibbles = _split(raw, 2, 2, 16)
    return _affine(_words(uncross(nibbles)), _half(d), _half(m))


def _q5_0(raw: np.ndarray) -> Arrays:
    d, high, nibbles = _split(raw, 2, 4, 16)
    scales = _half(d)
    return _affine(_five(high, nibbles), scales, scales * np.float32(-16))


def _q5_1(raw: np.ndarray) -> Arrays:
    d, m, high, nibbles = _split(raw, 2, 2, 4, 16)
    return _affine(_five(high, nibbles), _half(d), _half(m))


def _five(high: np.ndarray, nibbles: np.ndarray) -> np.ndarray:
    """5-bit codes as MLX's words, uint32 [..., n * 5]."""
    codes = np.unpackbits(high, axis=-1, bitorder="little")
    codes <<= 4
    codes[..., :16] |= nibbles & 15
    codes[..., 16:] |= nibbles >> 4
    return bits.pack(codes.reshape(*codes.shape[:-2], codes.shape[-2] * GROUP), 5)


def _mxfp4(raw: np.ndarray) -> Arrays:
    exponent, nibbles = _split(raw, 1, 16)
    return {"weight": _words(uncross(nibbles)), "scales": np.ascontiguousarray(exponent[..., 0])}


def _group32(width: int) -> Encoding:
    return grouped("affine", bits=width, group_size=GROUP, dtype="float32")


EXACT: dict[str, tuple[Encoding, Callable[[np.ndarray], Arrays]]] = {
    "Q8_0": (_group32(8), _q8_0),
    "Q4_0": (_group32(4), _q4_0),
    "Q4_1": (_group32(4), _q4_1),
    "Q5_0": (_group32(5), _q5_0),
    "Q5_1": (_group32(5), _q5_1),
    "MXFP4": (grouped("mxfp4"), _mxfp4),
}


def mxfp4_blocks(arrays: Arrays) -> np.ndarray:
    """words uint32 [..., n * 4], scales uint8 [..., n] -> blocks uint8 [..., n * 17], bit for bit."""
    scales = arrays["scales"]
    blocks = np.empty((*scales.shape, 17), np.uint8)
    blocks[..., 0] = scales
    blocks[..., 1:] = cross(np.ascontiguousarray(arrays["weight"]).view(np.uint8).reshape(*scales.shape, 16))
    return blocks.reshape(*scales.shape[:-1], -1)


def q8_0_blocks(arrays: Arrays) -> np.ndarray | None:
    """Affine 8-bit codes in groups of 32 as Q8_0, or None where its float16 scales cannot hold the numbers.

    words uint32 [..., n * 8], scales and biases [..., n] -> uint8 [..., n * 34].
    """
    scales, biases = (arrays[name].astype(np.float32) for name in ("scales", "biases"))
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    if not (np.array_equal(half, scales) and np.array_equal(biases, scales * np.float32(-128))):
        return None
    blocks = np.empty((*scales.shape, 34), np.uint8)
    blocks[..., :2] = half[..., None].view(np.uint8)
    codes = np.ascontiguousarray(arrays["weight"]).view(np.uint8).reshape(*scales.shape, GROUP)
    np.bitwise_xor(codes, np.uint8(128), out=blocks[..., 2:])
    return blocks.reshape(*scales.shape[:-1], -1)


def quantize_q8_0(values: np.ndarray) -> np.ndarray:
    """float32, float16 or bfloat16 [..., in] -> blocks uint8 [..., in / 32 * 34], as ggml's ``quantize_row_q8_0_ref``.

    The error is at most half a step, d / 2 with d = amax / 127, and 127 times the rounding of d to float16.
    """
    rows, groups = values.shape[:-1], values.shape[-1] // GROUP
    blocks = np.empty((values.size // GROUP, 34), np.uint8)
    for part, x in parts(values):
        here, x = blocks[scaled(part, 1, GROUP)], x.reshape(-1, GROUP)
        d = group_reduce(np.maximum, np.abs(x).reshape(-1), GROUP)[:, None] / np.float32(127)
        with np.errstate(all="ignore"):  # what is not finite stays so in d
            x *= np.where(d == 0, np.float32(0), np.float32(1) / d)
            here[:, :2] = d.astype(np.float16).view(np.uint8)
            x += np.copysign(BELOW_HALF, x)  # halves go away from zero
            here[:, 2:] = x.astype(np.int8).view(np.uint8)
    return blocks.reshape(*rows, groups * 34)
