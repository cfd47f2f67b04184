"""The seam: ``backend.Model`` on MLX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..backend import CanvasSpec, CanvasView
from ..config import ModelConfig
from .cache import MLXCache, empty_cache
from .network import Network, Trace
from .step import Denoiser, State
from .vocabulary import log_probabilities
from .weights import Weights

CHUNK = 512  # tokens per encoder pass: bounds the score matrix of a long prompt


class MLXModel:
    """DiffusionGemma on MLX's default device."""

    def __init__(
        self,
        config: ModelConfig,
        network: Network,
        weights: Weights,
        described: Mapping[str, Any] | None = None,
        *,
        compiled: bool = False,
        survivors: bool = False,
        hold: bool = False,
    ):
        """``compiled``, ``survivors``, ``hold``: see ``step.Denoiser``; ``described`` is what was decided at load."""
        self.config, self.network, self.weights = config, network, weights
        self.described = dict(described or {"kernels": {"mode": "ops", "fused": []}})
        self.denoiser = Denoiser(network, config, compiled=compiled, survivors=survivors, hold=hold)

    def describe(self) -> dict[str, Any]:
        remarks = self.weights.remarks
        return {
            "backend": "mlx",
            "device": str(mx.default_device().type).rpartition(".")[2],
            "dtype": self.weights.dtype,
            "weight_bytes": self.weights.nbytes,
            "formats": dict(remarks.formats),
            **self.described,
            "compiled": self.denoiser.compiled,
            "approximations": [*remarks.approximations, *approximations(self.denoiser)],
            "notes": list(remarks.notes),
        }

    def peak_memory(self) -> int:
        """Most bytes MLX had allocated at once."""
        return mx.get_peak_memory()

    def encode(
        self,
        tokens: np.ndarray,
        cache: MLXCache | None = None,
        *,
        lengths: np.ndarray | None = None,
        score: bool = False,
    ) -> MLXCache:
        """Read ``tokens`` [B, L] in chunks; see ``backend.Model``. Submitted, waited for only to return scores."""
        tokens = np.asarray(tokens)
        counts = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths, np.int64)
        if cache is None:
            cache = empty_cache(self.config.text, len(tokens), self.network.dtype)
        assert len(tokens) == len(cache.lengths), (len(tokens), len(cache.lengths))
        cache.scores = np.full(tokens.shape, np.nan, np.float32) if score else None
        # What lies behind a row's end is never stored, but it is embedded: any id will do.
        ids = np.where(np.arange(tokens.shape[1]) < counts[:, None], tokens, 0).astype(np.int32)
        cache.reserve(int((cache.lengths + counts).max()))
        for start in range(0, int(counts.max()), CHUNK):
            stop = min(start + CHUNK, int(counts.max()))
            part = np.clip(counts - start, 0, stop - start)
            hidden = self.network.encode(mx.array(ids[:, start:stop]), cache, part, hidden=score)
            mx.async_eval(*(x for layer in cache.layers for x in (layer.k, layer.v)))
            if hidden is not None and cache.scores is not None:
                self._score(hidden, ids, counts, start, cache.scores)
        return cache

    def _score(self, hidden: mx.array, ids: np.ndarray, counts: np.ndarray, start: int, into: np.ndarray) -> None:
        """Fill ``into`` [B, L] with log p of the tokens that ``hidden`` [B, T, D], from ``start`` on, predicts."""
        targets = ids[:, start + 1 : start + 1 + hidden.shape[1]]
        rows, width = targets.shape
        if width == 0:
            return
        found = log_probabilities(self.network, hidden[:, :width].flatten(0, 1), mx.array(targets).flatten())
        at = np.arange(start + 1, start + 1 + width)
        into[:, at] = np.where(at < counts[:, None], np.array(found).reshape(rows, width), np.nan)

    def begin(
        self, cache: MLXCache, specs: Sequence[CanvasSpec], *, commit: tuple[np.ndarray, np.ndarray] | None = None
    ) -> State:
        """Start a block behind ``cache``, after reading ``commit`` into it."""
        if commit is not None:
            self.encode(commit[0], cache, lengths=commit[1])
        return self.denoiser.begin(cache, specs)

    def step(self, state: State) -> State:
        return self.denoiser.step(state)

    def read(self, state: State) -> CanvasView:
        return self.denoiser.read(state)

    def inspect(
        self,
        cache: MLXCache,
        canvas: np.ndarray,
        *,
        previous: np.ndarray | None = None,
        want: Sequence[str] = ("logits",),
    ) -> Mapping[str, np.ndarray]:
        """One forward that explains itself; see ``backend.Model``."""
        canvas = np.asarray(canvas, np.int32)
        soft = None if previous is None else self.network.soften(mx.array(np.asarray(previous, np.float32)))
        prefix, trace = self.network.prefix(cache, canvas.shape[1]), Trace()
        hidden = self.network.decode(mx.array(canvas), prefix, soft, trace=trace)
        rows = (*canvas.shape, -1)
        made = {
            "logits": lambda: self.network.logits(hidden),
            "hidden": lambda: hidden.astype(mx.float32),
            "router": lambda: mx.stack([x.reshape(rows) for x in trace.chosen], 1).astype(mx.int32),
            "router_probabilities": lambda: mx.stack([x.reshape(rows) for x in trace.odds], 1),
        }
        return {name: np.array(made[name]()) for name in want}


def approximations(denoiser: Denoiser) -> Iterator[str]:
    """What was asked for that is not exact."""
    if denoiser.survivors:
        yield "self_conditioning='survivors': tokens below e^-10 of a position's likeliest are left out"
    if denoiser.hold:
        yield "tail='hold': behind the end of a text, what no longer changes is not computed again"
