"""Why two runs of the same seed differ: the first decision that did, and how narrow it was.

Promise: across backends, devices and batch shapes the text is equal unless a decision had a margin below the numeric
noise. ``first_difference`` finds the decision; ``margin`` measures it by replaying the common past on one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..backend import Model
from ..config import GenerationConfig
from ..events import Draft
from ..sampling import rules
from ..sampling.noise import block_noise

Kind = Literal["argmax", "accept", "draw", "stop"]
NOISE = 1e-4  # probability, nats or logits: what fp32 implementations differ by


@dataclass(frozen=True)
class Difference:
    """The first place where two runs of one row part. ``positions`` are canvas positions, empty for ``stop``."""

    block: int
    step: int
    kind: Kind
    positions: tuple[int, ...] = ()


def first_difference(left: Sequence[Draft], right: Sequence[Draft]) -> Difference | None:
    """Compare the drafts of one row, in order; ``None`` when every decision is equal."""
    for a, b in zip(left, right, strict=False):
        if (a.block, a.step) != (b.block, b.step):
            return _stop(a, b)
        tests: tuple[tuple[Kind, np.ndarray], ...] = (
            ("argmax", a.argmax != b.argmax),
            ("accept", a.accepted != b.accepted),
            ("draw", a.canvas != b.canvas),
        )
        for kind, differs in tests:
            if differs.any():
                return Difference(a.block, a.step, kind, tuple(np.flatnonzero(differs).tolist()))
    if len(left) != len(right):
        short, long = sorted((left, right), key=len)
        return _stop(long[len(short)], long[len(short)])
    return None


def _stop(a: Draft, b: Draft) -> Difference:
    """One run went on where the other had stopped: the decision fell one step earlier."""
    onward = max(a, b, key=lambda draft: draft.step)
    return Difference(min(a.block, b.block), onward.step - 1, "stop")


def margin(
    model: Model, prompt: Sequence[int], settings: GenerationConfig, seed: int, drafts: Sequence[Draft], at: Difference
) -> float:
    """How narrow the decision was, in its own unit; also taken: the nearest router tie of that step's forward.

    ``drafts`` are those of either run: up to ``at`` they are the same.
    """
    tokens = np.array(prompt, np.int32)[None]
    cache = model.encode(tokens)
    for block in range(at.block):
        last = [draft for draft in drafts if draft.block == block][-1]
        canvas, _ = rules.finish(last.argmax, settings.eos_token_ids, settings.pad_token_id)
        cache = model.encode(canvas[None], cache)
    shaped, router_gap, uniform = _replay(model, cache, settings, seed, drafts, at)
    return min(router_gap, _decision_margin(shaped, uniform, settings, at))


def _replay(
    model: Model, cache: Any, settings: GenerationConfig, seed: int, drafts: Sequence[Draft], at: Difference
) -> tuple[np.ndarray, float, np.ndarray]:
    """Shaped logits [C, V] of step ``at``, the smallest router gap on the way there, and the step's uniforms."""
    text = model.config.text
    noise = block_noise(
        seed,
        block=at.block,
        attempt=0,
        steps=settings.max_denoising_steps,
        length=model.config.canvas_length,
        vocab_size=text.vocab_size,
    )
    fed = [noise.start] + [draft.canvas for draft in drafts if draft.block == at.block]
    shaped, gap = None, np.inf
    for step, temperature in enumerate(rules.temperatures(settings)[: at.step]):
        found = model.inspect(cache, fed[step][None], previous=shaped, want=("logits", "router_probabilities"))
        shaped = found["logits"] / temperature
        ranked = np.sort(found["router_probabilities"], -1)[..., ::-1]
        if text.top_k_experts < text.num_experts:
            gap = min(gap, float((ranked[..., text.top_k_experts - 1] - ranked[..., text.top_k_experts]).min()))
    assert shaped is not None, "a difference needs a step"
    return shaped[0], gap, noise.draw[at.step - 1]


def _decision_margin(shaped: np.ndarray, uniform: np.ndarray, settings: GenerationConfig, at: Difference) -> float:
    where = list(at.positions)
    if at.kind == "argmax":
        best = np.sort(shaped[where], -1)[:, -2:]
        return float((best[:, 1] - best[:, 0]).max())
    entropy = rules.entropy(shaped)
    if at.kind == "stop":
        return abs(float(entropy.mean()) - (settings.confidence_threshold or 0.0))
    if at.kind == "accept":
        ranked = np.sort(entropy)
        before = np.cumsum(ranked) - ranked
        return float(np.abs(before - settings.entropy_bound).min())
    weight = np.exp(shaped[where] - shaped[where].max(-1, keepdims=True))
    cumulated = np.cumsum(weight, -1) / weight.sum(-1, keepdims=True)
    return float(np.abs(cumulated - uniform[where, None]).min(-1).max())
