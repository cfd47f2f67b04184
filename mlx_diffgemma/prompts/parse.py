"""What an answer consists of: the thought channel and the text. Format: Gemma 4 chat template, section on channels."""

from __future__ import annotations

import re
from dataclasses import dataclass

OPEN, CLOSE = "<|channel>", "<channel|>"
THOUGHT = re.compile(re.escape(OPEN) + r"thought\n?(.*?)(?:" + re.escape(CLOSE) + r"|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Parsed:
    """``text`` without thoughts; ``thinking`` all thoughts, finished or not, in order."""

    text: str
    thinking: str


def parse(raw: str) -> Parsed:
    """Split text that still holds its channel tokens. An unclosed thought, as in a draft, runs to the end."""
    thoughts = [match.strip() for match in THOUGHT.findall(raw)]
    return Parsed(THOUGHT.sub("", raw), "\n".join(filter(None, thoughts)))
