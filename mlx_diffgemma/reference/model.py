"""The reference behind the seam: a cache that keeps everything, a step that calls the rules row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import machine
from ..backend import TEXT_ONLY, CanvasSpec, CanvasView, given
from ..config import UNSET, ModelConfig
from ..sampling import rules
from ..sampling.noise import BlockNoise, block_noise
from .network import KeyValues, Network


@dataclass
class ReferenceCache:
    """Per row, per layer: keys and values of every position."""

    rows: list[list[KeyValues]]
    scores: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row[0][0]) for row in self.rows], np.int64)

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for row in self.rows for k, v in row)

    def select(self, rows: Sequence[int]) -> ReferenceCache:
        return ReferenceCache([self.rows[i] for i in rows])

    def concat(self, other: ReferenceCache) -> ReferenceCache:
        return ReferenceCache(self.rows + other.rows)


@dataclass(frozen=True)
class Row:
    """One canvas in progress."""

    spec: CanvasSpec
    noise: BlockNoise
    prefix: list[KeyValues]
    free: np.ndarray
    canvas: np.ndarray
    argmax: np.ndarray
    accepted: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray
    soft: np.ndarray | None = None
    history: list[np.ndarray] = field(default_factory=list)
    steps: int = 0
    done: bool = False


@dataclass(frozen=True)
class ReferenceState:
    rows: list[Row]


class ReferenceModel:
    def __init__(self, config: ModelConfig, network: Network):
        self.config, self.network = config, network

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "reference",
            "device": "cpu",
            "dtype": "float32",
            "kernels": "numpy",
            "weight_bytes": sum(w.nbytes for w in self.network.weights.values()),
            "approximations": [],
            "notes": [TEXT_ONLY] if self.config.vision else [],
        }

    def peak_memory(self) -> int:
        return machine.peak_memory()

    def encode(
        self,
        tokens: np.ndarray,
        cache: ReferenceCache | None = None,
        *,
        lengths: np.ndarray | None = None,
        score: bool = False,
    ) -> ReferenceCache:
        tokens = np.asarray(tokens)
        counts = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
        cache = cache or ReferenceCache([self.network.empty() for _ in tokens])
        cache.scores = scores = np.full(tokens.shape, np.nan, np.float32) if score else None
        for i, count in enumerate(counts):
            if count == 0:
                continue
            hidden, cache.rows[i] = self.network.encode(tokens[i, :count], cache.rows[i])
            if scores is not None:
                log_p = log_softmax(self.network.logits(hidden[:-1]))
                scores[i, 1:count] = np.take_along_axis(log_p, tokens[i, 1:count, None].astype(np.int64), -1)[:, 0]
        return cache

    def begin(
        self, cache: ReferenceCache, specs: Sequence[CanvasSpec], *, commit: tuple[np.ndarray, np.ndarray] | None = None
    ) -> ReferenceState:
        if commit is not None:
            self.encode(commit[0], cache, lengths=commit[1])
        return ReferenceState([self._start(spec, prefix) for spec, prefix in zip(specs, cache.rows, strict=True)])

    def _start(self, spec: CanvasSpec, prefix: list[KeyValues]) -> Row:
        length, vocab = self.config.canvas_length, self.config.text.vocab_size
        steps = spec.settings.max_denoising_steps
        noise = block_noise(
            spec.seed, block=spec.block, attempt=spec.attempt, steps=steps, length=length, vocab_size=vocab
        )
        masks = spec.masks.checked(length, vocab)
        canvas = given(masks.clamp, given(masks.init, noise.start))
        return Row(
            spec, noise, prefix,
            free=given(masks.clamp, np.full(length, UNSET)) == UNSET,
            canvas=canvas,
            argmax=canvas,
            accepted=np.zeros(length, bool),
            entropy=np.zeros(length, np.float32),
            confidence=np.zeros(length, np.float32),
            done=spec.decided(length),
        )  # fmt: skip

    def step(self, state: ReferenceState) -> ReferenceState:
        return ReferenceState([row if row.done else self._step(row) for row in state.rows])

    def _step(self, row: Row) -> Row:
        settings, masks, at = row.spec.settings, row.spec.masks, row.steps
        hidden, _, _ = self.network.decode(row.canvas, row.prefix, row.soft)
        logits = self.network.logits(hidden)
        logits[: masks.banned_until, list(masks.banned)] = -np.inf
        shaped = logits / rules.temperatures(settings)[at]
        argmax = given(masks.clamp, shaped.argmax(-1).astype(np.int32))
        entropy = rules.entropy(shaped)
        drawn = shaped.argmax(-1) if settings.temperature == 0 else rules.draw(shaped, row.noise.draw[at])
        accepted = rules.accept(entropy, settings.entropy_bound, row.free)
        fresh = given(masks.renoise_from, row.noise.renoise[at])
        canvas = given(masks.clamp, np.where(accepted, drawn, fresh).astype(np.int32))
        stop = (
            settings.stability_threshold is not None
            and settings.confidence_threshold is not None
            and rules.stable(row.history, argmax, settings.stability_threshold)
            and rules.confident(entropy, settings.confidence_threshold, row.free)
        )
        return replace(
            row,
            canvas=canvas,
            argmax=argmax,
            accepted=accepted,
            entropy=entropy,
            confidence=np.exp(log_softmax(shaped).max(-1)),
            soft=self.network.soften(shaped),
            history=[*row.history, argmax],
            steps=at + 1,
            done=stop or at + 1 == settings.max_denoising_steps,
        )

    def read(self, state: ReferenceState) -> CanvasView:
        def stack(name: str, dtype: type) -> np.ndarray:
            return np.stack([getattr(row, name) for row in state.rows]).astype(dtype)

        return CanvasView(
            canvas=stack("canvas", np.int32),
            argmax=stack("argmax", np.int32),
            accepted=stack("accepted", np.bool_),
            entropy=stack("entropy", np.float32),
            confidence=stack("confidence", np.float32),
            done=stack("done", np.bool_),
            steps=stack("steps", np.int32),
        )

    def inspect(
        self,
        cache: ReferenceCache,
        canvas: np.ndarray,
        *,
        previous: np.ndarray | None = None,
        want: Sequence[str] = ("logits",),
    ) -> Mapping[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {"logits": [], "hidden": [], "router": [], "router_probabilities": []}
        for i, prefix in enumerate(cache.rows):
            soft = None if previous is None else self.network.soften(previous[i].astype(np.float32))
            hidden, choices, odds = self.network.decode(np.asarray(canvas)[i], prefix, soft)
            found["hidden"].append(hidden)
            found["logits"].append(self.network.logits(hidden))
            found["router"].append(np.stack(choices).astype(np.int32))
            found["router_probabilities"].append(np.stack(odds))
        return {name: np.stack(found[name]) for name in want}


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
