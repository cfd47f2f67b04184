"""``--report``: what a quantization cost, against the checkpoint it was made from. Arguments, and figures for people.

mlx_diffgemma.convert dg-4bit --report prompts.txt --against source --out report.json --picture report.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_diffgemma import __version__
from mlx_diffgemma.backend import CHOICES, choose
from mlx_diffgemma.commands.options import whole
from mlx_diffgemma.errors import CheckpointError, OptionError
from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.json_file import read_json

from .manifest import MANIFEST, origin
from .measure import AFFORDABLE, Setup, group_name, measure
from .options import expanded, refuse
from .picture import HeatMap, draw
from .quality import Group, dequantized
from .questions import read_questions
from .source import open_source
from .text import clock, readable

ITSELF = "itself"
OWN = ("against", "backend", "dtype", "steps_limit", "by_module", "picture")  # options that mean nothing elsewhere
FOREIGN = ("to", "recipe", "dry_run", "resume", "text_only", "shard_size", "upload", "show", "verify")
EVERY = 5.0  # seconds between lines of progress where there is no terminal
WORST = 3  # modules named
Figures = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of the report's but ``--out``, which is then a JSON file."""
    of = parser.add_argument_group("measuring what a quantization cost", "--out is then a .json file")
    of.add_argument(
        "--report", metavar="PROMPTS", help="compare SOURCE with --against on the prompts of a file, or 'demo'"
    )
    of.add_argument("--against", metavar="MODEL", help=f"what SOURCE was made from, or '{ITSELF}' to judge the kernels")
    of.add_argument("--picture", metavar="PNG", help="save the heat map, layers by modules")
    of.add_argument("--backend", help=f"auto (default), {', '.join(CHOICES)}")
    of.add_argument("--dtype", help="of both models: bfloat16, or float32 to see less rounding (default: the source's)")
    of.add_argument("--steps-limit", metavar="N", type=whole, help="most denoising steps per canvas")
    of.add_argument(
        "--by-module",
        action=argparse.BooleanOptionalAction,
        help=f"quantize one module at a time, a model load each (default: if it takes {AFFORDABLE:.0f} s at most)",
    )


def check(options: argparse.Namespace) -> None:
    """What can be refused before anything is opened.

    Raises:
        OptionError: an option of the report without it, or one of the converter with it; a file that cannot be.
    """
    if options.report is None:
        return refuse(options, OWN, "belongs to --report")
    refuse(options, FOREIGN, "does not go with --report, which measures SOURCE as it is")
    if options.against is None:
        raise OptionError(f"--report needs --against, what SOURCE was made from, or '{ITSELF}'")
    if options.dtype not in (None, "bfloat16", "float32"):
        raise OptionError(f"dtype={options.dtype!r} must be bfloat16 or float32")
    for name, ending in (("out", ".json"), ("picture", ".png")):
        given = getattr(options, name)
        if given is not None:
            _writable(expanded(given), f"--{name}", ending)


def _writable(place: Path, flag: str, ending: str) -> None:
    if place.suffix.lower() != ending or place.is_dir():
        raise OptionError(f"{flag} {str(place)!r}: with --report it is a file that ends in {ending}")
    if not place.parent.is_dir():
        raise OptionError(f"{flag} {str(place)!r}: there is no folder {str(place.parent)!r}")


def run(options: argparse.Namespace) -> int:
    """Measure, print, save; the exit status.

    Raises:
        FileNotFoundError, UserError: anything that the person at the keyboard can mend.
    """
    check(options)
    choice, questions = choose(options.backend or "auto"), read_questions(options.report)
    aside = expanded(options.sidecars_from) if options.sidecars_from else None
    other = open_source(options.source, options.revision, aside)
    itself = options.against == ITSELF
    source = _own_values(other) if itself else open_source(options.against)
    check_alike(source, other)
    with _progress(options.quiet) as tell:
        setup = Setup(
            choice,
            options.dtype or ("float32" if choice.name == "reference" else source.dtype),
            steps_limit=options.steps_limit,
            by_module=options.by_module,
            itself=itself,
            tell=tell,
        )
        figures = _about(options, source, other, setup) | measure(source, other, questions, setup)
    if not options.quiet:
        show(figures, Console(highlight=False))
    save(figures, options)
    return 0


def _own_values(checkpoint: Checkpoint) -> Checkpoint:
    if not any(stored.encoding.quantized for stored in checkpoint.tensors.values()):
        raise CheckpointError(f"{checkpoint.folder} holds no quantized tensor; --against {ITSELF} is for those that do")
    return dataclasses.replace(dequantized(checkpoint), format=f"{checkpoint.format}, dequantized")


def check_alike(source: Checkpoint, other: Checkpoint) -> None:
    """Raise ``CheckpointError`` unless both are of one network; names the first figure that differs."""
    pairs = [("canvas_length", source.config.canvas_length, other.config.canvas_length)]
    for field in dataclasses.fields(source.config.text):
        pairs.append((field.name, getattr(source.config.text, field.name), getattr(other.config.text, field.name)))
    for name, left, right in pairs:
        if left != right:
            raise CheckpointError(
                f"{other.folder} and {source.folder} are not of one model: {name} is {right!s:.60} and {left!s:.60}"
            )


def _about(options: argparse.Namespace, source: Checkpoint, other: Checkpoint, setup: Setup) -> dict[str, Any]:
    """What was compared, with what, by what."""
    manifest = other.files[0].parent / MANIFEST
    made = read_json(manifest) if manifest.is_file() else {}
    return {
        "versions": {
            "mlx_diffgemma": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "platform": platform.platform(),
        },
        "quantized": _checkpoint(other),
        "source": _checkpoint(source) | {"itself": setup.itself},
        "recipe": made.get("recipe"),
        "made_by": made.get("library"),
        "prompts": options.report,
        "backend": setup.choice.name,
        "dtype": setup.dtype,
        "steps_limit": setup.steps_limit,
    }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    weights = sum(row.size for row in checkpoint.table.values())
    formats: dict[str, dict[str, int]] = {}
    for name, row in checkpoint.table.items():
        count = formats.setdefault(row.role, {})
        count[checkpoint.tensors[name].format] = count.get(checkpoint.tensors[name].format, 0) + 1
    return {
        "name": origin(checkpoint),
        "format": checkpoint.format,
        "bytes": checkpoint.nbytes,
        "weights": weights,
        "bits_per_weight": 8 * checkpoint.nbytes / weights,
        "formats": formats,
        "notes": list(checkpoint.notes),
    }


def save(figures: Figures, options: argparse.Namespace) -> None:
    """The JSON file and the picture, where they are asked for.

    Raises:
        OptionError: the disk says no.
    """
    try:
        if options.out:
            text = json.dumps(figures, indent=1, allow_nan=False) + "\n"
            expanded(options.out).write_text(text, encoding="utf-8")
        if options.picture and (found := chart(figures)).cells:
            draw(found).save(expanded(options.picture), "PNG")
        elif options.picture:
            print("no picture: nothing was measured by module; --by-module does so", file=sys.stderr)
    except OSError as error:
        raise OptionError(f"the report could not be written: {error.strerror or error}") from error


def chart(figures: Figures) -> HeatMap:
    """KL by module where it was measured, else the relative errors of the weights."""
    rows, weights = figures["modules"]["kl"], figures["weights"]
    cells: dict[Group, float] = {}
    if rows is not None or weights is None:
        title, quantity = "KL of the canvas distribution, one module quantized at a time", "KL, nats"
        cells = {(row["layer"], row["role"]): row["kl"] for row in rows or ()}
    else:
        title, quantity = "Relative error of the weights, ||W - Wq|| / ||W||", "relative error"
        quantized = {(row["layer"], row["role"]): row["relative"] for row in weights["groups"]}
        cells = {group: error for group, error in quantized.items() if error}
    return HeatMap((title, *_headlines(figures)), quantity, cells, figures["layers"])


def _headlines(figures: Figures) -> Iterator[str]:
    """Two lines: what was compared, and the figures that matter most."""
    canvas, answers = figures["canvas"]["with"], figures["generation"]["answers"]
    yield _compared(figures)
    text = f"all of it quantized: KL {canvas['kl']['mean']:.3g} nats (99th percentile {canvas['kl']['p99']:.3g})"
    text += f", top-1 kept {canvas['top1']:.2%}"
    yield text + (f", answers right {_change(answers)}" if answers else "")


def _compared(figures: Figures) -> str:
    other, source = figures["quantized"], figures["source"]
    against = "its own values, dequantized" if source["itself"] else f"{source['name']} ({readable(source['bytes'])})"
    bits = f"{readable(other['bytes'])}, {other['bits_per_weight']:.2f} bits per weight"
    return f"{other['name']} ({bits}) against {against}, {figures['backend']}, {figures['dtype']}"


def _change(answers: Mapping[str, Any]) -> str:
    low, high = answers["interval"]
    return f"{answers['difference']:+.1%} [{low:+.1%}, {high:+.1%}]"


def show(figures: Figures, console: Console) -> None:
    """One screen."""
    print_line = lambda text="": console.print(text, soft_wrap=True, markup=False)  # noqa: E731
    print_line(_compared(figures))
    print_line()
    console.print(_canvas_table(figures))
    print_line()
    console.print(_answer_table(figures["generation"]))
    print_line()
    for line in (*_weights(figures), *_modules(figures), *_measured(figures)):
        print_line(line)


def _table(*head: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    return table


def _canvas_table(figures: Figures) -> Table:
    table = _table("canvases, self-conditioning:", "without", "with")
    both = [figures["canvas"][mode] for mode in ("without", "with")]
    table.add_row("KL, nats, mean [± 95 %]", *(_mean(row["kl"]) for row in both))
    for name, key in (("95th percentile", "p95"), ("99th percentile", "p99"), ("largest", "max")):
        table.add_row(f"KL, nats, {name}", *(f"{row['kl'][key]:.3g}" for row in both))
    table.add_row("top-1 kept", *(f"{row['top1']:.2%}" for row in both))
    table.add_row("experts kept", *(f"{row['experts']['mean']:.2%}" for row in both))
    table.add_row("experts kept, worst (layer)", *(_worst(row["experts"]["layers"]) for row in both))
    return table


def _mean(kl: Mapping[str, float | None]) -> str:
    half = kl["mean_half_interval"]
    return f"{kl['mean']:.3g}" + (f" ± {half:.2g}" if half is not None else "")


def _worst(shares: list[float]) -> str:
    return f"{min(shares):.2%} ({shares.index(min(shares))})"


def _answer_table(found: Mapping[str, Any]) -> Table:
    table = _table(f"{_count(found['prompts'], 'prompt')} answered", "source", "quantized", "difference [95 %]")
    source, other, answers = found["source"], found["quantized"], found["answers"]
    if answers:
        table.add_row(
            "right", *(f"{row['right']} of {found['with_answer']}" for row in (source, other)), _change(answers)
        )
    steps = [row["steps_per_canvas"] for row in (source, other)]
    table.add_row("steps per canvas", *(f"{count:.2f}" for count in steps), f"{steps[1] - steps[0]:+.2f}")
    table.add_row("same text", "", f"{found['same_text']} of {found['prompts']}", "")
    return table


def _weights(figures: Figures) -> Iterator[str]:
    if figures["weights"] is not None:
        roles = {role: error for role, error in figures["weights"]["roles"].items() if error}
        ranked = sorted(roles.items(), key=lambda row: -row[1])
        yield "weights    " + (", ".join(f"{role} {error:.2%}" for role, error in ranked) or "all equal")


def _modules(figures: Figures) -> Iterator[str]:
    modules = figures["modules"]
    if modules["kl"]:
        ranked = sorted(modules["kl"], key=lambda row: -row["kl"])[:WORST]
        worst = ", ".join(f"{group_name(row['layer'], row['role'])} {row['kl']:.2g}" for row in ranked)
        yield f"by module  of {modules['groups']}, alone, most nats: {worst if ranked[0]['kl'] else 'no difference'}"
    elif modules["groups"]:
        cost = clock(modules["estimated_seconds"])
        yield f"by module  not measured: {modules['groups']} model loads, about {cost}; --by-module does it"


def _measured(figures: Figures) -> Iterator[str]:
    sampled = figures["sampled"]
    yield (
        f"measured   on {_count(sampled['trials'], 'canvas', 'es')} of {_count(sampled['prompts'], 'prompt')}, "
        f"{sampled['positions']} of {sampled['canvas_length']} positions each for KL; seed {sampled['seed']}; "
        f"{clock(figures['seconds'])}"
    )


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{ending if number != 1 else ''}"


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """What is being done, on stderr: in place on a terminal, elsewhere a line now and then."""
    if quiet:
        yield lambda text: None
    elif sys.stderr.isatty():
        with Console(stderr=True).status("") as status:
            yield status.update
    else:
        last = [-EVERY]

        def line(text: str) -> None:
            if time.monotonic() - last[0] >= EVERY:
                last[0] = time.monotonic()
                print(text, file=sys.stderr, flush=True)

        yield line
