"""A model that writes a script, character by character, and counts what is asked of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_diffgemma.backend import CanvasSpec, CanvasView
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.hub import DEMO
from mlx_diffgemma.prompts.processor import Processor
from tests.terminal.fakes import END, PAD, CodePoints, spelled

CANVAS, STEPS = 8, 3
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if enable_thinking %}think\n{% endif %}"
)


def processor(**settings: Any) -> Processor:
    generation = GenerationConfig(eos_token_ids=(END,), pad_token_id=PAD, max_tokens=64)
    return Processor(CodePoints(), TEMPLATE, {}, generation.replace(**settings))


@dataclass
class Scripted:
    """``script`` is a text, or a list of texts and ids; block b shows its b-th eight, then the end. Every row reads it.

    A block takes ``STEPS`` steps; at step s its first positions stand, s of ``STEPS`` of them, and the rest are ``?``.
    """

    script: Any
    steps: int = 0
    prompts: list[str] = field(default_factory=list)
    specs: list[CanvasSpec] = field(default_factory=list)

    def __post_init__(self) -> None:
        plain = ModelConfig.from_folder(DEMO)
        text = dataclasses.replace(plain.text, vocab_size=4_000_000, max_position_embeddings=256)
        self.config = dataclasses.replace(plain, canvas_length=CANVAS, text=text)

    def describe(self) -> dict[str, Any]:
        return {"backend": "scripted"}

    def peak_memory(self) -> int:
        return 1

    def encode(self, tokens: np.ndarray, cache: Any = None, *, lengths: np.ndarray, score: bool = False) -> Any:
        if cache is None:
            self.prompts += ["".join(map(chr, row[:n])) for row, n in zip(tokens, lengths, strict=True)]
        return cache or Kept()

    def begin(self, cache: Any, specs: list[CanvasSpec], *, commit: Any = None) -> Any:
        self.specs += specs
        return [(spec.block, 0) for spec in specs]

    def step(self, state: Any) -> Any:
        self.steps += 1
        return [(block, step + 1) for block, step in state]

    def read(self, state: Any) -> CanvasView:
        rows = []
        for block, step in state:
            ids = [*spelled(self.script), END][block * CANVAS : (block + 1) * CANVAS]
            ids += [PAD] * (CANVAS - len(ids))
            shown = CANVAS * step // STEPS
            rows.append(ids[:shown] + [ord("?")] * (CANVAS - shown))
        canvas, zeros = np.array(rows, np.int32), np.zeros((len(rows), CANVAS), np.float32)
        taken = np.array([step for _, step in state], np.int32)
        return CanvasView(canvas, canvas, zeros > 0, zeros, zeros, taken == STEPS, taken)


class Kept:
    """A cache that remembers nothing."""

    def select(self, rows: Any) -> Kept:
        return self

    def concat(self, other: Any) -> Kept:
        return self
