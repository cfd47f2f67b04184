"""``mlx_diffgemma.generate``: answer one prompt. On a terminal the drafts are drawn as they are denoised."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..api import load, stream_generate
from ..backend import CHOICES, KERNELS, OFFERED, Model
from ..config import GenerationConfig
from ..errors import OptionError, UserError
from ..events import Block, Event, Finished
from ..memory import MemoryPlan
from ..prompts.processor import Processor
from ..sampling.noise import fresh_seed
from ..terminal.live import LiveView, SilentView, StreamView, View, live_console
from .options import INTERRUPTED, Parser, given, hush, mistake, number, number_or_off, whole, whole_or_off

PROG = "mlx_diffgemma.generate"
SAMPLER = {
    "max_denoising_steps": (whole, "N", "most denoising steps per canvas"),
    "t_min": (number, "T", "temperature towards which the steps cool down"),
    "t_max": (number, "T", "temperature of the first step"),
    "entropy_bound": (number, "NATS", "joint entropy up to which tokens are accepted in one step"),
    "stability_threshold": (whole_or_off, "N", "equal drafts in a row that end a canvas early; 'off' uses every step"),
    "confidence_threshold": (number_or_off, "NATS", "mean entropy below which a canvas ends early; 'off' likewise"),
    "temperature": (number, "X", "scales the schedule; 0 takes the likeliest token everywhere"),
}
LOAD = ("backend", "dtype", "revision", "kernels", "activations", "head", "self_conditioning", "tail")
CALL = ("max_tokens", "seed", "stop", "system", "enable_thinking", *SAMPLER)


def parser() -> Parser:
    parse = Parser(
        PROG,
        "Answer one prompt. Drafts are drawn live on a terminal; a pipe gets the answer's text alone.",
        extra="a prompt goes after --prompt, in quotes",
    )
    unset = argparse.SUPPRESS
    parse.add_argument("--prompt", metavar="TEXT", help="what to answer; - reads it from stdin")
    parse.add_argument("--system", metavar="TEXT", default=unset, help="a system message before the prompt")
    parse.add_argument(
        "--thinking",
        dest="enable_thinking",
        action=argparse.BooleanOptionalAction,
        default=unset,
        help="let the model think first, or not (default: as its chat template has it)",
    )
    model = parse.add_argument_group("model")
    model.add_argument("--model", default="demo", help="a hub name, a folder, or demo (default), which is packaged")
    model.add_argument("--backend", default="auto", help=f"auto (default), {', '.join(CHOICES)}")
    model.add_argument("--dtype", help="bfloat16 or float32 (default: the checkpoint's own)")
    model.add_argument("--revision", help="branch, tag or commit of a hub repository")
    model.add_argument(
        "--kernels", choices=KERNELS, default="auto", help="auto (default: those proven on this GPU), ops, fused"
    )
    model.add_argument("--activations", choices=["fp8"], help="torch: round what meets FP8 weights to FP8 as well")
    model.add_argument("--head", choices=["fp8"], help="torch: make the logits in FP8")
    model.add_argument(
        "--self-conditioning",
        choices=OFFERED["self_conditioning"][0],
        default="dense",
        help="MLX: survivors leaves unlikely tokens out, which its kernel can use; not exact",
    )
    model.add_argument("--tail", choices=["hold"], help="MLX: compute no logits behind the end of the text")
    answer = parse.add_argument_group("answer", "Without an option the checkpoint's own value rules.")
    answer.add_argument("--max-tokens", type=whole, metavar="N", default=unset, help="most tokens of the answer")
    answer.add_argument("--seed", type=whole, metavar="N", default=unset, help="repeats an answer (default: random)")
    answer.add_argument("--stop", action="append", metavar="TEXT", default=unset, help="ends the answer; repeatable")
    for name, (kind, metavar, text) in SAMPLER.items():
        answer.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, default=unset, help=text)
    output = parse.add_argument_group("output")
    output.add_argument("--no-live", dest="live", action="store_false", help="write each block when it is finished")
    output.add_argument("--json", action="store_true", help="write one JSON object and nothing else")
    output.add_argument("--stats", action="store_true", help="print what it cost on stderr")
    return parse


@dataclass
class Record:
    """What is settled so far, so that an interrupted answer can be reported too."""

    seed: int
    started: float = field(default_factory=time.perf_counter)
    blocks: list[Block] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Block):
            self.blocks.append(event)
        elif isinstance(event, Finished):
            self.finished = event

    def result(self, processor: Processor) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        if self.finished is not None:
            fields = {f.name: getattr(self.finished, f.name) for f in dataclasses.fields(self.finished)}
            return {**fields, "stats": dataclasses.asdict(self.finished.stats)}
        tokens = [id for block in self.blocks for id in block.tokens]
        return {
            "text": "".join(block.text for block in self.blocks),
            "thinking": processor.parse(tokens).thinking,
            "tokens": tokens,
            "canvases": [block.canvas.tolist() for block in self.blocks],
            "finish_reason": "cancelled",
            "stats": {
                "tokens": len(tokens),
                "seconds": time.perf_counter() - self.started,
                "blocks": len(self.blocks),
                "forwards": sum(block.steps for block in self.blocks),
                "steps_per_block": [block.steps for block in self.blocks],
                "seed": self.seed,
            },
        }


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        return run(options)
    except (UserError, FileNotFoundError) as error:
        return mistake(PROG, error)
    except BrokenPipeError:
        return hush()
    except KeyboardInterrupt:  # while loading; later ones are caught where there is something to show
        return INTERRUPTED


def run(options: argparse.Namespace) -> int:
    prompt = read_prompt(options.prompt)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows question marks, not a traceback
    check_early(given(options, CALL))
    model, processor = load(options.model, **{name: getattr(options, name) for name in LOAD})
    print_plan(model)
    call = {"seed": fresh_seed()} | given(options, CALL)  # known from the start: an interrupted answer reports it too
    events = stream_generate(model, processor, prompt, **call)
    view, record, status = choose_view(options, processor, call), Record(call["seed"]), 0
    try:
        view.wait("reading the prompt …")
        for event in events:
            record.add(event)
            view.show(event)
    except KeyboardInterrupt:
        status = INTERRUPTED
    finally:
        view.close()
    if options.json:
        keys = ("text", "thinking", "tokens", "canvases", "finish_reason", "stats")
        result = record.result(processor)
        print(json.dumps({key: result[key] for key in keys}, ensure_ascii=False), flush=True)
    if options.stats:
        print(table(model, record.result(processor)), file=sys.stderr)
    return status


def print_plan(model: Model) -> None:
    """What it takes in memory, on stderr, where the backend has counted it."""
    about = model.describe()
    if "memory" in about:
        print(MemoryPlan.of(about["memory"]).line(about["device"]), file=sys.stderr)


def check_early(call: dict[str, Any]) -> None:
    """Refuse what no checkpoint could allow before one is loaded. One temperature alone is judged with the other."""
    pair = {name: call[name] for name in ("t_min", "t_max") if {"t_min", "t_max"} <= call.keys()}
    alone = {name: call[name] for name in ("max_tokens", *SAMPLER) if name in call and name not in ("t_min", "t_max")}
    GenerationConfig().replace(**alone, **pair)


def read_prompt(given: str | None) -> str:
    if given is None:
        raise OptionError("--prompt is missing; give a text, or - to read it from stdin")
    if given != "-":
        return given
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise OptionError(f"the prompt on stdin is not UTF-8 text ({error.reason}); convert it first") from error


def choose_view(options: argparse.Namespace, processor: Processor, call: dict[str, Any]) -> View:
    if options.json:
        return SilentView()
    console = live_console(sys.stdout) if options.live else None
    if console is None:
        return StreamView(sys.stdout)
    changed = {name: value for name, value in call.items() if name in ("max_tokens", "max_denoising_steps")}
    return LiveView(processor, processor.generation.replace(**changed), console)


def table(model: Model, result: dict[str, Any]) -> str:
    """The figures of a result, as aligned rows."""
    stats, about = result["stats"], model.describe()
    steps = " + ".join(map(str, stats["steps_per_block"])) or "none finished"
    rows = [("answer", f"{stats['tokens']} tokens, {result['finish_reason']}")]
    if result["finish_reason"] == "cancelled":
        rows += [("time", f"{stats['seconds']:.2f} s"), ("steps", steps), ("seed", str(stats["seed"]))]
    else:
        rate = stats["tokens"] / stats["seconds"] if stats["seconds"] else 0.0
        rows += [
            ("prompt", f"{stats['prompt_tokens']} tokens"),
            ("time", f"{stats['seconds']:.2f} s, {rate:.0f} tokens per second"),
            (
                "waited",
                f"{stats['time_to_first_draft']:.2f} s for a draft, {stats['time_to_first_block']:.2f} s for a block",
            ),
            ("steps", f"{steps} in {stats['blocks']} block{'s' if stats['blocks'] != 1 else ''}"),
            ("per step", f"{stats['milliseconds_per_step']:.1f} ms, {stats['tokens_per_forward']:.1f} tokens"),
            ("memory", f"{stats['peak_memory'] / 1e6:,.0f} MB at most"),
            ("seed", str(stats["seed"])),
        ]
    rows += [("model", ", ".join(str(about[key]) for key in ("backend", "device", "dtype") if key in about))]
    rows += [("inexact", "; ".join(map(str, about["approximations"])))] if about.get("approximations") else []
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())
