"""Text on its way to a terminal: made harmless, and folded into rows the way the terminal itself would."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.cells import get_character_cell_size
from rich.style import Style
from rich.text import Text

Run = tuple[str, Style]

TAB = 8
UNSAFE = re.compile(r"\r\n|[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """``text`` without anything a terminal obeys: controls become visible signs, bidirectional overrides U+FFFD."""
    return UNSAFE.sub(lambda match: _sign(match.group()), text)


def _sign(found: str) -> str:
    if found == "\r\n":
        return "\n"
    code = ord(found)
    if code < 0x20:
        return chr(0x2400 + code)  # the pictures of the control characters: ESC is drawn as ␛
    return "␡" if code == 0x7F else "\ufffd"


def fold(runs: Iterable[Run], width: int) -> list[Text]:
    """Rows of at most ``width`` cells, broken between characters, so that nothing moves when the text settles."""
    rows, column = [Text()], 0
    for text, style in runs:
        part = ""
        for character in text:
            cells = TAB - column % TAB if character == "\t" else get_character_cell_size(character)
            if character == "\n" or column + cells > width:
                rows[-1].append(part, style)
                rows.append(Text())
                part, column = "", 0
            if character == "\t":
                character, cells = " " * cells, cells if column else TAB
            if character != "\n":
                part += character
                column += cells
        rows[-1].append(part, style)
    return rows


def one_line(text: str) -> str:
    """``text`` on a single line."""
    return harmless(text).replace("\n", "⏎").replace("\t", " ")
