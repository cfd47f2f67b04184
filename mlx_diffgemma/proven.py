"""What was shown to work where: the rows of a ``proven.json``, which the tests of kernels write on the hardware itself,
and what a backend makes of them when it loads a model.

A row is flat: its key (kernel, device, dtype, versions), and whatever else is worth knowing of the run. Which names the
key has, each backend decides; a row counts where all of them match. Nothing here knows what a kernel is.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdicts:
    """Which kernels run.

    Args:
        requested: "auto", "ops" or "fused".
        device: where they would; ``None`` where there is nothing to run them.
        reasons: of every kernel that the model has a use for, why it does not run; "" where it does.
        exceptions: kernels that run, but not everywhere -> where they do not.
    """

    requested: str
    device: Any
    reasons: Mapping[str, str]
    exceptions: Mapping[str, str]

    def on(self, kernel: str) -> bool:
        return self.reasons.get(kernel) == ""

    @property
    def fused(self) -> list[str]:
        """The kernels that run."""
        return [kernel for kernel in self.reasons if self.on(kernel)]

    def describe(self, **marks: Any) -> dict[str, Any]:
        """The mode, the kernels that run, ``marks``, and the other kernels by their reason."""
        off: dict[str, list[str]] = {}
        for kernel, reason in self.reasons.items():
            if reason:
                off.setdefault(reason, []).append(kernel)
        found = {"mode": self.requested, "fused": self.fused, **marks}
        found |= {"except": dict(self.exceptions)} if self.exceptions else {}
        return found | ({"ops": off} if off else {})


def read_rows(path: Path) -> list[Row]:
    return json.loads(path.read_text(encoding="utf-8"))


def matches(row: Row, key: Row) -> bool:
    """Whether ``row`` says of everything in ``key`` the same."""
    return all(name in row and row[name] == value for name, value in key.items())


def covered(key: Row, rows: Iterable[Row]) -> bool:
    return any(matches(row, key) for row in rows)


def write_row(path: Path, key: Row, about: Row) -> Row:
    """Put ``key`` with ``about`` and the day in place of an older row of that key, in one move."""
    row = {**key, **about, "date": datetime.date.today().isoformat()}
    kept = [old for old in read_rows(path) if not matches(old, key)]
    rows = sorted([*kept, row], key=lambda row: [str(row.get(name, "")) for name in key])
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(as_text(rows), encoding="utf-8")
    new.replace(path)
    return row


def as_text(rows: Iterable[Row]) -> str:
    """JSON with a row a line, so that a run on other hardware adds lines and changes none."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f"[\n{lines}\n]\n" if lines else "[]\n"


def major_minor(version: str) -> str:
    """Of what compiles or multiplies, as far as behaviour depends on it: "0.32.4" is "0.32"."""
    return ".".join(version.split(".")[:2])
