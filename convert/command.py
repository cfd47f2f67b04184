"""``mlx_diffgemma.convert``: the command line of the converters. This release only shows what a checkpoint holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_diffgemma.commands.options import Parser, mistake
from mlx_diffgemma.errors import OptionError, UserError
from mlx_diffgemma.formats import Checkpoint, open_checkpoint
from mlx_diffgemma.hub import DEMO

from .show import report

PROG = "mlx_diffgemma.convert"


def parser() -> Parser:
    parse = Parser(PROG, "Show what a checkpoint holds.")
    parse.add_argument("source", help="a checkpoint folder, or 'demo'")
    parse.add_argument("--show", action="store_true", help="print format, sizes, coverage and defaults; read no weight")
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if not options.show:
            raise OptionError("writing checkpoints is not part of this release; --show prints what SOURCE holds")
        print(report(local_checkpoint(options.source)))
    except (UserError, FileNotFoundError) as error:
        return mistake(PROG, error)
    return 0


def local_checkpoint(source: str) -> Checkpoint:
    folder = DEMO if source == "demo" else Path(source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{source!r} is not a folder here; download the checkpoint first, or say 'demo'")
    return open_checkpoint(folder)


if __name__ == "__main__":
    sys.exit(main())
