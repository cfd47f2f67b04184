"""``mlx_diffgemma.convert``: write a checkpoint in another format, plan it, or show what one holds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_diffgemma.commands.options import INTERRUPTED, Parser, hush, mistake
from mlx_diffgemma.errors import OptionError, UserError

from . import describe, plan, recipes
from .progress import shown
from .run import convert
from .show import report
from .source import open_source
from .targets import TARGETS, target
from .text import parse_size

PROG = "mlx_diffgemma.convert"


def parser() -> Parser:
    parse = Parser(PROG, "Convert a checkpoint, or show what it holds.")
    parse.add_argument("source", help="a checkpoint folder, a hub name, a .gguf file, or 'demo'")
    parse.add_argument("--out", metavar="DIR", help="folder to write; it must be empty or not there")
    parse.add_argument("--to", metavar="FORMAT", default="mlx", help=f"{', '.join(TARGETS)} (default: mlx)")
    known = ", ".join(recipes.RECIPES)
    parse.add_argument(
        "--recipe", metavar="NAME", help=f"{known}, or a .toml file (default: keep the numbers as they are stored)"
    )
    parse.add_argument("--dry-run", action="store_true", help="print what would be written, tensor by tensor")
    parse.add_argument("--resume", action="store_true", help="continue an interrupted conversion")
    parse.add_argument("--text-only", action="store_true", help="leave the vision tower and its projector out")
    parse.add_argument("--sidecars-from", metavar="DIR", help="take tokenizer, template and so on from here")
    parse.add_argument("--shard-size", metavar="SIZE", type=size, default=plan.SHARD, help="most per file (5GB)")
    parse.add_argument("--quiet", action="store_true", help="print nothing but mistakes")
    parse.add_argument("--show", action="store_true", help="print format, sizes, coverage and defaults of SOURCE")
    return parse


def size(text: str) -> int:
    found = parse_size(text)
    if not found or found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give one such as 5GB")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except (UserError, FileNotFoundError) as error:
        return mistake(PROG, error)
    except BrokenPipeError:
        return hush()
    except KeyboardInterrupt:
        again = "; the same command with --resume continues" if options.out else ""
        print(f"{PROG}: interrupted{again}", file=sys.stderr)
        return INTERRUPTED


def run(options: argparse.Namespace) -> int:
    if not options.show and not options.dry_run and options.out is None:
        raise OptionError("nothing to do; give a folder to write with --out, or say --dry-run or --show")
    kind, recipe = target(options.to), recipes.recipe(options.recipe)
    checkpoint = open_source(options.source)
    if options.show:
        print(report(checkpoint))
        return 0
    planned = plan.make(checkpoint, kind, recipe, text_only=options.text_only, shard_size=options.shard_size)
    if options.dry_run:
        print(describe.dry_run(planned))
        return 0
    if not options.quiet:
        for line in describe.remarks(planned):
            print(line, file=sys.stderr)
    aside = Path(options.sidecars_from).expanduser() if options.sidecars_from else None
    total = sum(item.stored.nbytes for item in planned.items)
    with shown(total, options.quiet) as progress:
        done = convert(planned, Path(options.out).expanduser(), progress, resume=options.resume, sidecars_from=aside)
    if not options.quiet:
        print(describe.summary(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
