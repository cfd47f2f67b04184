"""A file filled by threads: each converts ranges of rows, and puts them where the plan says that they belong.

Nothing but the ranges in flight is in memory, and the bytes do not depend on which thread was first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import numpy as np

from mlx_diffgemma.errors import CheckpointError

from .container import Progress
from .edges import Error, Errors
from .plan import Item

CHUNK = 1 << 22  # values: 16 MB as float32, one expert of the 26B model
Write = Callable[[Item, int, int], Error | None]  # a range of rows, to the file; what was lost


def fill(items: Sequence[Item], write: Write, progress: Progress, threads: int | None = None) -> Errors:
    """All rows of a file. An error, or an interrupt, drops the chunks that have not begun and waits for the rest.

    Raises:
        CheckpointError: the source holds numbers that are none.
    """
    jobs: list[tuple[Item, Future[Error | None]]] = []
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, "convert") as pool:
        try:
            for item in items:
                for start, stop in ranges(item):
                    jobs.append((item, pool.submit(_chunk, item, start, stop, write, progress)))
            done, _ = wait([job for _, job in jobs], return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    errors: Errors = {}
    for item, job in jobs:  # in the order of the rows, so that sums are the same every time
        error = job.result()
        if error is not None:
            errors[item.row.name] = errors.get(item.row.name, Error()) + error
    return errors


def ranges(item: Item) -> Iterator[tuple[int, int]]:
    """Ranges of the first axis that can be converted on their own: whole experts, or whole blocks of a matrix."""
    source, target, matrix = item.stored.encoding, item.encoding, len(item.row.shape) == 2
    if matrix and target.global_scale and item.edge != "same":
        return iter([(0, item.row.shape[0])])  # one scale for the matrix: it must be seen whole
    align = math.lcm(source.block or 1, target.block or 1) if matrix else 1
    return item.stored.chunks(CHUNK, align)


def _chunk(item: Item, start: int, stop: int, write: Write, progress: Progress) -> Error | None:
    error = write(item, start, stop)
    if error is not None and not math.isfinite(error.lost + error.total):
        part = item.stored.parts[0]
        raise CheckpointError(
            f"{part.path}: {item.row.name} holds NaN, infinity or numbers beyond {item.format}; is the file damaged?"
        )
    progress.advance(item.stored.nbytes * (stop - start) // item.row.shape[0])
    return error


def put(file: int, array: np.ndarray, at: int) -> None:
    """The bytes of an array, from ``at`` on."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    while data.size:
        done = os.pwrite(file, data.data, at)
        data, at = data[done:], at + done
