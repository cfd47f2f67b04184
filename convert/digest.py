"""SHA-256 of files, in threads that can be told to stop."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

from .container import Progress

BUFFER = 1 << 20


class Stopped(Exception):
    """The conversion ended before the file did."""


def sha256(path: Path, stop: Event | None = None, progress: Progress | None = None) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop and stop.is_set():
                raise Stopped
            digest.update(buffer[:count])
            if progress:
                progress.advance(count)
    return digest.hexdigest()


class Background:
    """One thread beside the conversion. ``patient``: what was handed in is done even when the conversion fails."""

    def __init__(self, name: str, patient: bool = False):
        self.stop, self.patient = Event(), patient
        self.pool = ThreadPoolExecutor(1, name)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.patient:
            self.stop.set()
        self.pool.shutdown(wait=True, cancel_futures=not self.patient)

    def hashes(
        self, paths: Iterable[Path], progress: Progress | None = None
    ) -> Future[dict[str, dict[str, int | str]]]:
        """Name -> bytes and sha256, of all files, one after the other."""
        paths = list(paths)
        return self.pool.submit(lambda: {path.name: facts(path, self.stop, progress) for path in paths})


def facts(path: Path, stop: Event | None = None, progress: Progress | None = None) -> dict[str, int | str]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path, stop, progress)}
