"""One conversion in a fresh process: HF bfloat16 to MLX with 4-bit experts and 8-bit everything else.

    python -m benchmarks.convert_worker NAME SOURCE OUT

Prints one line of JSON: seconds of the call alone, without imports; peak memory of the process, and how much of it
was there before the call.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


def ours(source: str, out: str) -> Callable[[], object]:
    from convert.command import main

    return lambda: main([source, "--to", "mlx", "--recipe", "experts4", "--out", out, "--quiet"])


def mlx_vlm(source: str, out: str) -> Callable[[], object]:
    import mlx.core as mx
    from mlx_vlm.convert import convert

    mx.eval(mx.zeros(1))
    return lambda: convert(source, mlx_path=out, quantize=True, q_bits=4, q_group_size=64)


def peak() -> int:
    """Bytes. Not ru_maxrss on Linux: a process inherits that from the one that started it."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    name, source, out = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    call = {"ours": ours, "mlx-vlm": mlx_vlm}[name](source, out)
    before = peak()
    start = time.perf_counter()
    status = call()
    seconds = time.perf_counter() - start
    if name == "ours" and status:
        raise SystemExit(f"the conversion ended with status {status}")
    print(json.dumps({"seconds": seconds, "peak_bytes": peak(), "before_bytes": before}), file=answers)


if __name__ == "__main__":
    main()
