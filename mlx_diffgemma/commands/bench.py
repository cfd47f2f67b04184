"""``mlx_diffgemma.bench``: what a step costs, by arithmetic (``--plan``, no download) or measured on this machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..api import load
from ..backend import CHOICES, KERNELS, choose, implementation, installed
from ..errors import OptionError, UserError
from ..tools import bench, bench_report, plan, plan_report, work
from ..tools.chips import CHIPS, chip
from .options import INTERRUPTED, Parser, hush, mistake, number, whole

PROG = "mlx_diffgemma.bench"
LOAD = ("backend", "dtype", "revision", "kernels", "self_conditioning", "tail")
PIPE_WIDTH = 120  # columns where nobody says how many there are
PLANNED = ("bits", "chip", "batch", "survivors", "kept")
MEASURED = (
    "against_ar",
    "against",
    "peer_python",
    "blocks",
    "rounds",
    "backend",
    "dtype",
    "revision",
    "kernels",
    "tail",
)


def parser() -> Parser:
    parse = Parser(PROG, "Count what a denoising step costs on a Mac (--plan), or measure a model on this machine.")
    unset = argparse.SUPPRESS
    parse.add_argument("--plan", action="store_true", help="count from shapes; nothing is downloaded or run")
    parse.add_argument(
        "--model", help="a hub name, a folder, or demo; with --plan a config.json too (default: the 26B)"
    )
    parse.add_argument("--prompt-tokens", type=whole, metavar="N", help="of the prompt (--plan: 4096)")
    parse.add_argument(
        "--self-conditioning", choices=["dense", "survivors"], default="dense", help="how the soft embedding is made"
    )
    parse.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the figures to FILE; without one, only they go to stdout",
    )
    counted = parse.add_argument_group("with --plan")
    counted.add_argument("--chip", default=unset, metavar="NAME", help=f"m4-max (default), {', '.join(CHIPS)}")
    counted.add_argument("--bits", default=unset, metavar="FORMAT", help=f"{', '.join(work.FORMATS)} (default: 4bit)")
    counted.add_argument("--batch", type=whole, default=unset, metavar="N", help="rows (default: 1)")
    counted.add_argument(
        "--survivors", type=number, default=unset, metavar="N", help=f"per row, assumed (default: {work.SURVIVORS:g})"
    )
    counted.add_argument("--kept", type=whole, default=unset, metavar="N", help="positions whose logits are made")
    run = parse.add_argument_group("measuring")
    run.add_argument(
        "--blocks", type=whole, default=unset, metavar="K", help="canvases of an answer at most (default: 2)"
    )
    run.add_argument("--rounds", type=whole, default=unset, metavar="N", help="measured answers (default: 3)")
    run.add_argument("--backend", default=unset, help=f"auto (default), {', '.join(CHOICES)}")
    run.add_argument("--dtype", default=unset, help="bfloat16 or float32 (default: the checkpoint's own)")
    run.add_argument("--revision", default=unset, help="branch, tag or commit of a hub repository")
    run.add_argument(
        "--kernels", choices=KERNELS, default=unset, help="auto (default: those proven on this GPU), ops, fused"
    )
    run.add_argument(
        "--tail", choices=["hold"], default=unset, help="MLX: compute no logits behind the end of the text"
    )
    run.add_argument("--against-ar", default=unset, metavar="MODEL", help="an autoregressive model, through mlx-lm")
    run.add_argument("--against", choices=["mlx-vlm"], default=unset, help="another library, on the same model")
    run.add_argument("--peer-python", default=unset, metavar="PATH", help="a Python that has the peers (default: this)")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        check(options)
        return planned(options) if options.plan else measured(options)
    except (UserError, FileNotFoundError) as error:
        return mistake(PROG, error)
    except BrokenPipeError:
        return hush()
    except KeyboardInterrupt:
        return INTERRUPTED


def check(options: argparse.Namespace) -> None:
    """Refuse what the other half of the command understands, and sizes that are none."""
    wrong = MEASURED if options.plan else PLANNED
    for name in wrong:
        if hasattr(options, name):
            what = "is for measuring" if options.plan else "belongs to --plan"
            raise OptionError(f"--{name.replace('_', '-')} {what}; leave it out")
    for name in ("prompt_tokens", "batch", "kept", "blocks", "rounds"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} {value} must be at least 1")


def planned(options: argparse.Namespace) -> int:
    about = plan.subject(options.model, getattr(options, "bits", None))
    load = work.Load(
        about.config,
        about.encodings,
        prompt=options.prompt_tokens or plan.PROMPT,
        batch=getattr(options, "batch", 1),
        width=about.width,
        self_conditioning=options.self_conditioning,
        survivors=getattr(options, "survivors", work.SURVIVORS),
        kept=getattr(options, "kept", None),
    )
    record = plan.record(about, load, chip(getattr(options, "chip", "m4-max")), resident_here())
    if options.json == "-":
        print(json.dumps(record))
        return 0
    plan_report.show(record, Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
    save(record, options.json)
    return 0


def resident_here() -> int | None:
    """Bytes that the GPU of this Mac may keep; None elsewhere, where --plan needs no framework."""
    if sys.platform != "darwin" or not installed("mlx"):
        return None
    return implementation(CHOICES["mlx"]).memory("auto")


def measured(options: argparse.Namespace) -> int:
    name = options.model or "demo"
    rivals = rivals_of(options, name)
    given = {key: getattr(options, key) for key in LOAD if hasattr(options, key)}
    if options.self_conditioning == "dense":
        del given["self_conditioning"]
    model, processor = load(name, **given)
    question = bench.DEMO_QUESTION if name == "demo" else bench.QUESTION
    task = bench.task(
        model,
        processor,
        tokens=options.prompt_tokens,
        blocks=getattr(options, "blocks", 2),
        rounds=getattr(options, "rounds", 3),
        question=question,
    )
    choice = choose(given.get("backend", "auto"))
    record = {"name": name} | bench.measure(model, processor, choice, task, rivals, tell)
    if options.json == "-":
        print(json.dumps(record))
        return 0
    print(bench_report.markdown(record))
    save(record, options.json)
    return 0


def rivals_of(options: argparse.Namespace, model: str) -> list[bench.Rival]:
    python = getattr(options, "peer_python", sys.executable)
    found = []
    if hasattr(options, "against_ar"):
        found.append(bench.Rival("mlx-lm", options.against_ar, python))
    if hasattr(options, "against"):
        found.append(bench.Rival(options.against, model, python))
    return found


def tell(line: str) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)


def save(record: dict[str, Any], file: str | None) -> None:
    """Written beside its place first, so that a file is whole or not there."""
    if file is None:
        return
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OptionError(f"--json {file} cannot be written ({error.strerror}); choose another place") from error
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
