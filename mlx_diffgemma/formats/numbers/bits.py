"""Codes of 1 to 8 bits in 32-bit words, as MLX lays them out.

A row is one little-endian stream of bits: the first code takes the lowest bits of the first word, and the widths that
do not divide 32 run on across words without a gap. Eight codes always fill ``bits`` whole bytes, so the work is done
eight codes at a time in 64-bit integers.
"""

from __future__ import annotations

import numpy as np

from .chunks import flat, scaled, spans

WIDTHS = (1, 2, 3, 4, 5, 6, 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers below 2**bits [..., n] -> uint32 [..., n * bits / 32]."""
    rows, n = codes.shape[:-1], codes.shape[-1]
    _check(n * bits, bits)
    words = np.empty((*rows, n * bits // 32), np.uint32)
    source, stream = flat(codes), words.reshape(-1).view(np.uint8)
    for part in spans(source.size):
        squeeze(source[part].astype(np.uint8, copy=False), bits, stream[scaled(part, bits, 8)])
    return words


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [..., n * bits / 32] -> uint8 [..., n]."""
    assert words.dtype == np.uint32, f"packed codes are uint32, not {words.dtype}"
    rows, n = words.shape[:-1], words.shape[-1] * 32 // bits
    _check(words.shape[-1] * 32, bits)
    codes = np.empty((*rows, n), np.uint8)
    stream, target = flat(words).view(np.uint8), codes.reshape(-1)
    for part in spans(target.size):
        target[part] = spread(stream[scaled(part, bits, 8)], bits)
    return codes


def squeeze(codes: np.ndarray, bits: int, stream: np.ndarray) -> None:
    """Write uint8 codes [n] to their bytes of the stream, uint8 [n * bits / 8]."""
    if bits == 8:
        stream[:] = codes
        return
    eight = codes.view(np.uint64)
    for width in (8, 16, 32):  # join neighbours: lanes of ``width`` bits, ``used`` of them taken
        used = bits * width // 8
        low, high = _lanes(width, used)
        eight = (eight & low) | ((eight & high) >> np.uint64(width - used))
    item = _item(bits)
    stream, columns = stream.view(item).reshape(eight.size, -1), eight.view(item).reshape(eight.size, -1)
    for k in range(stream.shape[1]):  # column by column: short rows are slow to copy
        stream[:, k] = columns[:, k]


def spread(stream: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of ``squeeze``: uint8 [n * bits / 8] -> uint8 [n]."""
    if bits == 8:
        return stream
    eight, item = np.zeros(stream.size // bits, np.uint64), _item(bits)
    stream, columns = stream.view(item).reshape(eight.size, -1), eight.view(item).reshape(eight.size, -1)
    for k in range(stream.shape[1]):
        columns[:, k] = stream[:, k]
    for width in (32, 16, 8):
        used = bits * width // 8
        low, high = _lanes(width, used)
        eight = (eight & low) | ((eight << np.uint64(width - used)) & high)
    return eight.view(np.uint8)


def _check(stream_bits: int, bits: int) -> None:
    assert bits in WIDTHS, f"codes of {bits} bits are not supported"
    assert stream_bits % 32 == 0 and stream_bits // bits * bits == stream_bits, (
        f"a row of {stream_bits} bits does not hold whole words of codes of {bits} bits"
    )


def _lanes(width: int, used: int) -> tuple[np.uint64, np.uint64]:
    """Masks of the ``used`` bits in every even and every odd lane of ``width`` bits."""
    low = sum((2**used - 1) << shift for shift in range(0, 64, 2 * width))
    return np.uint64(low), np.uint64(low << width)


def _item(bits: int) -> np.dtype:
    """The widest integer that divides ``bits`` bytes."""
    return np.dtype(f"u{bits & -bits}")
