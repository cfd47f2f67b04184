"""What a command line asks for, before anything is opened: paths, and options that mean nothing together."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from mlx_diffgemma.errors import OptionError


def refuse(options: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raise ``OptionError`` for the first of the options that was given: none is swallowed."""
    for name in names:
        if getattr(options, name) not in (None, False):
            raise OptionError(f"--{name.replace('_', '-')} {why}")


def expanded(text: str) -> Path:
    """With the home folder written out.

    Raises:
        OptionError: it is nobody's.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise OptionError(f"{text!r}: there is no such user; give another path") from error
