"""``mlx_diffgemma.convert``: write a checkpoint in another format, plan it, or show what one holds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_diffgemma.commands.options import INTERRUPTED, Parser, hush, mistake
from mlx_diffgemma.errors import CheckpointError, OptionError, UserError
from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.json_file import read_json

from . import describe, manifest, plan, recipes, sidecars
from . import report as quality_report
from .options import expanded, refuse
from .output import JOURNAL
from .progress import shown
from .run import convert, to_read
from .show import report
from .source import open_source
from .targets import CONTAINERS, TARGETS, target
from .text import parse_size
from .upload import check_name, upload

PROG = "mlx_diffgemma.convert"
DEFAULT = "mlx"  # format
WRITING = ("out", "to", "recipe", "dry_run", "resume", "text_only", "shard_size", "upload")  # options


def parser() -> Parser:
    parse = Parser(PROG, "Convert a checkpoint, or show what it holds.")
    parse.add_argument("source", help="a checkpoint folder, a hub name, a .gguf file, or 'demo'")
    parse.add_argument("--out", metavar="DIR", help="folder to write; it must be empty or not there")
    parse.add_argument("--to", metavar="FORMAT", help=f"{', '.join(TARGETS)} (default: {DEFAULT})")
    known = ", ".join(recipes.RECIPES)
    parse.add_argument(
        "--recipe", metavar="NAME", help=f"{known}, or a .toml file (default: keep the numbers as they are stored)"
    )
    parse.add_argument("--dry-run", action="store_true", help="print what would be written, tensor by tensor")
    parse.add_argument("--resume", action="store_true", help="continue an interrupted conversion")
    parse.add_argument("--text-only", action="store_true", help="leave the vision tower and its projector out")
    parse.add_argument("--sidecars-from", metavar="DIR", help="take tokenizer, template and so on from here")
    parse.add_argument("--shard-size", metavar="SIZE", type=size, help="most per file (default: 5GB)")
    parse.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub repository")
    parse.add_argument("--upload", metavar="REPO", help="send the result, or SOURCE where it is one, to the hub")
    parse.add_argument("--quiet", action="store_true", help="no progress, notes or summary")
    parse.add_argument("--show", action="store_true", help="print format, sizes, coverage and defaults of SOURCE")
    parse.add_argument("--verify", action="store_true", help="with --show: compare every file with the manifest")
    quality_report.add_arguments(parse)
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
        begun = options.out and (expanded(options.out) / JOURNAL).exists()
        again = "; what is finished is kept, the same command with --resume continues" if begun else ""
        print(f"{PROG}: interrupted{again}", file=sys.stderr)
        return INTERRUPTED


def run(options: argparse.Namespace) -> int:
    quality_report.check(options)
    if options.report is not None:
        return quality_report.run(options)
    check(options)
    if options.upload and not options.out:
        return send(expanded(options.source), options)
    kind, recipe = target(options.to or DEFAULT), recipes.recipe(options.recipe)
    aside = expanded(options.sidecars_from) if options.sidecars_from else None
    checkpoint = open_source(options.source, options.revision, aside, headers=options.dry_run or options.show)
    if options.show:
        print(report(checkpoint, verified(checkpoint) if options.verify else None))
        return 0
    planned = plan.make(checkpoint, kind, recipe, text_only=options.text_only, shard_size=options.shard_size)
    sidecars.find(checkpoint.folder, aside)
    if options.dry_run:
        print(describe.dry_run(planned))
        return 0
    say(options, *describe.remarks(planned))
    out, writer = expanded(options.out), CONTAINERS.get(options.to)
    with shown(planned.source_bytes if writer else to_read(planned), options.quiet) as progress:
        if writer:
            done = writer.write(planned, out, progress)
        else:
            done = convert(planned, out, progress, resume=options.resume, sidecars_from=aside)
    if not options.quiet:
        print(describe.summary(done))
    return send(out, options) if options.upload else 0


def check(options: argparse.Namespace) -> None:
    """What can be refused before anything is opened or downloaded."""
    if options.show:
        refuse(options, WRITING, "does not go with --show, which only reads SOURCE")
        if not gguf(options.source):
            refuse(options, ["sidecars_from"], "does not go with --show, but where SOURCE is a .gguf file")
    else:
        refuse(options, ["verify"], "belongs to --show")
    if options.dry_run:
        refuse(options, ["upload"], "does not go with --dry-run, which writes nothing")
    elif not (options.show or options.out):
        refuse(options, [name for name in WRITING if name != "upload"], "needs --out, the folder to write")
    if not (options.show or options.dry_run or options.out or options.upload):
        raise OptionError("nothing to do; give a folder to write with --out, or say --dry-run or --show")
    if options.upload:
        check_name(options.upload)
    if options.to in CONTAINERS:
        one_go = f"is not for --to {options.to}, which is written in one go from what SOURCE holds"
        refuse(options, ["resume"] if gguf(options.source) else ["resume", "sidecars_from"], one_go)
        refuse(options, ["shard_size"], f"is not for --to {options.to}, which is one file")
    if options.out and gguf(options.out):
        if options.to not in CONTAINERS:
            raise OptionError(f"--out {options.out!r} ends in .gguf; say --to gguf, or give a folder")
        refuse(options, ["upload"], "needs --out to be a folder")


def gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def verified(checkpoint: Checkpoint) -> int:
    """How many files are as the manifest says; anything else is a mistake to report."""
    folder = checkpoint.files[0].parent
    faults = manifest.verify(folder)
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{folder} is not as it was written: {'; '.join(faults[:3])}{more}")
    return len(read_json(folder / manifest.MANIFEST)["outputs"])


def send(place: Path, options: argparse.Namespace) -> int:
    say(options, f"uploading {place} to {options.upload}")
    address = upload(place, options.upload)
    if not options.quiet:
        print(address)
    return 0


def say(options: argparse.Namespace, *lines: str) -> None:
    """On stderr, where the progress is."""
    for line in () if options.quiet else lines:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
