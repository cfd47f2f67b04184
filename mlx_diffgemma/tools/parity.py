"""Why two runs of the same seed differ: the first decision that did, and how narrow it was.

Promise: across backends, devices and batch shapes the text is equal unless a decision had a margin below the numeric
noise. ``first_difference`` finds the decision; ``margin`` measures it by replaying the common past on one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..backend import CanvasSpec, Model, given
from ..config import UNSET, GenerationConfig
from ..events import Draft
from ..sampling import rules
from ..sampling.noise import block_noise

WANTED = ("logits", "router", "router_probabilities")
Kind = Literal["argmax", "accept", "draw", "stop"]
NOISE = 1e-4  # probability, nats or logits: what fp32 implementations differ by
TIE = 1e-6  # router probability: so close, even another batch shape may choose otherwise


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
    models: tuple[Model, Model], prompt: Sequence[int], spec: CanvasSpec, drafts: Sequence[Draft], at: Difference
) -> float:
    """How narrow the decision was, in its own unit; a router that chose otherwise on the way, or tied, counts too.

    Args:
        models: the two that disagree; the first one's numbers are measured.
        spec: the row's, in block ``at.block``.
        drafts: those of either run: up to ``at`` they are the same.
    """
    left, right = (_replay(model, prompt, spec, drafts, at) for model in models)
    free = given(spec.masks.clamp, np.full(len(left.shaped), UNSET)) == UNSET
    decision = _decision_margin(left.shaped, left.uniform, free, spec.settings, at)
    flipped = (left.router != right.router).any(-1) | (left.gaps < TIE)
    return min(decision, float(left.gaps[flipped].min()) if flipped.any() else np.inf)


@dataclass(frozen=True)
class Replay:
    """Shaped logits [C, V] and uniforms [C] of the step; of all its forwards, experts [N, L, C, k], gaps [N, L, C]."""

    shaped: np.ndarray
    uniform: np.ndarray
    router: np.ndarray
    gaps: np.ndarray


def _replay(model: Model, prompt: Sequence[int], spec: CanvasSpec, drafts: Sequence[Draft], at: Difference) -> Replay:
    """The block up to step ``at``, fed with what the drafts say was fed."""
    text, masks, settings = model.config.text, spec.masks, spec.settings
    noise = block_noise(
        spec.seed,
        block=spec.block,
        attempt=spec.attempt,
        steps=settings.max_denoising_steps,
        length=model.config.canvas_length,
        vocab_size=text.vocab_size,
    )
    start = given(masks.clamp, given(masks.init, noise.start))
    fed = [start] + [draft.canvas for draft in drafts if draft.block == at.block]
    cache = _committed(model, prompt, settings, drafts, at.block)
    shaped, routers, gaps = None, [], []
    for step, temperature in enumerate(rules.temperatures(settings)[: at.step]):
        found = model.inspect(cache, fed[step][None], previous=shaped, want=WANTED)
        logits = np.array(found["logits"])
        logits[0, : masks.banned_until, list(masks.banned)] = -np.inf
        shaped = logits / temperature
        routers.append(found["router"][0])
        gaps.append(_router_gap(found["router_probabilities"][0], text.top_k_experts))
    assert shaped is not None, "a difference needs a step"
    return Replay(shaped[0], noise.draw[at.step - 1], np.stack(routers), np.stack(gaps))


def _committed(
    model: Model, prompt: Sequence[int], settings: GenerationConfig, drafts: Sequence[Draft], block: int
) -> Any:
    """The cache at the start of ``block``."""
    cache = model.encode(np.array(prompt, np.int32)[None])
    for earlier in range(block):
        last = [draft for draft in drafts if draft.block == earlier][-1]
        canvas, _ = rules.finish(last.argmax, settings.eos_token_ids, settings.pad_token_id)
        cache = model.encode(canvas[None], cache)
    return cache


def _router_gap(probabilities: np.ndarray, chosen: int) -> np.ndarray:
    """Distance between the last expert chosen and the first one not, [..., E] -> [...]; infinite if all are chosen."""
    ranked = np.sort(probabilities, -1)[..., ::-1]
    if chosen == ranked.shape[-1]:
        return np.full(ranked.shape[:-1], np.inf)
    return ranked[..., chosen - 1] - ranked[..., chosen]


def _decision_margin(
    shaped: np.ndarray, uniform: np.ndarray, free: np.ndarray, settings: GenerationConfig, at: Difference
) -> float:
    where = list(at.positions)
    if at.kind == "argmax":
        best = np.sort(shaped[where], -1)[:, -2:]
        return float((best[:, 1] - best[:, 0]).max())
    entropy = rules.entropy(shaped[free])
    if at.kind == "stop":
        return abs(float(entropy.mean()) - (settings.confidence_threshold or 0.0))
    if at.kind == "accept":
        order = np.argsort(entropy, kind="stable")
        before = np.cumsum(entropy[order]) - entropy[order]
        flipped = np.isin(np.flatnonzero(free)[order], where)
        return float(np.abs(before[flipped] - settings.entropy_bound).max())
    weight = np.exp(shaped[where] - shaped[where].max(-1, keepdims=True))
    cumulated = np.cumsum(weight, -1) / weight.sum(-1, keepdims=True)
    return float(np.abs(cumulated - uniform[where, None]).min(-1).max())
