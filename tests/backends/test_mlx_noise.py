"""The noise of the MLX backend is the specification's, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.backend import CanvasSpec
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.mlx_backend import noise
from mlx_diffgemma.sampling import noise as specification

SPECS = [
    CanvasSpec(GenerationConfig(), seed=0),
    CanvasSpec(GenerationConfig(), seed=2**64 - 1, block=3, attempt=2),
    CanvasSpec(GenerationConfig(), seed=0x299F31D0A4093822, block=2**31, attempt=2**29),
]


@pytest.mark.parametrize("purpose", [specification.INIT, specification.DRAW, specification.RENOISE])
def test_bits(purpose):
    found = np.array(noise.bits(SPECS, length=37, steps=5, purpose=purpose))
    for row, spec in enumerate(SPECS):
        expected = specification.bits(
            spec.seed, length=37, steps=5, block=spec.block, attempt=spec.attempt, purpose=purpose
        )
        np.testing.assert_array_equal(found[row], expected)


@pytest.mark.parametrize("vocab_size", [512, 32_003, 262_144])
def test_block_noise(vocab_size):
    found = noise.block_noise(SPECS, steps=4, length=256, vocab_size=vocab_size)
    for row, spec in enumerate(SPECS):
        expected = specification.block_noise(
            spec.seed, block=spec.block, attempt=spec.attempt, steps=4, length=256, vocab_size=vocab_size
        )
        np.testing.assert_array_equal(np.array(found.start[row]), expected.start)
        np.testing.assert_array_equal(np.array(found.draw[row]), expected.draw)
        np.testing.assert_array_equal(np.array(found.renoise[row]), expected.renoise)


def test_extreme_words():
    words = np.array([0, 1, 255, 256, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    np.testing.assert_array_equal(np.array(noise.uniform(mx.array(words))), specification.uniform(words))
    np.testing.assert_array_equal(np.array(noise.token(mx.array(words), 262_144)), specification.token(words, 262_144))
