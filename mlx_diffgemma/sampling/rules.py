"""Acceptance, renoising and stopping: the rules of a denoising step, in NumPy. This is the specification.

One row is [C]; every function also takes leading batch axes where the shapes say so. Clamped positions take part in
nothing: they are not accepted, add no entropy, and do not count in the mean.
Source: transformers 5.23, ``EntropyBoundSampler`` and ``StableAndConfidentStoppingCriteria``; arXiv 2505.24857.
"""

from __future__ import annotations

import numpy as np

from ..config import GenerationConfig


def temperatures(settings: GenerationConfig) -> np.ndarray:
    """float32 [N]: the divisor of every step, first step first; in float32 arithmetic, as transformers has it."""
    total = settings.max_denoising_steps
    share = np.arange(total, 0, -1, dtype=np.float32) / np.float32(total)
    schedule = np.float32(settings.t_min) + np.float32(settings.t_max - settings.t_min) * share
    return schedule * np.float32(settings.temperature or 1.0)


def accept(entropy: np.ndarray, bound: float, free: np.ndarray) -> np.ndarray:
    """bool [C]: taken in order of entropy while all earlier ones together stay within ``bound`` nats.

    The first in line has nothing before it, so at least one free position is always accepted. Ties keep their order.
    """
    order = np.argsort(np.where(free, entropy, np.inf), kind="stable")
    ranked = np.where(free, entropy, 0).astype(np.float32)[order]
    chosen = np.cumsum(ranked, dtype=np.float32) - ranked <= np.float32(bound)
    accepted = np.zeros(entropy.shape, bool)
    accepted[order] = chosen
    return accepted & free


def stable(history: list[np.ndarray], argmax: np.ndarray, threshold: int) -> bool:
    """True when the last ``threshold`` argmax canvases of this block all equal ``argmax``."""
    if threshold == 0:
        return True
    return len(history) >= threshold and all(np.array_equal(past, argmax) for past in history[-threshold:])


def confident(entropy: np.ndarray, threshold: float, free: np.ndarray) -> bool:
    """True when the mean entropy of the free positions is strictly below ``threshold``; with none free, it is."""
    count = int(free.sum())
    return count == 0 or bool(np.where(free, entropy, 0).sum(dtype=np.float32) / np.float32(count) < threshold)


def draw(shaped: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Inverse CDF: the first id, in vocabulary order, whose cumulated weight exceeds ``uniform`` times the total.

    ``shaped`` float32 [..., V] are temperature-divided logits, ``uniform`` float32 [...]; int32 [...] comes back. Sums
    are in float64, so that the specification adds no error of its own over 262,144 terms.
    """
    weight = np.exp(shaped - shaped.max(-1, keepdims=True))
    cumulated = np.cumsum(weight, -1, dtype=np.float64)
    target = uniform[..., None] * cumulated[..., -1:]
    return (cumulated <= target).sum(-1).astype(np.int32)


def entropy(shaped: np.ndarray) -> np.ndarray:
    """float32 [...]: nats of softmax(shaped [..., V])."""
    shifted = shaped - shaped.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -(np.exp(log_p) * np.where(np.isfinite(log_p), log_p, 0)).sum(-1)


def finish(canvas: np.ndarray, eos: tuple[int, ...], pad: int | None) -> tuple[np.ndarray, int | None]:
    """A finished canvas with everything after its first end token padded, and where that token is (or ``None``)."""
    ends = np.flatnonzero(np.isin(canvas, eos))
    if not len(ends):
        return canvas, None
    first = int(ends[0])
    padded = canvas.copy()
    if pad is not None:
        padded[first + 1 :] = pad
    return padded, first
