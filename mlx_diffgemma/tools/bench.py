"""Measuring a model on this machine: whole answers, their parts, and the same prompt given to peers in turn.

Every figure is the median of some rounds, with the least and the most. Peers run in processes of their own and take
turns with us, A B A B; both models are in memory at once, so that the two can be compared under the same conditions.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..backend import CanvasSpec, Choice, Model, implementation
from ..config import GenerationConfig
from ..errors import OptionError, UserError
from ..events import Draft, Finished
from ..prompts.processor import Processor
from ..sampling import engine
from ..terminal.text import one_line
from .plan import check_context

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
    if tokens is not None:
        check_context(model.config, tokens, blocks)
    prompt = question
    ids = processor.prompt_ids(prompt)
    if tokens is not None and len(ids) > tokens:
        raise OptionError(f"--prompt-tokens {tokens} is too few; the question alone has {len(ids)}")
    if tokens is not None:
        more = max(1, len(processor.prompt_ids(f"{question}\n{question}")) - len(ids))
        prompt = "\n".join([question] * (1 + (tokens - len(ids)) // more))
        ids = processor.prompt_ids(prompt)
    context, canvas = model.config.text.max_position_embeddings, model.config.canvas_length
    if len(ids) + blocks * canvas > context:
        raise OptionError(
            f"--blocks {blocks:,} of {canvas:,} tokens each are too many behind {len(ids):,}; the context holds "
            f"{context:,}: ask for fewer"
        )
    return Task(prompt, ids, blocks, rounds)


def measure(
    model: Model,
    processor: Processor,
    choice: Choice,
    work: Task,
    rivals: Sequence[Rival] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The record of a run; ``tell`` hears how it goes, and why a peer has no part in it: ``missing`` of the record."""
    tell("warming up …")
    answer(model, processor, work)
    peers = [Peer(rival) for rival in rivals]
    ours: list[dict[str, Any]] = []
    try:
        for peer in peers:
            tell(f"loading {peer.rival.kind} {peer.rival.model} …")
            tell(peer.warm_up(work.prompt))
        for turn in range(work.rounds):
            ours.append(answer(model, processor, work))
            tell(f"round {turn + 1}: {ours[-1]['milliseconds_per_step']:,.1f} ms per step")
            for peer in peers:
                tell(peer.turn(work.prompt, max(ours[-1]["tokens"], 1)))
    finally:
        for peer in peers:
            peer.close()
    tell("timing the parts …" if choice.name in PARTED else "")
    return {
        "conditions": conditions(model, choice),
        "task": {"prompt_tokens": len(work.ids), "blocks": work.blocks, "rounds": work.rounds, "seed": work.seed},
        "ours": ours_of(model, work, ours),
        "parts": parts(model, choice, work),
        "peers": [compared(peer, ours, model.config.canvas_length) for peer in peers if not peer.problem],
        "missing": [peer.problem for peer in peers if peer.problem],
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


class PeerError(UserError):
    """In one line: why a peer has no part in a run."""


class Peer:
    """One peer in a process of its own. ``problem`` says in one line why it has no part in a run, "" as long as it has.

    What it writes to stderr is kept, and its last line is said when it fails.
    """

    rival: Rival
    versions: dict[str, str]
    answers: list[dict[str, Any]]
    problem: str
    process: subprocess.Popen[str] | None

    def __init__(self, rival: Rival):
        self.rival, self.versions, self.answers, self.problem, self.process = rival, {}, [], "", None
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed by ``close``

    def warm_up(self, prompt: str) -> str:
        """Load the model and answer once, which does not count; the problem that this met with, or ""."""
        return self._trying(self._start, lambda: self._ask(prompt, 8))

    def turn(self, prompt: str, tokens: int) -> str:
        """Add an answer, timed by the peer itself; likewise. Nothing happens after a problem."""
        return "" if self.problem else self._trying(lambda: self.answers.append(self._ask(prompt, tokens)))

    def close(self) -> None:
        if self.process is not None and self.process.stdin and self.process.stdout:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
        self._errors.close()

    def _trying(self, *actions: Callable[[], Any]) -> str:
        try:
            for action in actions:
                action()
        except PeerError as error:
            self.problem = one_line(str(error))
            self.close()
        return self.problem

    def _start(self) -> None:
        kind, python = self.rival.kind, self.rival.python
        command, pipe = [python, str(WORKER), kind, self.rival.model], subprocess.PIPE
        try:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        except OSError:
            raise PeerError(f"{kind}: {python} cannot be started; give another with --peer-python") from None
        first = self._line(f"could not load {self.rival.model}")
        if "missing" in first:
            raise PeerError(f"{kind} is not installed in {python}: {INSTALL[kind]}, then run this again")
        self.versions = first["versions"]

    def _ask(self, prompt: str, tokens: int) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the next line says
            print(json.dumps({"prompt": prompt, "tokens": tokens}), file=self.process.stdin, flush=True)
        found = self._line("ended while answering")
        return found | {"tokens_per_second": found["tokens"] / found["seconds"]}

    def _line(self, without: str) -> dict[str, Any]:
        """What it says next; ``without``: what has happened if it has ended instead."""
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.process.wait()
        self._errors.seek(0)
        said = [text.strip() for text in self._errors if text.strip()]
        raise PeerError(f"{self.rival.kind} {without}: {said[-1] if said else 'it gave no reason'}")


def compared(peer: Peer, ours: Sequence[dict[str, Any]], canvas: int) -> dict[str, Any]:
    """A peer's figures, and the ratio of speeds, ours by theirs, round by round: above 1 we are faster."""
    theirs = [one | steps_per_canvas(one, canvas) for one in peer.answers]
    names = ("seconds", "first", "tokens", "tokens_per_second", "peak_memory", "steps", "steps_per_canvas")
    shown = [name for name in names if all(one.get(name) is not None for one in theirs)]
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, theirs, strict=True) if b["tokens"]]
    return {
        "kind": peer.rival.kind,
        "model": peer.rival.model,
        "versions": peer.versions,
        **{name: spread([float(one[name]) for one in theirs]) for name in shown},
        "ratio": spread(ratios) if ratios else None,
    }


def steps_per_canvas(answer: dict[str, Any], canvas: int) -> dict[str, float]:
    """Of a peer that denoises canvases of as many tokens as ours."""
    tokens = answer.get("canvas_tokens")
    return {"steps_per_canvas": answer["steps"] * canvas / tokens} if tokens else {}


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
