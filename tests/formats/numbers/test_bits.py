"""Codes in words: the stream of bits is MLX's, checked against one written out bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_diffgemma.formats.numbers import bits, chunks


def stream(codes: np.ndarray, width: int) -> np.ndarray:
    """uint32 [rows, words]: every bit by itself, lowest first."""
    rows = np.unpackbits(codes[..., None], axis=-1, bitorder="little", count=width).reshape(len(codes), -1)
    return np.packbits(rows, axis=-1, bitorder="little").view("<u4")


@pytest.mark.parametrize("width", bits.WIDTHS)
@pytest.mark.parametrize("n", [32, 96, 4096])
def test_words_are_one_stream_of_bits(width: int, n: int):
    codes = np.random.default_rng(0).integers(0, 2**width, (5, n), dtype=np.uint8)
    words = bits.pack(codes, width)
    assert words.dtype == np.uint32 and np.array_equal(words, stream(codes, width))
    assert np.array_equal(bits.unpack(words, width), codes)


@pytest.mark.parametrize(("width", "n"), [(8, 4), (4, 8), (2, 16), (6, 16), (1, 32)])
def test_the_shortest_rows(width: int, n: int):
    codes = np.random.default_rng(1).integers(0, 2**width, (3, n), dtype=np.uint8)
    assert np.array_equal(bits.unpack(bits.pack(codes, width), width), codes)


def test_other_integers_and_strides():
    codes = np.random.default_rng(2).integers(0, 16, (4, 6, 64))
    packed = bits.pack(codes, 4)
    assert np.array_equal(bits.pack(codes.astype(np.int32), 4), packed)
    assert np.array_equal(bits.pack(codes[:, ::2], 4), packed[:, ::2])
    assert np.array_equal(bits.unpack(packed[::2, ::-1], 4), codes[::2, ::-1])


@pytest.mark.parametrize("width", bits.WIDTHS)
def test_pieces_do_not_show(width: int, monkeypatch):
    codes = np.random.default_rng(3).integers(0, 2**width, (7, 224), dtype=np.uint8)
    whole = bits.pack(codes, width)
    monkeypatch.setattr(chunks, "CHUNK", 128)
    assert np.array_equal(bits.pack(codes, width), whole)
    assert np.array_equal(bits.unpack(whole, width), codes)


@pytest.mark.parametrize(("n", "width"), [(31, 3), (8, 3), (4, 4), (32, 7), (32, 0), (3, 8)])
def test_rows_that_do_not_fill_words_are_refused(n: int, width: int):
    with pytest.raises(AssertionError, match="not"):
        bits.pack(np.zeros((2, n), np.uint8), width)
    with pytest.raises(AssertionError, match="uint32"):
        bits.unpack(np.zeros((2, n), np.int32), 4)
