"""This library against its peers, side by side in one run: time per denoising step, and time to the first draft.

    make bench                                    .venv/bin/python -m benchmarks.peers --quick --only mlx

Pairs: the torch backend against transformers' ``generate``, the MLX backend against mlx-vlm's ``stream_generate``
with the published sampler. Same checkpoint (``checkpoint.py``), prompt, float32, CPU, threads, BLAS; each
implementation in a process of its own (``worker.py``) that loads once, so that rounds interleave: A, B, A, B.

The time of a step is (one whole call with many steps - one with few) / the difference in steps. What a call costs once
(prefill, tables, final text) cancels; what a step costs the caller stays in: launching it, waiting, the stopping rule,
and here the draft with its text, which the peers' calls do not make. Every peer can be timed so without touching it;
timestamps between drafts could not be had from mlx-vlm, whose public stream gives everything at the end. Both calls
hold one first step, which is cheaper, and one last step, which some cut short: these cancel too.

Each round gives a ratio ours / peer; the goal is for their median. ``--quick`` is for CI: one round of few steps cannot
settle a goal, so it only fails when we are slower than the peer, and it takes one thread, since two that must wait for
each other take seconds where others want the cores too. The time to the first draft is reported as a share of one call
over four blocks; where the peer's stream gives everything at the end, ours must show the first draft early.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import checkpoint

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
SCRATCH = ROOT / "build"
BLOCKS = 4  # of the run that shows when the first draft comes


@dataclass(frozen=True)
class Pair:
    """Names of two workers, the environment of the peer's, and the largest ratio that meets the goal; likewise the
    largest share of a run that may pass before our first draft, where that is a goal."""

    ours: str
    peer: str
    peer_environment: str
    goal: float
    first_draft: float | None = None


PAIRS = {
    "torch": Pair("cpu", "transformers", ".venv", 0.9),
    "mlx": Pair("mlx", "mlx-vlm", ".venv-bench", 0.75, first_draft=0.05),
}


@dataclass(frozen=True)
class Plan:
    """``few`` and ``many``: steps of the two calls whose difference is timed."""

    rounds: int
    few: int
    many: int
    draft_steps: int
    threads: int


class Worker:
    """One implementation in its process."""

    def __init__(self, name: str, environment: str, folder: Path, threads: int):
        python = ROOT / environment / "bin" / "python"
        if not python.is_file():
            raise SystemExit(f"{name} has no environment: {python.parent.parent} is missing; run `make bench`")
        count = str(threads)
        variables = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONWARNINGS": "ignore"}
        if name.startswith("mlx"):
            variables["LD_PRELOAD"] = blas()
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", name, folder, count],
            cwd=ROOT,
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self.answer()["versions"]

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.name} ended with status {self.process.wait()}; its error is above")
        return json.loads(line)

    def run(self, steps: int, blocks: int = 1, *, drafts: bool = False) -> dict[str, Any]:
        """One timed call; it must have taken every step it was told to."""
        print(json.dumps({"steps": steps, "blocks": blocks, "drafts": drafts}), file=self.process.stdin, flush=True)
        answer = self.answer()
        if answer["forwards"] != steps * blocks:
            raise SystemExit(f"{self.name} took {answer['forwards']} steps where {steps * blocks} were asked for")
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def blas() -> str:
    """MKL of the test environment, for the Linux wheel of MLX, which links a reference BLAS; empty elsewhere."""
    return next((str(path) for path in sorted((ROOT / ".venv" / "lib").glob("libmkl_rt.so.*"))), "")


def compare(pair: Pair, plan: Plan, folder: Path) -> dict[str, Any]:
    """The record of one pair."""
    workers: list[Worker] = []
    try:
        workers.append(Worker(pair.ours, ".venv", folder, plan.threads))
        workers.append(Worker(pair.peer, pair.peer_environment, folder, plan.threads))
        for worker in workers:
            worker.run(2)  # warm-up
        rounds = [one_round(workers, plan, flipped=i % 2 == 1) for i in range(plan.rounds)]
        drafts = [first_draft(worker, plan.draft_steps) for worker in workers]
        versions = [worker.versions for worker in workers]
    finally:
        for worker in workers:
            worker.close()
    ratio = spread([ours / peer for ours, peer in rounds])
    milliseconds = [spread(list(side)) for side in zip(*rounds, strict=True)]
    return {
        "ours": pair.ours,
        "peer": pair.peer,
        "goal": pair.goal,
        "first_draft_goal": pair.first_draft,
        "met": ratio["median"] <= pair.goal and drafts[0]["share"] <= (pair.first_draft or 1),
        "ratio": ratio,
        "milliseconds_per_step": both(milliseconds),
        "first_draft": both(drafts),
        "versions": both(versions),
        "rounds": [both(pair) for pair in rounds],
    }


def one_round(workers: Sequence[Worker], plan: Plan, *, flipped: bool) -> tuple[float, float]:
    """Milliseconds per step of both, ours first. ``flipped`` lets the peer begin."""
    order = list(reversed(workers)) if flipped else list(workers)
    seconds = {
        (worker.name, steps): worker.run(steps)["seconds"] for steps in (plan.many, plan.few) for worker in order
    }
    ours, peer = (
        1000 * (seconds[worker.name, plan.many] - seconds[worker.name, plan.few]) / (plan.many - plan.few)
        for worker in workers
    )
    if min(ours, peer) <= 0:
        raise SystemExit(f"more steps took less time: {seconds}; the machine is too busy to measure on")
    print(f"  {workers[0].name} {ours:.0f} ms/step, {workers[1].name} {peer:.0f}, ratio {ours / peer:.3f}", flush=True)
    return ours, peer


def first_draft(worker: Worker, steps: int) -> dict[str, float]:
    """When the first draft of a run over ``BLOCKS`` blocks arrived."""
    run = worker.run(steps, BLOCKS, drafts=True)
    return {"seconds": run["first_draft"], "of": run["seconds"], "share": run["first_draft"] / run["seconds"]}


def both(values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(("ours", "peer"), values, strict=True))


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def conditions(plan: Plan) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "commit": git("rev-parse", "HEAD"),
        "changed": [line[3:] for line in git("status", "--porcelain").splitlines() if "benchmarks/results" not in line],
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "blas": Path(blas()).name,
        "threads": plan.threads,
        "rounds": plan.rounds,
        "steps": [plan.few, plan.many],
        "dtype": "float32",
        "prompt_tokens": checkpoint.PROMPT_TOKENS,
        "shape": checkpoint.SHAPE | {"canvas_length": checkpoint.CANVAS},
    }


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.rstrip()


def cpu_model() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(record: dict[str, Any]) -> str:
    """The record for people: one line per pair."""
    head = f"{'pair':<22}{'ours':>8}{'peer':>8}  ms/step{'min':>9}{'median':>9}{'max':>9}{'goal':>7}   first draft at"
    lines = [head]
    for pair in record["pairs"].values():
        ours, peer = (side["median"] for side in pair["milliseconds_per_step"].values())
        ratio, shares = pair["ratio"], [f"{draft['share']:.0%}" for draft in pair["first_draft"].values()]
        lines.append(
            f"{pair['ours'] + ' / ' + pair['peer']:<22}{ours:>8.0f}{peer:>8.0f}{'':>9}{ratio['min']:>9.3f}"
            f"{ratio['median']:>9.3f}{ratio['max']:>9.3f}{pair['goal']:>7.2f}   {shares[0]} and {shares[1]} of the run"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time this library against its peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default all cores; 1 with --quick, which tolerates other work")
    parser.add_argument("--only", choices=list(PAIRS))
    parser.add_argument("--quick", action="store_true", help="one round of few steps; the goal is 1")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.relative_to(ROOT)}, for a full run")
    chosen = parser.parse_args()
    chosen.threads = chosen.threads or (1 if chosen.quick else os.cpu_count())
    return chosen


def main() -> None:
    chosen = arguments()
    plan = Plan(chosen.rounds, few=2, many=10, draft_steps=12, threads=chosen.threads)
    if chosen.quick:
        plan = Plan(1, few=1, many=4, draft_steps=1, threads=chosen.threads)
    folder = checkpoint.write(SCRATCH / "bench-checkpoint")
    record: dict[str, Any] = conditions(plan) | {"pairs": {}}
    for name, pair in PAIRS.items():
        if chosen.only in (None, name):
            print(f"{pair.ours} against {pair.peer}", flush=True)
            record["pairs"][name] = compare(pair, plan, folder)
    whole = not (chosen.quick or chosen.only)
    out = chosen.out or (RESULTS if whole else SCRATCH / RESULTS.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    limits = {name: 1.0 if chosen.quick else PAIRS[name].goal for name in record["pairs"]}
    missed = [
        f"{name} must be at most {limits[name]}"
        for name, pair in record["pairs"].items()
        if pair["ratio"]["median"] > limits[name]
    ]
    if not chosen.quick:  # whose runs are of one step
        missed += [
            f"the first draft of {name} must come before {PAIRS[name].first_draft:.0%} of a run"
            for name, pair in record["pairs"].items()
            if pair["first_draft"]["ours"]["share"] > (PAIRS[name].first_draft or 1)
        ]
    if missed:
        raise SystemExit("goal missed: " + ", ".join(missed))


if __name__ == "__main__":
    main()
