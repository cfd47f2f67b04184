"""One precision's jobs, in a process of its own: a kernel that goes wrong ends this process, not the run.

    python -m benchmarks.gpu_stage RESULT.json '{"plan"...}' PRECISION UNTIL          started by ``benchmarks.gpu``

A job that raises is written down with its error, and the next one begins. After an error that leaves CUDA unusable
the process ends with ``BROKEN``; it is then started again behind that job.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cuda_backend.kernels.choice import gpu_of
from cuda_backend.weights import Weights
from mlx_diffgemma.config import ModelConfig

from . import gpu_ours as ours
from . import gpu_peer as peer
from .gpu_clock import Clock, CudaClock, bandwidth
from .gpu_floor import GIGA, GPUS, PRECISIONS, PUBLISHED, costs, floors, gpu_named, load_of
from .gpu_plan import Budget, Job, Plan
from .gpu_record import Record, smi
from .gpu_weights import expected_bytes, random_weights

BROKEN = 3
TEXT = 2000  # characters of an error that are kept


@dataclass(frozen=True)
class Effort:
    """How long a figure is measured. Tests take next to nothing."""

    seconds: float = 0.6
    rounds: int = 3
    protocol_prompt: int = ours.PROTOCOL_PROMPT
    protocol_tokens: int = ours.PROTOCOL_TOKENS
    peer_steps: tuple[int, int] = (2, 10)
    bandwidth_bytes: int = 2 * 2**30


@dataclass
class Stage:
    """What the jobs of one precision share; made when first needed, kept while the jobs are alike."""

    config: ModelConfig
    published: dict[str, Any]  # config.json, for the peer
    precision: str
    clock: Clock
    card: str | None  # a key of ``GPUS``
    dtype: torch.dtype = torch.bfloat16
    kernels: str = "fused"
    fp8: bool = True  # whether FP8 weights take FP8 activations
    effort: Effort = Effort()
    weights: Weights | None = None
    kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    setup: float = 0.0  # seconds spent on weights and models, compiling included

    def prepare(self) -> Weights:
        if self.weights is None:
            self.weights = random_weights(self.config, self.precision, self.clock.device, self.dtype, fp8=self.fp8)
            wanted = expected_bytes(self.config, self.precision, self.dtype)
            assert self.weights.nbytes == wanted, f"weights of {self.weights.nbytes} bytes, the table says {wanted}"
        return self.weights

    def once(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, until it is asked for with another key."""
        if name not in self.kept or self.kept[name][0] != key:
            self.forget(name)
            start = time.perf_counter()
            self.kept[name] = (key, make())
            self.setup += time.perf_counter() - start if name != "started" else 0.0
        return self.kept[name][1]

    def forget(self, *names: str) -> None:
        for name in names or tuple(self.kept):
            self.kept.pop(name, None)
        gc.collect()
        if self.clock.device.type == "cuda":
            torch.cuda.empty_cache()

    def model(self, head: str) -> Any:
        def make() -> Any:
            self.forget()
            return self.made(head, graphs=True)

        return self.once("model", head, make)

    def made(self, head: str, *, graphs: bool) -> Any:
        options = {"kernels": self.kernels, "graphs": graphs}
        return ours.model_of(self.config, self.prepare(), self.clock.device, head, **options)

    def started(self, job: Job) -> ours.Started:
        def make() -> ours.Started:
            model = self.model(job.head)
            self.clock.reset_peak()
            return ours.start(self.clock, model, job.batch, job.prompt)

        model = self.model(job.head)
        return self.once("started", (id(model), job.batch, job.prompt), make)

    def official(self) -> Any:
        def make() -> Any:
            self.forget("model", "started")
            return peer.official(self.published, self.config, self.prepare(), self.clock.device)

        return self.once("official", None, make)


def run(stage: Stage, job: Job, row: dict[str, Any]) -> None:
    """One job: figures into ``row``."""
    {"ours": run_ours, "transformers": run_peer}[job.what](stage, job, row)


def run_ours(stage: Stage, job: Job, row: dict[str, Any]) -> None:
    clock, effort, model = stage.clock, stage.effort, stage.model(job.head)
    if job.piece == "step":
        started = stage.started(job)
        row["prefill_tok_s"] = job.batch * job.prompt / started.prefill_seconds
        row["ms_per_step"] = ours.step_ms(clock, model, started, effort.seconds)
        row["peak_gb"] = clock.peak() / GIGA
        row["weights_gb"] = stage.prepare().nbytes / GIGA
        row["in_force"] = model.describe() | {"activations": "fp8" if stage.fp8 and job.precision != "bf16" else "bf16"}
    elif job.piece == "parts":
        row["parts_ms"] = ours.step_parts(clock, model, stage.started(job), effort.seconds / 3)
    elif job.piece == "fixed16":
        options = {"prompt_tokens": effort.protocol_prompt, "tokens": effort.protocol_tokens}
        row["fixed16"] = ours.protocol(clock, model, job.batch, rounds=effort.rounds, **options)
        row["fixed16_tok_s"] = row["fixed16"]["tok_s"]
    elif job.piece == "routing":
        row["routing"] = ours.routing(model, job.prompt)
    else:
        eager = stage.made(job.head, graphs=False)
        started = ours.start(clock, eager, job.batch, job.prompt)
        row["eager_ms"] = ours.step_ms(clock, eager, started, effort.seconds)


def run_peer(stage: Stage, job: Job, row: dict[str, Any]) -> None:
    clock, effort, model, static = stage.clock, stage.effort, stage.official(), job.mode == "static"
    row["in_force"] = peer.in_force(model)
    if job.piece == "step":
        few, many = effort.peer_steps
        options = {"prompt_tokens": job.prompt, "static": static, "few": few, "many": many, "rounds": effort.rounds}
        clock.reset_peak()
        row["ms_per_step"] = peer.step_ms(clock, model, stage.config, **options)
        row["peak_gb"] = clock.peak() / GIGA
    else:
        options = {"prompt_tokens": effort.protocol_prompt, "tokens": effort.protocol_tokens, "static": static}
        row["fixed16_tok_s"] = peer.protocol(clock, model, stage.config, **options)


def fill_floor(stage: Stage, job: Job, row: dict[str, Any]) -> None:
    """What needs no measurement; the floor only of a card whose rates are known."""
    load = load_of(stage.config, job.precision, job.head, job.batch, job.prompt)
    row["recipe"] = PRECISIONS[job.precision]
    row["parts_gb"] = {part: cost.nbytes / GIGA for part, cost in costs(load).items()}
    if stage.card:
        row["parts_floor_ms"] = floors(load, GPUS[stage.card])
        row["floor_ms"] = sum(row["parts_floor_ms"].values())


def work(stage: Stage, jobs: list[Job], record: Record, budget: Budget) -> int:
    """All jobs behind those that are done; the exit status."""
    precision, done = stage.precision, record.data["done"]
    if precision not in record.data["bandwidth"]:
        try:
            record.data["bandwidth"][precision] = bandwidth(stage.clock, stage.effort.bandwidth_bytes)
        except Exception as error:  # noqa: BLE001 - whatever fails is written down, and the rest goes on
            record.data["errors"].append(f"bandwidth: {text_of(error)}")
        stage.forget()  # the memory that it used
    for at in range(done.get(precision, 0), len(jobs)):
        job = jobs[at]
        done[precision] = at + 1
        if refusal := budget.refusal(job):
            record.data["skipped"].append(f"{job}: {refusal}")
            record.save()
            continue
        row = record.row(**job.identity)
        fill_floor(stage, job, row)
        row["errors"][job.piece] = "the process ended during it"
        record.save()
        fatal = attempt(stage, job, row, budget)
        record.save()
        if fatal:
            return BROKEN
    record.data.setdefault("clocks", {})[precision] = smi()
    record.save()
    return 0


def attempt(stage: Stage, job: Job, row: dict[str, Any], budget: Budget) -> bool:
    """Run a job, errors into its row; whether the device is unusable afterwards."""
    start, setup = budget.now(), stage.setup
    try:
        run(stage, job, row)
        del row["errors"][job.piece]
        fatal = False
    except Exception as error:  # noqa: BLE001 - as above
        row["errors"][job.piece] = text_of(error)
        fatal = ours.is_fatal(error)
    if row["errors"].get(job.piece) and not fatal:
        stage.forget()
    seconds = budget.now() - start
    budget.took(job, seconds - (stage.setup - setup))
    print(f"  {seconds:6.1f} s  {job}: {summary(job, row)}", flush=True)
    return fatal


def text_of(error: Exception) -> str:
    """The error and where it came from, without the middle of a long one."""
    where = "".join(traceback.format_tb(error.__traceback__)[-3:])
    text = f"{type(error).__name__}: {error}\n{where}".strip()
    return text if len(text) <= TEXT else f"{text[: TEXT // 2]} ... {text[-TEXT // 2 :]}"


def summary(job: Job, row: dict[str, Any]) -> str:
    if job.piece in row["errors"]:
        return row["errors"][job.piece].splitlines()[0][:160]
    figures = {"step": "ms_per_step", "fixed16": "fixed16_tok_s", "eager": "eager_ms"}
    value = row[figures[job.piece]] if job.piece in figures else row[{"parts": "parts_ms"}.get(job.piece, job.piece)]
    if not isinstance(value, dict):
        return f"{value:.2f} {figures[job.piece]}"
    return ", ".join(f"{name} {number:.2f}" for name, number in value.items())


def main() -> None:
    path, plan, precision, until = sys.argv[1:]
    data = json.loads(PUBLISHED.read_text())
    chosen = json.loads(plan)
    chosen = Plan(**{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()})
    card = gpu_named(torch.cuda.get_device_name(0))
    effort = Effort(seconds=0.3, rounds=2) if chosen.quick else Effort()
    device = torch.device("cuda", 0)
    gpu = gpu_of(device, chosen.kernels)
    fp8 = bool(gpu and gpu.card and gpu.card.fp8)
    config = ModelConfig.from_dict(data)
    options = {"kernels": chosen.kernels, "fp8": fp8, "effort": effort}
    stage = Stage(config, data, precision, CudaClock(device), card, **options)
    budget = Budget(float(until), time.time)
    sys.exit(work(stage, chosen.jobs(precision), Record(Path(path)), budget))


if __name__ == "__main__":
    main()
