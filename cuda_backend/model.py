"""The torch model behind the seam: see ``mlx_diffgemma.backend.Model``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlx_diffgemma import machine
from mlx_diffgemma.backend import CanvasSpec, CanvasView
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import OptionError

from .cache import Prefix, TorchCache
from .network import Network, Trace
from .step import State, begin, step
from .vocabulary import logits, scratch, slices, soften
from .weights import Weights

CHUNK = 512  # tokens of one encoding pass, so that a mask stays small beside the keys it hides
INSPECTED = ("logits", "hidden", "router", "router_probabilities")


class TorchModel:
    """One checkpoint on one device. ``network`` holds the weights, ``device`` where they are."""

    def __init__(self, config: ModelConfig, weights: Weights, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.network = Network(config.text, weights)

    def describe(self) -> dict[str, Any]:
        weights, remarks = self.network.weights, self.network.weights.remarks
        return {
            "backend": self.device.type,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernels": "ops",
            "weight_bytes": weights.nbytes,
            "formats": dict(remarks.formats),
            "approximations": list(remarks.approximations),
            "notes": list(remarks.notes),
        }

    def peak_memory(self) -> int:
        """Most bytes in use so far: torch's own count on a GPU, the process's on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else machine.peak_memory()

    # ---- reading

    @torch.inference_mode()
    def encode(
        self,
        tokens: np.ndarray,
        cache: TorchCache | None = None,
        *,
        lengths: np.ndarray | None = None,
        score: bool = False,
    ) -> TorchCache:
        """Read ``tokens`` [B, L] causally, in pieces; ``cache`` is extended in place and returned, or a new one made.

        ``lengths`` [B] counts the tokens of each row that are real. ``score`` sets ``cache.scores`` float32 [B, L]: log
        p of each token given those before it in this call; the first has none (nan), nor has padding.
        """
        ids = np.asarray(tokens, np.int64)
        counts = np.full(len(ids), ids.shape[1], np.int64) if lengths is None else np.asarray(lengths, np.int64)
        cache = cache or TorchCache(self.config, len(ids), self.device, self.dtype)
        assert ids.shape[:1] == counts.shape == cache.lengths.shape, "one row of tokens per row of the cache"
        streams = []
        for start in range(0, int(counts.max(initial=0)), CHUNK):
            width = min(CHUNK, int(counts.max()) - start)
            inside = np.clip(counts - start, 0, width)
            piece = torch.from_numpy(ids[:, start : start + width]).to(self.device)
            h = self.network.encode(piece, cache, cache.chunk(width, inside))
            cache.lengths += inside
            if score:
                streams.append(h)
        cache.scores = self._scores(streams, ids, counts) if score else None
        return cache

    def _scores(self, streams: list[Tensor], ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        scores = np.full(ids.shape, np.nan, np.float32)
        rows, positions = np.nonzero(np.arange(1, ids.shape[1]) < counts[:, None])  # position - 1 foretells position
        if not len(rows):
            return scores
        at = [torch.from_numpy(index).to(self.device) for index in (rows, positions)]
        hidden = self.network.norm(torch.cat(streams, 1)[at[0], at[1]], self.network.weights.norm)
        target = torch.from_numpy(ids[rows, positions + 1]).to(self.device)[:, None]
        found = []
        for part, block in self._logits(hidden):
            chosen = block.gather(1, target[part])[:, 0]
            greatest = block.amax(-1, keepdim=True)
            found.append(chosen - greatest[:, 0] - block.sub_(greatest).exp_().sum(-1).log())
        scores[rows, positions + 1] = torch.cat(found).cpu().numpy()
        return scores

    def _logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """float32 logits of hidden states [N, D], a slice of rows at a time, in a buffer that the next one reuses."""
        table = self.network.weights.embed_tokens
        buffer = scratch(len(hidden), len(table), self.device).first
        for part in slices(len(hidden), len(table)):
            yield part, logits(hidden[part], table, self.config.text, buffer[: part.stop - part.start])

    # ---- denoising

    @torch.inference_mode()
    def begin(
        self,
        cache: TorchCache,
        specs: Sequence[CanvasSpec],
        *,
        commit: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> State:
        """Start a block, one spec per row of the cache, which must not be extended before the block is over."""
        if commit is not None:
            self.encode(commit[0], cache, lengths=commit[1])
        assert len(specs) == len(cache.lengths), "one spec per row"
        return begin(self.config, self.network, self._prefix(cache), specs)

    def _prefix(self, cache: TorchCache) -> Prefix:
        first = torch.from_numpy(cache.lengths).to(self.device)[:, None]
        positions = first + torch.arange(self.config.canvas_length, device=self.device)
        return cache.prefix(self.network.turns(positions))

    @torch.inference_mode()
    def step(self, state: State) -> State:
        """One denoising step, enqueued on the device and not waited for."""
        return step(self.config, self.network, state)

    @torch.inference_mode()
    def read(self, state: State) -> CanvasView:
        """The last step's results, in one transfer of 20 bytes per position."""
        length = self.config.canvas_length
        packed = torch.cat(
            [
                state.canvas,
                state.argmax,
                state.accepted.int(),
                state.entropy.view(torch.int32),
                state.confidence.view(torch.int32),
                state.done.int()[:, None],
                state.steps[:, None],
            ],
            dim=1,
        )
        host = packed.cpu().numpy()
        canvas, argmax, accepted, entropy, confidence = (host[:, i * length : (i + 1) * length] for i in range(5))
        return CanvasView(
            canvas=canvas.copy(),
            argmax=argmax.copy(),
            accepted=accepted.astype(np.bool_),
            entropy=entropy.copy().view(np.float32),
            confidence=confidence.copy().view(np.float32),
            done=host[:, -2].astype(np.bool_),
            steps=host[:, -1].copy(),
        )

    # ---- explaining

    @torch.inference_mode()
    def inspect(
        self,
        cache: TorchCache,
        canvas: np.ndarray,
        *,
        previous: np.ndarray | None = None,
        want: Sequence[str] = ("logits",),
    ) -> Mapping[str, np.ndarray]:
        """One forward on ``canvas`` [B, C]; see the protocol for ``want``.

        Raises:
            OptionError: something wanted that is not known.
        """
        unknown = sorted(set(want) - set(INSPECTED))
        if unknown:
            raise OptionError(f"want={unknown[0]!r} is unknown; choose of {', '.join(INSPECTED)}")
        ids = torch.from_numpy(np.asarray(canvas, np.int64)).to(self.device)
        trace = Trace()
        hidden = self.network.decode(ids, self._soft(ids, previous), self._prefix(cache), trace)
        flat = hidden.flatten(0, 1)
        found = {}
        if "logits" in want:
            out = np.empty((len(flat), self.config.text.vocab_size), np.float32)
            for part, block in self._logits(flat):
                out[part] = block.cpu().numpy()
            found["logits"] = out.reshape(*ids.shape, -1)
        if "hidden" in want:
            found["hidden"] = hidden.float().cpu().numpy()
        if "router" in want:
            found["router"] = torch.stack(trace.chosen, 1).int().cpu().numpy()
        if "router_probabilities" in want:
            found["router_probabilities"] = torch.stack(trace.odds, 1).cpu().numpy()
        return found

    def _soft(self, ids: Tensor, previous: np.ndarray | None) -> Tensor:
        table = self.network.weights.embed_tokens
        if previous is None:
            return table.new_zeros((*ids.shape, table.shape[1]))
        flat = np.asarray(previous, np.float32).reshape(ids.numel(), -1)
        parts = [
            soften(torch.from_numpy(flat[part]).to(self.device), table, self.network.scale)
            for part in slices(len(flat), len(table))
        ]
        return torch.cat(parts).view(*ids.shape, -1)
