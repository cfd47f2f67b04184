"""``python -m mlx_diffgemma COMMAND ...``: the console scripts by another door."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "generate": ("mlx_diffgemma.commands.generate", "answer a prompt, drafts drawn live"),
    "bench": ("mlx_diffgemma.commands.bench", "count or measure what a step costs"),
    "convert": ("convert.command", "show what a checkpoint holds"),
}


def usage() -> str:
    rows = [f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()]
    first, last = "usage: python -m mlx_diffgemma COMMAND ...", "COMMAND --help explains a command."
    return "\n".join([first, "", *rows, "", last])


def main(argv: Sequence[str] | None = None) -> int:
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print((f"mlx_diffgemma: unknown command {name!r}\n" if name else "") + usage(), file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
