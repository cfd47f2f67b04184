"""What a run measures, in order of importance, and how it stays within its time.

A job is one figure of one row. The jobs of a precision share its weights, so they run in one process (a stage); the
fixed order makes it possible to go on behind a job that ended its process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .gpu_floor import HEADS, PRECISIONS

EXPECTED = {  # seconds of a job until one like it was seen, weights not counted; the peer's compiler is slow
    "step": 12.0,
    "parts": 12.0,
    "fixed16": 12.0,
    "eager": 10.0,
    "routing": 5.0,
    "static": 100.0,
}
MARGIN = 1.2
SHARE = {"fp8": 0.42, "4bit": 0.5, "bf16": 1.0}  # of what is left, when a precision's turn comes in that order


@dataclass(frozen=True)
class Job:
    """``piece`` is a key of ``EXPECTED``. Transformers runs in ``mode`` eager or static, ours in mode graph."""

    precision: str
    head: str
    batch: int
    prompt: int
    piece: str
    what: str = "ours"
    mode: str = "graph"

    @property
    def identity(self) -> dict[str, str | int]:
        names = ("what", "mode", "precision", "head", "batch")
        return {name: getattr(self, name) for name in names} | {"prompt_tokens": self.prompt}

    @property
    def kind(self) -> str:
        return self.mode if self.mode == "static" else self.piece

    def __str__(self) -> str:
        return f"{self.what} {self.precision}/{self.head} batch {self.batch} prompt {self.prompt} {self.piece}"


@dataclass(frozen=True)
class Plan:
    precisions: tuple[str, ...] = ("fp8", "4bit", "bf16")
    heads: tuple[str, ...] = ("bf16", "fp8")
    batches: tuple[int, ...] = (1, 4, 8, 16)
    prompts: tuple[int, ...] = (1024, 8192, 32768)
    kernels: str = "fused"
    peer: bool = True
    quick: bool = False

    def jobs(self, precision: str) -> list[Job]:
        """Of one precision, the most important first."""
        heads = self._heads(precision)
        batch, prompt = self.batches[0], self.prompts[0]
        found = [Job(precision, head, batch, prompt, piece) for head in heads for piece in ("step", "fixed16", "parts")]
        if self.quick:
            return found
        found += [Job(precision, heads[0], batch, prompt, piece) for piece in ("eager", "routing")]
        peer = self.peer and precision == "bf16"
        if peer:
            found += [self._peer(piece, "eager") for piece in ("step", "fixed16")]
        for size in self.batches[1:]:
            found += [Job(precision, heads[0], size, prompt, piece) for piece in ("step", "fixed16")]
        for length in self.prompts[1:]:
            found += [Job(precision, heads[0], batch, length, piece) for piece in ("step", "parts")]
        if peer:
            found += [self._peer(piece, "static") for piece in ("step", "fixed16")]
        return found

    def _heads(self, precision: str) -> tuple[str, ...]:
        """The FP8 head belongs to packed weights; the 4-bit goal is set for it, so there it comes first."""
        heads = tuple(head for head in self.heads if precision != "bf16" or head == "bf16") or self.heads
        return tuple(sorted(heads, reverse=precision == "4bit"))

    def _peer(self, piece: str, mode: str) -> Job:
        return Job("bf16", "bf16", 1, self.prompts[0], piece, "transformers", mode)


def checked(plan: Plan) -> Plan:
    assert set(plan.precisions) <= set(PRECISIONS) and set(plan.heads) <= set(HEADS), plan
    return plan


@dataclass
class Budget:
    """Time until ``until``, and what a job of each kind took last. ``now`` is given by tests."""

    until: float
    now: Callable[[], float] = time.time
    seen: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.until - self.now()

    def expected(self, job: Job) -> float:
        return self.seen.get((job.what, job.kind), EXPECTED[job.kind]) * MARGIN

    def refusal(self, job: Job) -> str | None:
        """Why there is no time for ``job``, or None."""
        if self.expected(job) <= self.left:
            return None
        return f"{max(self.left, 0):.0f} s left, about {self.expected(job):.0f} needed"

    def took(self, job: Job, seconds: float) -> None:
        self.seen[job.what, job.kind] = seconds


def until_of(precision: str, precisions: Sequence[str], end: float, now: float) -> float:
    """When a precision's turn ends: the last one has all that is left."""
    share = 1.0 if precision == precisions[-1] else SHARE[precision]
    return now + (end - now) * share
