"""``mlx_diffgemma.bench``: what a step costs, by arithmetic (``--plan``, no download) or measured on this machine."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import hub
from ..api import load
from ..backend import CHOICES, KERNELS, choose, implementation, installed
from ..errors import OptionError, UserError
from ..tools import bench, bench_report, plan, plan_report, work
from ..tools.chips import CHIPS, chip
from .options import INTERRUPTED, Parser, hush, mistake, number, whole

PROG = "mlx_diffgemma.bench"
CHIP = "m4-max"
LOAD = ("backend", "dtype", "revision", "kernels", "self_conditioning", "tail")
INCOMPLETE = 1  # status of a run in which a peer that was asked for had no part
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
        "--model",
        help="a hub name, a folder, or demo (default); with --plan a folder, a config.json or demo (default: the 26B)",
    )
    parse.add_argument(
        "--prompt-tokens", type=whole, metavar="N", help="of the prompt (default: a short question; --plan: 4096)"
    )
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
    counted.add_argument(
        "--chip", default=unset, metavar="NAME", help=f"{CHIP} (default), {', '.join(n for n in CHIPS if n != CHIP)}"
    )
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
        status = planned(options) if options.plan else measured(options)
        sys.stdout.flush()  # a pipe that is closed is noticed here, not when the interpreter ends
        return status
    except (UserError, FileNotFoundError) as error:
        return mistake(PROG, error)
    except BrokenPipeError:
        return hush()
    except KeyboardInterrupt:
        return INTERRUPTED


def check(options: argparse.Namespace) -> None:
    """Refuse, before anything is done, what the other half of the command understands, and what means nothing."""
    wrong = MEASURED if options.plan else PLANNED
    for name in wrong:
        if hasattr(options, name):
            what = "is for measuring" if options.plan else "belongs to --plan"
            raise OptionError(f"--{name.replace('_', '-')} {what}; leave it out")
    for name in ("prompt_tokens", "batch", "kept", "blocks", "rounds"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if options.model == "":
        raise OptionError("--model is empty; give a folder, a hub name or demo, or leave it out")
    if hasattr(options, "survivors") and options.self_conditioning != "survivors":
        raise OptionError("--survivors needs --self-conditioning survivors; add that, or leave it out")
    if hasattr(options, "peer_python") and not (hasattr(options, "against_ar") or hasattr(options, "against")):
        raise OptionError("--peer-python needs --against or --against-ar; add one, or leave it out")
    if options.json not in (None, "-"):
        check_place(options.json)


def check_place(file: str) -> None:
    """Whether ``save`` will be able to write; nothing stays behind.

    Raises:
        OptionError: it will not.
    """
    path = Path(file)
    try:
        if not path.name or path.is_dir():
            raise OptionError(f"--json {file!r} is no name of a file; give one such as bench.json")
        folder = next(parent for parent in path.parents if parent.exists())
        probe = part_of(folder / path.name)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(file, error) from error


def unwritable(file: str, error: OSError) -> OptionError:
    return OptionError(f"--json {file} cannot be written ({error.strerror}); choose another place")


def part_of(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def planned(options: argparse.Namespace) -> int:
    about = plan.subject(options.model, getattr(options, "bits", None))
    text, canvas = about.config.text, about.config.canvas_length
    prompt = options.prompt_tokens or max(1, min(plan.PROMPT, text.max_position_embeddings - canvas))
    plan.check_context(about.config, prompt)
    record = plan.record(about, asked(options, about, prompt), chip(getattr(options, "chip", CHIP)), resident_here())
    if options.json == "-":
        print(json.dumps(record))
        return 0
    print(plan_report.text(record, columns()))
    save(record, options.json)
    return 0


def asked(options: argparse.Namespace, about: plan.Subject, prompt: int) -> work.Load:
    """The load that is planned for.

    Raises:
        OptionError: more positions than a canvas has, or survivors than there are ids.
    """
    survivors, kept = getattr(options, "survivors", None), getattr(options, "kept", None)
    vocab, canvas = about.config.text.vocab_size, about.config.canvas_length
    if survivors is not None and not (math.isfinite(survivors) and 1 <= survivors <= vocab):
        raise OptionError(f"--survivors {survivors:g} must be from 1 to {vocab:,}, which is the vocabulary")
    if kept is not None and kept > canvas:
        raise OptionError(f"--kept {kept:,} must be from 1 to {canvas:,}, which is the canvas")
    return work.Load(
        about.config,
        about.encodings,
        prompt=prompt,
        batch=getattr(options, "batch", 1),
        width=about.width,
        self_conditioning=options.self_conditioning,
        survivors=min(work.SURVIVORS, vocab) if survivors is None else survivors,
        kept=kept,
    )


def columns() -> int:
    """Of the terminal, or as COLUMNS has it."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return shutil.get_terminal_size((PIPE_WIDTH, 0)).columns if known else PIPE_WIDTH


def resident_here() -> int | None:
    """Bytes that the GPU of this Mac may keep; None elsewhere, where --plan needs no framework."""
    if sys.platform != "darwin" or not installed("mlx"):
        return None
    return implementation(CHOICES["mlx"]).memory("auto")


def measured(options: argparse.Namespace) -> int:
    name = options.model or "demo"
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
    record = {"name": name, "options": given}
    record |= bench.measure(model, processor, choice, task, rivals_of(options, name), tell)
    if options.json == "-":
        print(json.dumps(record))
    else:
        print(bench_report.markdown(record))
        save(record, options.json)
    return INCOMPLETE if record["missing"] else 0


def rivals_of(options: argparse.Namespace, model: str) -> list[bench.Rival]:
    """Peers know neither demo nor ~."""
    place = hub.DEMO if model == "demo" else Path(model).expanduser()
    python = getattr(options, "peer_python", sys.executable)
    found = []
    if hasattr(options, "against_ar"):
        found.append(bench.Rival("mlx-lm", options.against_ar, python))
    if hasattr(options, "against"):
        found.append(bench.Rival(options.against, str(place) if place.exists() else model, python))
    return found


def tell(line: str) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)


def save(record: dict[str, Any], file: str | None) -> None:
    """Written beside its place first, so that a file is whole or not there."""
    if file is None:
        return
    path = Path(file)
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise unwritable(file, error) from error
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
