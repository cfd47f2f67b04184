"""What a run has shown of kernels. On a GPU it is written down at the end, for ``kernels="auto"`` goes by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


class Proofs:
    """Kernels that were shown to be right, by the file that tests them: it counts only where all of it has passed."""

    def __init__(self):
        self._shown: dict[Path, set[tuple[str, str]]] = {}
        self._passed: Counter[Path] = Counter()

    def of(self, test, place: str, record: Callable[..., None]) -> Callable[[str, torch.dtype], None]:
        def write(kernel: str, dtype: torch.dtype) -> None:
            name = str(dtype).removeprefix("torch.")
            if place == "cuda":
                self._shown.setdefault(test.path, set()).add((kernel, name))
            else:
                record(what="interpreted", kernel=kernel, dtype=name)

        return write

    def passed(self, path: Path) -> None:
        self._passed[path] += 1

    def proven(self, asked: Iterable[Path]) -> list[tuple[str, str]]:
        """``asked``: the file of every test that was to run. One that failed, or never ran, takes its file's proof."""
        whole = {path for path, count in Counter(asked).items() if self._passed[path] == count}
        return sorted(set().union(*(shown for path, shown in self._shown.items() if path in whole)))


PROOFS = Proofs()
