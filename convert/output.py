"""The folder that is written to: refused when it is not free, and every file in it whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import OptionError, UserError
from mlx_diffgemma.json_file import read_json

from .writer import PART

JOURNAL = ".convert-journal.json"


class OutputError(UserError):
    """The output cannot be written: no room, no permission, or something is in the way."""


def check_free(out: Path, source: Path, *, resume: bool) -> None:
    """See that the folder is not there, or empty, or that there is something in it to continue.

    Raises:
        OptionError: it is the source's, or holds something else.
    """
    if source.exists() and out.exists() and out.samefile(source):
        raise OptionError(f"--out {str(out)!r} is the source itself; give a new folder")
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out {str(out)!r} is a file; give a new folder")
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    seen = [name for name in sorted(found) if not name.startswith(".")]
    if JOURNAL in found and not resume:
        raise OptionError(f"--out {str(out)!r} holds an interrupted conversion; --resume continues it")
    if seen and JOURNAL not in found:
        what = "no interrupted conversion but other files" if resume else "files already"
        raise OptionError(f"--out {str(out)!r} holds {what} ({seen[0]}); give a new folder")


def check_room(out: Path, needed: int) -> None:
    """Raises OutputError where the disk has less free space than ``needed`` bytes."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"--out {str(out)!r} needs {needed / 1e9:,.2f} GB, its disk has {free / 1e9:,.2f} GB free; make room first"
        )


def sync(path: Path) -> None:
    """The contents of a file, or the renames in a folder, on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """No other process converts into the folder meanwhile, where the system can tell.

    Raises:
        OptionError: one does.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OptionError(f"another conversion is writing to --out {str(out)!r}; wait for it") from error
    finally:
        os.close(handle)


def put(path: Path, data: bytes) -> None:
    """A small file, all or nothing."""
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def json_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


class Journal:
    """Which shards are finished, so that an interrupted conversion can go on. One small file, rewritten whole.

    ``plan`` is everything the bytes depend on. A journal of another plan is refused: its shards would not fit.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]):
        """Reads the journal that is there.

        Raises:
            OptionError: it is of another plan; the message says what differs.
        """
        self.path, self.plan = folder / JOURNAL, json.loads(json.dumps(plan))
        self.shards: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            data = read_json(self.path)
            before = data.get("plan")
            if before != self.plan:
                before = before if isinstance(before, dict) else {}
                differs = [key for key in self.plan if before.get(key) != self.plan[key]]
                raise OptionError(
                    f"{folder} holds an interrupted conversion of another kind (its {', '.join(differs)} differs); "
                    "give the same options as before, or a new folder"
                )
            self.shards = data["shards"]

    def add(self, name: str, record: dict[str, Any]) -> None:
        self.shards[name] = record
        self.write()

    def remove(self, name: str) -> None:
        self.shards.pop(name, None)

    def close(self) -> None:
        """The conversion is complete."""
        self.path.unlink()

    def write(self) -> None:
        """From here on the folder is known as an interrupted conversion."""
        put(self.path, json_bytes({"plan": self.plan, "shards": self.shards}))
