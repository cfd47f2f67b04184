"""The torch model behind the seam: see ``mlx_diffgemma.backend.Model``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlx_diffgemma import machine
from mlx_diffgemma.backend import CanvasSpec, CanvasView
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import OptionError

from .cache import Prefix, TorchCache
from .graphs import Capture, Graphs, GraphState
from .kernels.head import log_probabilities, logits_chunks, soften
from .kernels.ops import Ops
from .network import Network, Trace
from .rooms import Rooms
from .step import Commit, State, begin, step
from .view import Reader, unpack
from .weights import Weights

CHUNK = {"cpu": 512, "cuda": 2048}  # tokens of one encoding pass: on a GPU, enough for the experts to be worth reading
SLICE = 2**23  # logits of an inspection softened at a time
OWED = "a committed canvas is read by the first step of its block: take it first"
INSPECTED = ("logits", "hidden", "router", "router_probabilities")


class TorchModel:
    """One checkpoint on one device. ``network`` holds the weights, ``device`` where they are."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        ops: Ops,
        capture: Capture | None = None,
        whole: bool = False,
        about: Mapping[str, Any] | None = None,
    ):
        """``capture``: how a step becomes a graph, if it does. ``whole``: see ``TorchCache``; a graph needs it.

        ``about``: what more there is to ``describe``.
        """
        self.about = dict(about or {})
        self.whole = whole or capture is not None
        self.config, self.device, self.dtype = config, device, dtype
        self.network = Network(config.text, weights, ops)
        self.graphs = Graphs(functools.partial(step, config, self.network), capture) if capture else None
        self.rooms = Rooms()
        self.reader = Reader(device)
        self.chunk = CHUNK[device.type]

    def describe(self) -> dict[str, Any]:
        weights, remarks = self.network.weights, self.network.weights.remarks
        return {
            "backend": self.device.type,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_bytes": weights.nbytes,
            "formats": dict(remarks.formats),
            "approximations": list(remarks.approximations),
            "notes": list(remarks.notes),
            **self.about,
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
        ids = np.ascontiguousarray(tokens, np.int64)
        counts = np.full(len(ids), ids.shape[1], np.int64) if lengths is None else np.asarray(lengths, np.int64)
        if cache is None:
            cache = TorchCache(self.config, len(ids), self.device, self.dtype, whole=self.whole)
        assert ids.shape[:1] == counts.shape == cache.lengths.shape, "one row of tokens per row of the cache"
        assert not cache.owed, OWED
        cache.reserve(int((cache.lengths + counts).max()))
        streams = []
        for start in range(0, int(counts.max(initial=0)), self.chunk):
            width = min(self.chunk, int(counts.max()) - start)
            inside = np.clip(counts - start, 0, width)
            piece = torch.from_numpy(ids[:, start : start + width]).to(self.device)
            h = self.network.encode(piece, cache, cache.chunk(width, inside))
            cache.lengths += inside
            if score:
                streams.append(h.unflatten(0, piece.shape))
        cache.scores = self._scores(streams, ids, counts) if score else None
        return cache

    def _scores(self, streams: list[Tensor], ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        scores = np.full(ids.shape, np.nan, np.float32)
        rows, positions = np.nonzero(np.arange(1, ids.shape[1]) < counts[:, None])  # position - 1 foretells position
        if not len(rows):
            return scores
        at = [torch.from_numpy(index).to(self.device) for index in (rows, positions)]
        hidden = torch.cat(streams, 1)[at[0], at[1]]
        target = torch.from_numpy(ids[rows, positions + 1]).to(self.device)
        table, cap = self.network.weights.embed_tokens, self.config.text.final_logit_softcapping
        scores[rows, positions + 1] = log_probabilities(hidden, table, cap, target).cpu().numpy()
        return scores

    # ---- denoising

    @torch.inference_mode()
    def begin(
        self,
        cache: TorchCache,
        specs: Sequence[CanvasSpec],
        *,
        commit: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> State | GraphState:
        """Start a block, one spec per row of the cache, which must not be extended before the block is over.

        What is committed is read by the block's first step, in one forward with it; until then the cache owes it. A
        block in which nothing is to be decided has no step, so there it is read at once.
        """
        assert len(specs) == len(cache.lengths), "one spec per row"
        assert not cache.owed, OWED
        for spec in specs:
            spec.masks.checked(self.config.canvas_length, self.config.text.vocab_size)
        pending = None
        if commit is not None and all(spec.decided(self.config.canvas_length) for spec in specs):
            self.encode(commit[0], cache, lengths=commit[1])
        elif commit is not None and commit[1].any():
            pending = self._commit(cache, *commit)
        room = self.rooms.house(cache) if self.graphs else None
        state = begin(self.config, self.network, self._prefix(cache), specs, pending)
        return self.graphs.begin(state, room) if self.graphs and room else state

    def _commit(self, cache: TorchCache, tokens: np.ndarray, lengths: np.ndarray) -> Commit:
        """Room for ``tokens`` [B, T], of which ``lengths`` [B] count; their keys come with the first step."""
        ids = torch.from_numpy(np.ascontiguousarray(tokens, np.int64)).to(self.device)
        counts = np.asarray(lengths, np.int64)
        chunk = cache.chunk(ids.shape[1], counts)
        cache.lengths += counts
        cache.owed = True
        return Commit(ids, cache, chunk)

    def _prefix(self, cache: TorchCache) -> Prefix:
        first = torch.from_numpy(cache.lengths).to(self.device)[:, None]
        positions = first + torch.arange(self.config.canvas_length, device=self.device)
        return cache.prefix(self.network.turns(positions))

    @torch.inference_mode()
    def step(self, state: State | GraphState) -> State | GraphState:
        """One denoising step, enqueued on the device and not waited for."""
        assert state.owing is None or state.owing.owed, "this step has been taken, and has read what was committed"
        after: State | GraphState
        if isinstance(state, GraphState):
            assert self.graphs, "a state of another model"
            after = self.graphs.step(state)
        else:
            after = step(self.config, self.network, state)
        if state.owing is not None:
            state.owing.owed = False
        return after

    @torch.inference_mode()
    def read(self, state: State | GraphState) -> CanvasView:
        """The last step's results, in one transfer of 20 bytes per position."""
        return unpack(self.reader(state.view()))

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
        assert not cache.owed, OWED
        unknown = sorted(set(want) - set(INSPECTED))
        if unknown:
            raise OptionError(f"want={unknown[0]!r} is unknown; choose of {', '.join(INSPECTED)}")
        ids = torch.from_numpy(np.ascontiguousarray(canvas, np.int64)).to(self.device)
        trace = Trace()
        hidden = self.network.denoise(ids, self._soft(ids, previous), self._prefix(cache), trace=trace)
        found = {}
        if "logits" in want:
            out = np.empty((len(hidden), self.config.text.vocab_size), np.float32)
            table, cap = self.network.weights.embed_tokens, self.config.text.final_logit_softcapping
            for part, block in logits_chunks(hidden, table, cap):
                out[:, part] = block.cpu().numpy()
            found["logits"] = out.reshape(*ids.shape, -1)
        if "hidden" in want:
            found["hidden"] = hidden.unflatten(0, ids.shape).float().cpu().numpy()
        if "router" in want:
            found["router"] = by_row(trace.chosen, ids).int().cpu().numpy()
        if "router_probabilities" in want:
            found["router_probabilities"] = by_row(trace.odds, ids).cpu().numpy()
        return found

    def _soft(self, ids: Tensor, previous: np.ndarray | None) -> Tensor | None:
        """The soft embedding [B C, D] of given logits, some rows at a time."""
        if previous is None:
            return None
        flat = torch.from_numpy(np.asarray(previous, np.float32).reshape(ids.numel(), -1))
        table, rows = self.network.weights.embed_tokens, max(1, SLICE // flat.shape[1])
        return torch.cat([soften(part.to(self.device), table, self.network.scale) for part in flat.split(rows)])


def by_row(layers: list[Tensor], ids: Tensor) -> Tensor:
    """One [B C, n] per layer -> [B, layers, C, n]."""
    return torch.stack([layer.unflatten(0, ids.shape) for layer in layers], 1)
