"""Timing on a device: CUDA graphs and events on a GPU, the same calls with a host's clock elsewhere, for the tests."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Run = Callable[[], Any]
FEWEST, MOST = 5, 200  # repetitions of a measurement
AHEAD = 3  # untimed runs in front, so that the device never waits for the host
GIB = 2**30


class Clock(Protocol):
    device: torch.device

    def capture(self, run: Run) -> Run:
        """What repeats ``run`` on the same tensors, at once where the device can."""
        ...

    def times(self, run: Run, count: int) -> list[float]:
        """Milliseconds of ``count`` runs in a row, each as the device saw it."""
        ...

    def wait(self) -> None: ...

    def reset_peak(self) -> None: ...

    def peak(self) -> int:
        """Most bytes in use since ``reset_peak``."""
        ...


class CudaClock:
    def __init__(self, device: torch.device):
        self.device = device

    def capture(self, run: Run) -> Run:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels and libraries are loaded outside of the graph
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def times(self, run: Run, count: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        for _ in range(AHEAD):
            run()
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        self.wait()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


class HostClock:
    """The same without a GPU: nothing is captured, and no memory is counted."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def capture(self, run: Run) -> Run:
        return run

    def times(self, run: Run, count: int) -> list[float]:
        found = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            found.append(1000 * (time.perf_counter() - start))
        return found

    def wait(self) -> None:
        pass

    def reset_peak(self) -> None:
        pass

    def peak(self) -> int:
        return 0


def milliseconds(clock: Clock, run: Run, seconds: float = 0.4) -> float:
    """The median over as many runs as fill about ``seconds``, after a first one that warms up."""
    run()
    first = clock.times(run, 2)
    count = round(1000 * seconds / max(min(first), 1e-3))
    return statistics.median(clock.times(run, min(max(count, FEWEST), MOST)))


def bandwidth(clock: Clock, nbytes: int = 2 * GIB, seconds: float = 0.2) -> dict[str, float]:
    """GB/s that this device reaches: ``copy`` counts bytes read and written, ``read`` those of a sum."""
    source = torch.randint(0, 2**30, (nbytes // 4,), dtype=torch.int32, device=clock.device).view(torch.float32)
    target = torch.empty_like(source)
    copied = milliseconds(clock, lambda: target.copy_(source), seconds)
    summed = milliseconds(clock, lambda: source.sum(), seconds)
    return {"copy": 2 * source.nbytes / copied / 1e6, "read": source.nbytes / summed / 1e6}


def wall(clock: Clock, run: Run) -> float:
    """Seconds of one run, as whoever waits for it sees them."""
    clock.wait()
    start = time.perf_counter()
    run()
    clock.wait()
    return time.perf_counter() - start
