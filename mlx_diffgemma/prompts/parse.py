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
    """Split text that still holds its channel tokens. An unclosed thought, as in a draft, runs to the end.

    A channel token without its partner is dropped like any other control token.
    """
    thoughts = [match.strip() for match in THOUGHT.findall(raw)]
    text = THOUGHT.sub("", raw)
    before, opened, name = text.rpartition(OPEN)
    if opened and "thought".startswith(name):  # the draft ends within the channel's name
        text = before
    return Parsed(text.replace(OPEN, "").replace(CLOSE, ""), "\n".join(filter(None, thoughts)))
