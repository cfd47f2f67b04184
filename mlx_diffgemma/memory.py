"""What a model will take in memory, added up before it is loaded, and whether that fits.

Each backend knows what it holds and makes the ``MemoryPlan`` of a checkpoint; here is what they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .backend import Choice, LoadOptions, implementation
from .config import ModelConfig
from .errors import MemoryBudgetError
from .formats import Checkpoint
from .tensors import item_bytes, tensor_table

HEADROOM = 0.1  # of the weights, for activations and the cache of a short prompt, where nobody counts them
SPARSE = 1.5  # bytes per weight on disk: dense checkpoints have 2 or 4, quantized ones at most 1.1


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device, by what takes them.

    Args:
        parts: name -> bytes; ``cache`` grows with the tokens.
        tokens: of prompt and answer together, per row; 0 where they were not counted.
        batch: rows.
    """

    parts: Mapping[str, int]
    tokens: int = 0
    batch: int = 1

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def describe(self) -> dict[str, Any]:
        return {"total": self.total, "parts": dict(self.parts), "tokens": self.tokens, "batch": self.batch}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> MemoryPlan:
        return cls(described["parts"], described["tokens"], described["batch"])

    def line(self, place: str) -> str:
        """On ``place``, in one line, largest first; what would show as 0.0 is left out."""
        unit, name = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        shown = [f"{part} {size / unit:.1f}{self._meant(part)}" for part, size in parts if size >= 0.05 * unit]
        return f"{self.total / unit:.1f} {name} on {place}: {', '.join(shown)}"

    def _meant(self, part: str) -> str:
        rows = f" in {self.batch} rows" if self.batch > 1 else ""
        return f" at {self.tokens:,} tokens{rows}" if part == "cache" and self.tokens else ""


def rough_plan(weights: int) -> MemoryPlan:
    """Where only the weights are counted."""
    return MemoryPlan({"weights": weights, "cache and activations": int(weights * HEADROOM)})


def is_packed(config: ModelConfig, stored: int) -> bool:
    """Whether ``stored`` bytes of weights can only be quantized ones."""
    return stored < SPARSE * sum(row.size for row in tensor_table(config).values())


def width_of(config: ModelConfig, dtype: str | None) -> int:
    """Bytes of an element in the dtype asked for, or in the config's."""
    return item_bytes(config) if dtype is None else 4 if dtype == "float32" else 2


def check_fit(
    choice: Choice,
    config: ModelConfig,
    stored: int,
    checkpoint: Checkpoint | None = None,
    options: LoadOptions | None = None,
) -> None:
    """Whether the backend has room for ``stored`` bytes of weights; where it cannot tell, it has.

    ``checkpoint`` is None before it is downloaded.

    Raises:
        MemoryBudgetError: it cannot fit.
        OptionError, BackendError: options that the device cannot have.
    """
    code = implementation(choice)
    plan = code.plan(config, stored, checkpoint, device=choice.device, options=options or LoadOptions())
    free = code.memory(choice.device)
    if free and plan.total > free:
        raise MemoryBudgetError(
            f"the model needs {plan.line(f'backend {choice.name!r}')}; {free / 1e9:.1f} GB are free: close other "
            "programs, use a machine with more memory, or a smaller checkpoint"
        )
