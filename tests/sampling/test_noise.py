"""Promise 1: the noise bits are Random123's, on every backend, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_diffgemma.sampling import noise

# Random123 1.14, tests/kat_vectors: philox4x32 10 rounds: counter, key, result
KNOWN = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert noise.philox(np.array([counter], np.uint32), key)[0].tolist() == expected


def test_uniform_covers_the_half_open_interval():
    words = np.array([0, 255, 256, 0xFFFFFFFF], np.uint32)
    assert noise.uniform(words).tolist() == [0.0, 0.0, 2**-24, 1 - 2**-24]


@pytest.mark.parametrize("vocab", [1, 2, 128, 262_144])
def test_tokens_stay_in_the_vocabulary(vocab):
    words = np.array([0, 1, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    found = noise.token(words, vocab)
    assert found.min() == 0 and found.max() == vocab - 1


def test_a_position_keeps_its_noise_in_longer_canvases_and_more_steps():
    small = noise.block_noise(9, block=2, attempt=0, steps=3, length=8, vocab_size=99)
    large = noise.block_noise(9, block=2, attempt=0, steps=7, length=20, vocab_size=99)
    assert (large.start[:8] == small.start).all()
    assert (large.draw[:3, :8] == small.draw).all() and (large.renoise[:3, :8] == small.renoise).all()


def test_seed_block_attempt_step_and_purpose_all_matter():
    words = {"length": 64, "steps": 2, "block": 0, "attempt": 0, "purpose": noise.DRAW}
    base = noise.bits(1, **words)
    others = [noise.bits(2, **words), noise.bits(1 + 2**32, **words)]
    others += [noise.bits(1, **words | change) for change in ({"block": 1}, {"attempt": 1}, {"purpose": noise.RENOISE})]
    assert all((other != base).mean() > 0.9 for other in others)
    assert (base[0] != base[1]).mean() > 0.9


def test_noise_is_uniform():
    drawn = noise.token(noise.bits(5, length=4096, steps=16, block=0, attempt=0, purpose=noise.INIT), 128)
    counts = np.bincount(drawn.ravel(), minlength=128)
    expected = drawn.size / 128
    assert ((counts - expected) ** 2 / expected).sum() < 200  # chi-square, 127 degrees: p = 4e-5 beyond 200
