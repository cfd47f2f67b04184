"""The 26B model with random weights on one GPU: time per step and per part, prefill, the fixed protocol, memory.

    make gpu                       .venv/bin/python -m benchmarks.gpu --quick --precision fp8

Random weights make every expert equally likely, which is the worst case for bytes: all are read at every step. A result
is benchmarks/results/gpu-CARD-DATE.json (``gpu_record``), written anew after every figure; ``gpu_report`` turns
it into a table and a picture. Beside ours, in the same run and on the same weights, Hugging Face's implementation.

Each precision has a process of its own (``gpu_stage``). Whatever fails is written down and the rest goes on; what there
is no time left for is skipped and listed. The whole fits into ``--seconds``, by default a little less than ten minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .gpu_floor import HEADS, PRECISIONS
from .gpu_plan import Plan, checked, until_of
from .gpu_record import ROOT, Record, file_of, machine

SECONDS = 560.0
GRACE = 20.0  # more than its time a process may take to end by itself
NO_GPU = "no CUDA GPU is visible to torch in {python}; run this where there is one (benchmarks/LOG.md says how)"
Start = Callable[[str, float], int]  # precision, until when -> exit status


def stage(path: Path, plan: Plan) -> Start:
    """What starts a process for a precision and waits for it."""

    def start(precision: str, until: float) -> int:
        told = json.dumps(dataclasses.asdict(plan))
        command = [sys.executable, "-m", "benchmarks.gpu_stage", str(path), told, precision, str(until)]
        environment = os.environ | {"TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}
        try:
            return subprocess.run(command, cwd=ROOT, env=environment, timeout=until - time.time() + GRACE).returncode
        except subprocess.TimeoutExpired:
            return -9

    return start


def measure(path: Path, plan: Plan, end: float, start: Start, now: Callable[[], float] = time.time) -> None:
    """All precisions in turn; one whose process ended goes on behind the job that ended it, while there is time."""
    for precision in plan.precisions:
        until, total = until_of(precision, plan.precisions, end, now()), len(plan.jobs(precision))
        began, print_time = now(), f"{max(until - now(), 0):.0f} s"
        print(f"{precision}: {total} figures in {print_time}", flush=True)
        done = -1
        while done < total and now() < until:
            status = start(precision, until)
            record = Record(path)
            before, done = done, record.data["done"].get(precision, 0)
            if status == 0:
                break
            record.data["errors"].append(f"{precision}: the process ended with status {status} after {done} of {total}")
            record.save()
            if done <= before or (done == 0 and before == -1):
                break  # it does not even come to its first job
        record = Record(path)
        record.data["seconds"][precision] = now() - began
        record.save()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="measure the 26B model with random weights on a GPU")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(Plan.precisions))
    parser.add_argument("--head", nargs="+", choices=HEADS, default=list(Plan.heads))
    parser.add_argument("--batch", nargs="+", type=int, default=list(Plan.batches))
    parser.add_argument(
        "--prompt", nargs="+", type=int, default=list(Plan.prompts), help="tokens; protocol always 1,024"
    )
    parser.add_argument("--kernels", choices=("fused", "auto", "ops"), default="fused", help="as in load")
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--quick", action="store_true", help="the first batch and prompt of each precision alone")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything; default {SECONDS:g}")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/gpu-CARD-DATE.json")
    return parser.parse_args()


def main() -> None:
    end = time.time()
    chosen = arguments()
    end += chosen.seconds
    plan = Plan(
        precisions=tuple(chosen.precision),
        heads=tuple(chosen.head),
        batches=tuple(chosen.batch),
        prompts=tuple(chosen.prompt),
        kernels=chosen.kernels,
        peer=not chosen.no_peer,
        quick=chosen.quick,
    )
    try:
        import torch
    except ImportError:
        raise SystemExit(NO_GPU.format(python=sys.executable) + "; it has no torch") from None
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU.format(python=sys.executable))
    here = machine()
    path = chosen.out or file_of(here["card"])
    record = Record(path)
    record.data = here | record.data | {"plan": dataclasses.asdict(checked(plan))}
    record.save()
    print(f"{here['card']}, driver {here['driver']}, {here['versions']}", flush=True)
    measure(path, plan, end, stage(path, plan))

    from .gpu_report import goals, report

    print(report(Record(path).data))
    print(goals([Record(path).data]))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
