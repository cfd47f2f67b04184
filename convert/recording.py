"""What the source said to every trial, kept on disk so that it is gone from memory before the other model comes.

At 262,144 tokens one canvas has 268 MB of logits. Kept exactly, in float32, are the logits of some positions of every
canvas, chosen by a seed. The shaped logits of the first forward are the self-conditioning of the second; they are kept
whole, in float16, and it is these rounded ones that both models are given, so that the rounding measures nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_diffgemma.backend import Model
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import CheckpointError, OptionError

from .quality import divergence, overlap
from .questions import Trial, rows_at_once

MODES = ("without", "with")  # self-conditioning
WITHOUT, WITH = range(2)
BUDGET = 8_000_000_000  # bytes of temporary files, and no more than half of what is free
FEW = 32  # positions of a canvas, where not all can be kept
MOST_TRIALS = 128


@dataclass(frozen=True)
class Sample:
    """How much is measured: trials, positions per canvas of them, and the bytes that the recording takes."""

    trials: int
    positions: int
    nbytes: int


def sample(config: ModelConfig, wanted: int, folder: Path, budget: int = BUDGET) -> Sample:
    """All positions of ``wanted`` trials if they are within the budget, else ``FEW`` each of as many as are.

    Raises:
        OptionError: not even one fits on the disk.
    """
    room = min(budget, shutil.disk_usage(folder).free // 2)
    canvas, vocab = config.canvas_length, config.text.vocab_size
    wanted = min(wanted, MOST_TRIALS)
    for positions in (canvas, min(FEW, canvas)):
        each = vocab * (2 * canvas + len(MODES) * 4 * positions)
        if wanted * each <= room:
            return Sample(wanted, positions, wanted * each)
    if room < each:
        raise OptionError(
            f"{folder} has no room for {each / 1e6:.0f} MB of temporary files; set TMPDIR to another disk"
        )
    return Sample(int(room // each), positions, int(room // each) * each)


@dataclass(frozen=True)
class Comparison:
    """What another model did on N trials, per mode: KL in nats [2, N, S]; top-1 kept, bool [2, N, C]; the share of the
    source's experts that it chose, [2, N, L, C]. Of a mode that was not asked for, nan and False."""

    kl: np.ndarray
    top1: np.ndarray
    experts: np.ndarray


class Recording:
    """The source's side of every trial."""

    def __init__(self, folder: Path, trials: Sequence[Trial], positions: int, config: ModelConfig, seed: int):
        self.trials, self.config = list(trials), config
        count, canvas, text = len(self.trials), config.canvas_length, config.text
        chosen = [np.random.default_rng((seed, i)).permutation(canvas)[:positions] for i in range(count)]
        self.positions = np.sort(np.stack(chosen), -1)  # [N, S]
        shapes = {"previous": (count, canvas), "logits": (len(MODES), count, positions)}
        self.previous, self.logits = (
            np.lib.format.open_memmap(
                folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(*shapes[name], text.vocab_size)
            )
            for name, dtype in (("previous", np.float16), ("logits", np.float32))
        )
        self.argmax = np.zeros((len(MODES), count, canvas), np.int32)
        self.experts = np.zeros((len(MODES), count, text.num_hidden_layers, canvas, text.top_k_experts), np.int32)

    def record(self, model: Model) -> None:
        """Ask the source: both modes, the second conditioned on what the first said."""
        limit = np.finfo(np.float16).max
        for mode, rows, logits, experts in self._ask(model, (WITHOUT, WITH), len(self.trials)):
            if mode == WITHOUT:
                warmth = np.array([self.trials[i].temperature for i in rows], np.float32)
                self.previous[rows] = np.clip(logits / warmth[:, None, None], -limit, limit)
            self.logits[mode, rows] = self._kept(rows, logits)
            self.argmax[mode, rows] = logits.argmax(-1)
            self.experts[mode, rows] = experts

    def compare(self, model: Model, modes: Sequence[int] = (WITHOUT, WITH), trials: int | None = None) -> Comparison:
        """Ask another model the same; of the first ``trials`` only, if that is given."""
        count = len(self.trials) if trials is None else min(trials, len(self.trials))
        kl = np.full((len(MODES), count, self.positions.shape[1]), np.nan)
        top1 = np.zeros((len(MODES), count, self.config.canvas_length), bool)
        shares = np.full(self.experts[:, :count].shape[:-1], np.nan)
        for mode, rows, logits, experts in self._ask(model, modes, count):
            for i, found in zip(rows, self._kept(rows, logits), strict=True):
                warmth = self.trials[i].temperature
                kl[mode, i] = divergence(self.logits[mode, i] / warmth, found / warmth)
            top1[mode, rows] = logits.argmax(-1) == self.argmax[mode, rows]
            shares[mode, rows] = overlap(self.experts[mode, rows], experts)
        return Comparison(kl, top1, shares)

    def _kept(self, rows: range, logits: np.ndarray) -> np.ndarray:
        """The logits of the kept positions, [B, C, V] -> [B, S, V]."""
        return np.take_along_axis(logits, self.positions[rows][..., None], 1)

    def _ask(
        self, model: Model, modes: Sequence[int], count: int
    ) -> Iterator[tuple[int, range, np.ndarray, np.ndarray]]:
        """(mode, trials, logits float32 [B, C, V], experts int32 [B, L, C, k]), in batches of the same rows always."""
        batch = rows_at_once(self.config)
        for start in range(0, count, batch):
            rows = range(start, min(start + batch, count))
            lengths = np.array([len(self.trials[i].context) for i in rows], np.int64)
            tokens = np.zeros((len(rows), int(lengths.max())), np.int32)
            for line, i in zip(tokens, rows, strict=True):
                line[: len(self.trials[i].context)] = self.trials[i].context
            cache = model.encode(tokens, lengths=lengths)
            canvas = np.stack([self.trials[i].canvas for i in rows])
            for mode in modes:
                previous = self.previous[rows].astype(np.float32) if mode == WITH else None
                found = model.inspect(cache, canvas, previous=previous, want=("logits", "router"))
                if not np.isfinite(found["logits"]).all():
                    raise CheckpointError("a model's logits are not finite; its weights are damaged, or out of range")
                yield mode, rows, found["logits"], found["router"]
