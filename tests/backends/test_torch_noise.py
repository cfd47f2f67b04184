"""The noise on the device equals the NumPy specification bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cuda_backend import noise as torch_noise
from mlx_diffgemma.backend import CanvasSpec
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.sampling import noise

ONES = 0xFFFFFFFF
KNOWN = [  # Random123 1.14, examples/kat_vectors, philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = torch_noise.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("vocab_size", [7, 262_144, 2**31 - 1])
def test_batch_equals_rows_of_the_specification(vocab_size):
    chosen = [(0, 0, 0), (2**64 - 1, 1, 2), (2**40 + 5, 70_000, 3)]
    specs = [CanvasSpec(GenerationConfig(), seed, block, attempt) for seed, block, attempt in chosen]
    batch = torch_noise.batch_noise(specs, steps=5, length=33, vocab_size=vocab_size, device=torch.device("cpu"))
    for row, (seed, block, attempt) in enumerate(chosen):
        one = noise.block_noise(seed, block=block, attempt=attempt, steps=5, length=33, vocab_size=vocab_size)
        np.testing.assert_array_equal(batch.start[row].numpy(), one.start)
        np.testing.assert_array_equal(batch.draw[:, row].numpy(), one.draw)
        np.testing.assert_array_equal(batch.renoise[:, row].numpy(), one.renoise)
        assert batch.start.dtype == torch.int32 and batch.draw.dtype == torch.float32
