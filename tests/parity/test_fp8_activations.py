"""FP8 weights and activations in torch against the NumPy reference, which rounds both by ml_dtypes and multiplies.

A code is decided by one rounding; sums that differ in their last bits can decide it the other way, by a sixteenth of
the number, and a random network makes much of that. Where none is decided so, and that must be half of the cases at
least, logits agree like those of two exact models; elsewhere they stay closer than rounding activations moves them.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

import cuda_backend
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.reference.model import ReferenceModel
from mlx_diffgemma.reference.network import Network, gelu_tanh
from mlx_diffgemma.tensors import layer_name
from tests.conftest import load_model
from tests.formats.foreign import foreign

E4M3 = ml_dtypes.float8_e4m3fn
ALIKE = 1e-4  # root mean square of differences of logits of about 10, where every code is decided alike


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 [..., D], each row to e4m3 with the scale that its greatest number asks for."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-12)) / np.float32(448)
    return (x / scale).astype(E4M3).astype(np.float32) * scale


@dataclass(frozen=True)
class RoundingNetwork(Network):
    """The specification, with what FP8 weights are multiplied with rounded first."""

    packed: frozenset[str] = frozenset()

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return super().linear(rounded(x) if f"{name}.weight" in self.packed else x, name)

    def experts(self, x: np.ndarray, weight: np.ndarray, chosen: np.ndarray, layer: int) -> np.ndarray:
        at = f"{layer_name(layer)}.experts"
        assert {f"{at}.gate_up_proj", f"{at}.down_proj"} <= self.packed
        gate_up, down = self.weights[f"{at}.gate_up_proj"], self.weights[f"{at}.down_proj"]
        out = np.zeros_like(x)
        for expert in np.unique(chosen):
            rows, rank = np.nonzero(chosen == expert)
            gate, up = np.split(rounded(x[rows]) @ gate_up[expert].T, 2, -1)
            out[rows] += weight[rows, rank, None] * (rounded(gelu_tanh(gate) * up) @ down[expert].T)
        return out


def models():
    folder = foreign("ct-fp8")
    opened = open_checkpoint(folder)
    packed = frozenset(name for name, stored in opened.tensors.items() if stored.encoding.mode == "fp8")
    judge = load_model(folder, "reference")
    rounding = ReferenceModel(judge.config, RoundingNetwork(judge.network.config, judge.network.weights, packed))
    return cuda_backend.load(opened, device="cpu", dtype="float32", activations="fp8"), rounding, judge


def stray(found, expected):
    return float(np.sqrt(np.mean((found - expected) ** 2)))


def test_fp8_products_are_the_reference_on_rounded_weights_and_activations(record):
    mine, rounding, exact = models()
    vocab, length = mine.config.text.vocab_size, mine.config.canvas_length
    off, cost = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        prompt, canvas = rng.integers(0, vocab, (1, 8)), rng.integers(0, vocab, (1, length))
        previous = rng.normal(size=(1, length, vocab)).astype(np.float32) * 4 if seed % 2 else None
        found, expected, unrounded = (
            model.inspect(model.encode(prompt), canvas, previous=previous)["logits"]
            for model in (mine, rounding, exact)
        )
        assert np.abs(expected).max() > 3, "the logits are too small to mean anything"
        off.append(stray(found, expected))
        cost.append(stray(expected, unrounded))
    alike = [x < ALIKE for x in off]
    record(what="W8A8", alike=sum(alike), of=len(off), worst=max(off), cost=float(np.mean(cost)))
    assert sum(alike) >= len(off) // 2, off
    assert max(off) < min(cost), (off, cost)
