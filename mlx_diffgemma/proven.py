"""What was shown to work where: the rows of a ``proven.json``, which the tests of kernels write on the hardware itself.

A row is flat: its key (kernel, device, dtype, versions), and whatever else is worth knowing of the run. Which names the
key has, each backend decides; a row counts where all of them match. Nothing here knows what a kernel is.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


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
