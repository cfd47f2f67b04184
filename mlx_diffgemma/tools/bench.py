"""Measuring a model on this machine: whole answers, their parts, and the same prompt given to peers in turn.

Every figure is the median of some rounds, with the least and the most. Peers run in processes of their own and take
turns with us, A B A B; both models are in memory at once, so that the two can be compared under the same conditions.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..api import check_context
from ..backend import CanvasSpec, Choice, Model, implementation
from ..config import GenerationConfig
from ..errors import OptionError
from ..events import Draft, Finished
from ..prompts.processor import Processor
from ..sampling import engine

QUESTION = "Explain step by step how a bill becomes a law, and what can stop it on the way."
DEMO_QUESTION = "sort table"
PARTED = ("mlx",)  # backends that can time the parts of a step
WORKER = Path(__file__).with_name("bench_peer.py")
INSTALL = {"mlx-lm": "pip install mlx-lm", "mlx-vlm": "pip install mlx-vlm"}
Spread = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What is answered in every round, from the same seed. ``blocks`` canvases at most."""

    prompt: str
    ids: tuple[int, ...]
    blocks: int
    rounds: int
    seed: int = 0


@dataclass(frozen=True)
class Rival:
    """A peer: its kind (a key of ``INSTALL``), its model, and the Python that has it."""

    kind: str
    model: str
    python: str = sys.executable


def task(model: Model, processor: Processor, *, tokens: int | None, blocks: int, rounds: int, question: str) -> Task:
    """The question, as often as fits into ``tokens`` where those are given.

    Raises:
        OptionError: it fits not even once, or the context is too short.
    """
    prompt = question
    ids = processor.prompt_ids(prompt)
    if tokens is not None and len(ids) > tokens:
        raise OptionError(f"--prompt-tokens {tokens} is too few; the question alone has {len(ids)}")
    if tokens is not None:
        more = max(1, len(processor.prompt_ids(f"{question}\n{question}")) - len(ids))
        prompt = "\n".join([question] * (1 + (tokens - len(ids)) // more))
        ids = processor.prompt_ids(prompt)
    check_context(model.config, len(ids), processor.generation.replace(max_tokens=blocks * model.config.canvas_length))
    return Task(prompt, ids, blocks, rounds)


def measure(
    model: Model,
    processor: Processor,
    choice: Choice,
    work: Task,
    rivals: Sequence[Rival] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The record of a run; ``tell`` hears how it goes."""
    tell("warming up …")
    answer(model, processor, work)
    peers: list[Peer] = []
    ours: list[dict[str, Any]] = []
    theirs: list[list[dict[str, Any]]] = []
    missing: list[str] = []
    try:
        for rival in rivals:
            tell(f"loading {rival.kind} {rival.model} …")
            peer = Peer(rival)
            if peer.problem:
                missing.append(peer.problem)
                tell(peer.problem)
                continue
            peer.ask(work.prompt, 8)  # warm-up
            peers.append(peer)
            theirs.append([])
        for turn in range(work.rounds):
            ours.append(answer(model, processor, work))
            tell(f"round {turn + 1}: {ours[-1]['milliseconds_per_step']:.1f} ms per step")
            for peer, answers in zip(peers, theirs, strict=True):
                answers.append(peer.ask(work.prompt, max(ours[-1]["tokens"], 1)))
    finally:
        for peer in peers:
            peer.close()
    tell("timing the parts …" if choice.name in PARTED else "")
    return {
        "conditions": conditions(model, choice),
        "task": {"prompt_tokens": len(work.ids), "blocks": work.blocks, "rounds": work.rounds, "seed": work.seed},
        "ours": ours_of(model, work, ours),
        "parts": parts(model, choice, work),
        "peers": [compared(peer, ours, answers) for peer, answers in zip(peers, theirs, strict=True)],
        "missing": missing,
    }


def answer(model: Model, processor: Processor, work: Task) -> dict[str, Any]:
    """One whole answer through the loop that every caller goes through."""
    settings = processor.generation.replace(max_tokens=work.blocks * model.config.canvas_length)
    request = engine.Request(0, work.ids, settings, work.seed)
    found: dict[str, Any] = {}
    for event in engine.run(model, engine.fixed([request])):
        if isinstance(event, Draft):
            continue
        if isinstance(event, Finished):
            stats = event.stats
            found = {
                "seconds": stats.seconds,
                "tokens": stats.tokens,
                "tokens_per_second": stats.tokens / stats.seconds,
                "milliseconds_per_step": stats.milliseconds_per_step,
                "steps_per_canvas": stats.forwards / stats.blocks,
                "tokens_per_forward": stats.tokens_per_forward,
                "first_draft": stats.time_to_first_draft,
                "first_block": stats.time_to_first_block,
                "steps": list(stats.steps_per_block),
                "peak_memory": stats.peak_memory,
            }
    return found


def prefill(model: Model, ids: Sequence[int], rounds: int) -> Spread:
    """Tokens per second of reading the prompt. What is submitted after it on the same device is waited for."""
    rates, tokens = [], np.array([ids], np.int32)
    for _ in range(rounds):
        start = time.perf_counter()
        cache = model.encode(tokens)
        model.read(model.begin(cache, [CanvasSpec(GenerationConfig(max_denoising_steps=1), seed=0)]))
        rates.append(len(ids) / (time.perf_counter() - start))
    return spread(rates)


def ours_of(model: Model, work: Task, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = [name for name in answers[0] if name not in ("steps", "peak_memory")]
    found: dict[str, Any] = {name: spread([float(one[name]) for one in answers]) for name in numbers}
    found["steps"] = answers[-1]["steps"]
    found["peak_memory"] = max(one["peak_memory"] for one in answers)
    found["prefill_tokens_per_second"] = prefill(model, work.ids, work.rounds)
    return found


def parts(model: Model, choice: Choice, work: Task) -> dict[str, Spread] | None:
    if choice.name not in PARTED:
        return None
    clock: Any = implementation(replace(choice, package=f"{choice.package}.parts"))
    return clock.timed(model, len(work.ids), work.rounds)


# ---- peers


class Peer:
    """One peer in its process; ``problem`` says in one line why it cannot take part."""

    rival: Rival
    process: subprocess.Popen[str] | None
    versions: dict[str, str]
    problem: str

    def __init__(self, rival: Rival):
        self.rival, self.process, self.versions = rival, None, {}
        command = [rival.python, str(WORKER), rival.kind, rival.model]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError:
            self.problem = f"{rival.kind}: {rival.python} cannot be started; give another with --peer-python"
            return
        first = self._line()
        self.problem = self._judged(first)
        self.versions = (first or {}).get("versions", {})
        if self.problem:
            self.close()

    def _judged(self, first: dict[str, Any] | None) -> str:
        kind, python = self.rival.kind, self.rival.python
        if first is None:
            return f"{kind} could not load {self.rival.model}; its own error is above"
        if "missing" in first:
            return f"{kind} is not installed in {python}: {INSTALL[kind]}, then run this again"
        return ""

    def ask(self, prompt: str, tokens: int) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None
        print(json.dumps({"prompt": prompt, "tokens": tokens}), file=self.process.stdin, flush=True)
        found = self._line()
        if found is None:
            raise OptionError(f"{self.rival.kind} ended while answering; its own error is above")
        return found | {"tokens_per_second": found["tokens"] / found["seconds"]}

    def close(self) -> None:
        if self.process is None:
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _line(self) -> dict[str, Any] | None:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None


def compared(peer: Peer, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A peer's figures, and the ratio of speeds, ours by theirs, round by round: above 1 we are faster."""
    names = ("seconds", "first", "tokens", "tokens_per_second", "peak_memory", "steps")
    shown = [name for name in names if all(one.get(name) is not None for one in theirs)]
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, theirs, strict=True) if b["tokens"]]
    return {
        "kind": peer.rival.kind,
        "model": peer.rival.model,
        "versions": peer.versions,
        **{name: spread([float(one[name]) for one in theirs]) for name in shown},
        "ratio": spread(ratios) if ratios else None,
    }


# ---- conditions


def conditions(model: Model, choice: Choice) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {"mlx-diffgemma": __version__, "python": platform.python_version(), "numpy": np.__version__}
    if choice.name == "mlx":
        import mlx.core as mx

        versions["mlx"] = mx.__version__  # type: ignore[attr-defined]
    mac = platform.mac_ver()[0]
    return {
        "machine": machine(),
        "system": f"macOS {mac}" if mac else platform.platform(),
        "versions": versions,
        "commit": commit(),
        "model": model.describe(),
    }


def machine() -> str:
    """The chip's name, as the system has it."""
    if sys.platform == "darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """Of the checkout that this file lies in; None of an installed package."""
    root = Path(__file__).parents[2]
    return (_output(["git", "-C", str(root), "rev-parse", "HEAD"]) or None) if (root / ".git").exists() else None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def spread(values: Sequence[float]) -> Spread:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
