"""What the commands share: a parser whose mistakes are one line, number types, and the end of a failed command."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..terminal.text import one_line

USAGE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line on stderr and exits with status 2; suggests the option that was meant."""

    def __init__(self, prog: str, description: str, extra: str = "--help tells how to call"):
        """``extra`` is the remedy for an argument that belongs to no option."""
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.extra = extra

    def parse_args(self, args=None, namespace=None):
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return options

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {one_line(message)}\n")

    def _unknown(self, given: str) -> str:
        if not given.startswith("-"):
            return f"unexpected argument {given!r}; {self.extra}"
        name = given.partition("=")[0]
        near = difflib.get_close_matches(name, [o for a in self._actions for o in a.option_strings], n=1)
        return f"unknown option {name!r}; " + (f"did you mean {near[0]}?" if near else "--help lists them all")


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give one such as 48") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give one such as 0.5") from None


def whole_or_off(text: str) -> int | None:
    try:
        return None if text == "off" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give one such as 1, or off") from None


def number_or_off(text: str) -> float | None:
    try:
        return None if text == "off" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give one such as 0.005, or off") from None


def mistake(prog: str, error: Exception) -> int:
    """Report what the user can mend; the exit status."""
    print(f"{prog}: {one_line(str(error))}", file=sys.stderr)
    return USAGE


def hush() -> int:
    """After a broken pipe: whatever is still buffered goes nowhere, so that the interpreter ends without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def given(options: argparse.Namespace, names: Sequence[str]) -> dict:
    """The options that were given, so that the checkpoint's own values rule everywhere else."""
    return {name: getattr(options, name) for name in names if hasattr(options, name)}
