"""What a run has shown of kernels. On a GPU it is written down at the end, for ``kernels="auto"`` goes by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


class Proofs:
    """Kernels that were shown to be right, by the file that tests them: one failure there, and none of it counts."""

    def __init__(self):
        self._shown: dict[Path, set[tuple[str, str]]] = {}
        self._failed: set[Path] = set()

    def of(self, test, place: str, record: Callable[..., None]) -> Callable[[str, torch.dtype], None]:
        def write(kernel: str, dtype: torch.dtype) -> None:
            name = str(dtype).removeprefix("torch.")
            if place == "cuda":
                self._shown.setdefault(test.path, set()).add((kernel, name))
            else:
                record(what="interpreted", kernel=kernel, dtype=name)

        return write

    def failed(self, path: Path) -> None:
        self._failed.add(path)

    def proven(self) -> list[tuple[str, str]]:
        return sorted(set().union(*(shown for path, shown in self._shown.items() if path not in self._failed)))


PROOFS = Proofs()
