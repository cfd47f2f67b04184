"""Starting a kernel, in one place, so that what would be started can be listed instead: see ``recording``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """How a kernel is cut up: its constants of compilation, and the warps and pipeline stages of a program."""

    constants: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def __getitem__(self, name: str) -> int:
        return self.constants[name]


@dataclass(frozen=True)
class Launch:
    """One start of ``kernel`` over ``grid``. ``args`` are in its order, ``constants`` by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any) -> None:
    """Run ``kernel`` (a ``triton.jit`` function): its arguments in order, then ``config``'s and further constants."""
    constants = config.constants | constants
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants, config.num_warps, config.num_stages))
        return
    kernel[grid](*args, **constants, num_warps=config.num_warps, num_stages=config.num_stages)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within, nothing runs: launches are listed. On meta tensors this gives those of the real model, for free."""
    global _recorded
    assert _recorded is None, "already recording"
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None
