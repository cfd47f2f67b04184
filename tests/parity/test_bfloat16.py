"""bf16: rounding moves everyone, so the judge is transformers' own distance between bf16 and fp32.

On rows that were routed as in fp32, our distance to fp32 is at most twice theirs, in the median and at the 99th
percentile. Rows routed otherwise are compared with nobody, here as there.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tests.conftest import load_model
from tests.official import Official
from tests.tiny import TEXT, checkpoint

CASES = 12
PROMPT = 21
ALL_EXPERTS = (("num_experts", 4), ("top_k_experts", 4))  # nothing to choose: rounding alone is compared


@functools.cache
def inputs(seed: int):
    rng = np.random.default_rng(seed)
    length = 16
    return rng.integers(0, TEXT["vocab_size"], (1, PROMPT)), rng.integers(0, TEXT["vocab_size"], (1, length))


@functools.cache
def official(shape: tuple, dtype: torch.dtype):
    """Logits [N, C, V] and router choices [N, L, C, k] of every case."""
    judge = Official(checkpoint(seed=1, shape=shape, calm=True), dtype)
    logits, routers = [], []
    for seed in range(CASES):
        prompt, canvas = inputs(seed)
        context = judge.encode(prompt.tolist())
        judge.choices.clear()
        logits.append(judge.logits(context, canvas)[0])
        routers.append(np.stack(judge.choices))
    return np.stack(logits), np.stack(routers)


def distances(logits, routers, expected, expected_routers) -> np.ndarray:
    """The largest logit difference of every row whose experts are those of fp32, in all layers."""
    same = (np.sort(routers, -1) == np.sort(expected_routers, -1)).all((1, 3))  # [N, C]
    assert same.mean() > 0.05, "hardly any row is routed as in fp32; the fixture says nothing"
    return np.abs(logits - expected).max(-1)[same]


@pytest.mark.parametrize("shape", [(), ALL_EXPERTS], ids=["routed", "all experts"])
def test_bfloat16_is_as_close_to_float32_as_the_official_one(shape, fast_backend, record):
    expected, expected_routers = official(shape, torch.float32)
    theirs = distances(*official(shape, torch.bfloat16), expected, expected_routers)
    model = load_model(checkpoint(seed=1, shape=shape, calm=True), fast_backend, "bfloat16")
    found = []
    for seed in range(CASES):
        prompt, canvas = inputs(seed)
        found.append(model.inspect(model.encode(prompt), canvas, want=("logits", "router")))
    logits, routers = (np.stack([f[name][0] for f in found]) for name in ("logits", "router"))
    ours = distances(logits, routers, expected, expected_routers)
    figures = {
        f"{who}_{name}": float(np.quantile(d, q))
        for who, d in (("official", theirs), ("ours", ours))
        for name, q in (("median", 0.5), ("p99", 0.99))
    }
    record(model=fast_backend, case=f"bf16 {'all experts' if shape else 'routed'}", rows=len(ours), **figures)
    assert figures["ours_median"] <= 2 * figures["official_median"]
    assert figures["ours_p99"] <= 2 * figures["official_p99"]
    assert figures["ours_median"] > 0, "bf16 equal to fp32 means bf16 was not used"
