"""Codes of 1 to 8 bits in 32-bit words, as MLX lays them out.

A row is one little-endian stream of bits: the first code takes the lowest bits of the first word, and the widths that
do not divide 32 run on across words without a gap. Two, four or eight codes fill whole bytes: as many are joined in one
integer, neighbours first, then pairs, then fours.
"""

from __future__ import annotations

import math
from functools import cache

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
    joined, size = _lane(bits)
    lane = codes.view(joined)
    for width in _widths(joined):  # join neighbours: of ``width`` bits, ``used`` hold codes
        used = bits * width // 8
        low, high = _masks(joined, width, used)
        lane = (lane & low) | ((lane & high) >> joined.type(width - used))
    if size == 1:
        np.copyto(stream, lane, casting="unsafe")  # the low byte
        return
    columns = lane.view(np.uint8).reshape(lane.size, -1)
    for k in range(size):  # column by column: short rows are slow to copy
        stream[k::size] = columns[:, k]


def spread(stream: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of ``squeeze``: uint8 [n * bits / 8] -> uint8 [n]."""
    joined, size = _lane(bits)
    if size == 1:
        lane = stream.astype(joined)
    else:
        lane = np.zeros(stream.size // size, joined)
        columns = lane.view(np.uint8).reshape(lane.size, -1)
        for k in range(size):
            columns[:, k] = stream[k::size]
    for width in reversed(_widths(joined)):
        used = bits * width // 8
        low, high = _masks(joined, width, used)
        lane = (lane & low) | ((lane << joined.type(width - used)) & high)
    return lane.view(np.uint8)


def _check(stream_bits: int, bits: int) -> None:
    assert bits in WIDTHS, f"codes of {bits} bits are not supported"
    assert stream_bits % 32 == 0 and stream_bits // bits * bits == stream_bits, (
        f"a row of {stream_bits} bits does not hold whole words of codes of {bits} bits"
    )


@cache
def _lane(bits: int) -> tuple[np.dtype, int]:
    """An integer of as many bytes as there are codes in a whole number of bytes, and that number."""
    codes = 8 // math.gcd(bits, 8)
    return np.dtype(f"u{codes}"), codes * bits // 8


def _widths(joined: np.dtype) -> list[int]:
    return [width for width in (8, 16, 32) if width < 8 * joined.itemsize]


@cache
def _masks(joined: np.dtype, width: int, used: int) -> tuple[np.unsignedinteger, np.unsignedinteger]:
    """The ``used`` low bits of every even and of every odd field of ``width`` bits."""
    low = sum((2**used - 1) << shift for shift in range(0, 8 * joined.itemsize, 2 * width))
    return joined.type(low), joined.type(low << width)
