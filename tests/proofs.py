"""What a run has shown of kernels. On a GPU it is written down at the end, for ``kernels="auto"`` goes by it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mlx_diffgemma.proven import Row

PROVERS = {"cuda": "cuda_backend.kernels.choice", "metal": "mlx_diffgemma.mlx_backend.kernels.choice"}
VIRTUAL = "metal-vm"  # a Mac's virtual machine: Metal, but no chip that a row could be about
SHOWN_AS = {"cpu": "interpreted"}  # other places are recorded by their own name


class Shown(NamedTuple):
    place: str
    kernel: str
    dtype: str


class Proofs:
    """Kernels that were shown to be right, by the file that tests them: it counts only where all of it has passed."""

    def __init__(self):
        self._shown: dict[Path, set[Shown]] = {}
        self._passed: Counter[Path] = Counter()
        self.written: list[Row] = []
        self.virtual: list[Row] = []

    def of(self, test, place: str, record: Callable[..., None]) -> Callable[[str, Any], None]:
        """``proof(kernel, dtype)`` of ``test``, whose path it counts for; ``dtype`` is torch's or MLX's."""

        def write(kernel: str, dtype: Any) -> None:
            shown = Shown(place, kernel, str(dtype).rpartition(".")[2])
            if place not in PROVERS:
                record(what=SHOWN_AS.get(place, place), kernel=shown.kernel, dtype=shown.dtype)
            self._shown.setdefault(test.path, set()).add(shown)

        return write

    def passed(self, path: Path) -> None:
        self._passed[path] += 1

    def proven(self, asked: Iterable[Path]) -> list[Shown]:
        """``asked``: the file of every test that was to run. One that failed, or never ran, takes its file's proof."""
        whole = {path for path, count in Counter(asked).items() if self._passed[path] == count}
        return sorted(set().union(*(shown for path, shown in self._shown.items() if path in whole)))

    def finish(self, asked: Iterable[Path]) -> None:
        """Write what was proven into the ``proven.json`` of its place."""
        for shown in self.proven(asked):
            if shown.place in PROVERS:
                prove = importlib.import_module(PROVERS[shown.place]).prove
                self.written.append(prove(shown.kernel, shown.dtype))
            elif shown.place == VIRTUAL:
                self.virtual.append(shown._asdict())


def picked(config) -> bool:
    """Whether single tests were picked or left out: then no file has passed as a whole."""
    some = [config.getoption(name, None) for name in ("keyword", "deselect", "lf")]
    return any(some) or any("::" in argument for argument in config.args)


PROOFS = Proofs()
