"""The thought channel in finished answers, in drafts, and in answers that misuse it."""

from __future__ import annotations

import pytest

from mlx_diffgemma.prompts.parse import Parsed, parse
from tests.terminal.fakes import CLOSE_ID, END, OPEN_ID, processor, spelled

CASES = {
    "no channel": ("Blue, by scattering.\n", "Blue, by scattering.\n", ""),
    "a thought": ("<|channel>thought\nShort waves.\n<channel|>Blue.", "Blue.", "Short waves."),
    "an empty thought": ("<|channel>thought\n<channel|>Blue.", "Blue.", ""),
    "an unclosed thought": ("<|channel>thought\nShort wa", "", "Short wa"),
    "two thoughts": (
        "<|channel>thought\nOne.<channel|>A <|channel>thought\nTwo.\nThree.<channel|>B",
        "A B",
        "One.\nTwo.\nThree.",
    ),
    "a second one unclosed": ("<|channel>thought\nOne.<channel|>A <|channel>thought\nTw", "A ", "One.\nTw"),
    "only opened": ("Blue <|channel>", "Blue ", ""),
    "name not yet written": ("Blue <|channel>thou", "Blue ", ""),
    "name without its line": ("Blue <|channel>thought", "Blue ", ""),
    "close without open": ("Blue<channel|> sky", "Blue sky", ""),
    "another channel": ("<|channel>final\nBlue<channel|>", "final\nBlue", ""),
    "nothing": ("", "", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_text_and_thoughts(case: str):
    raw, text, thinking = CASES[case]
    assert parse(raw) == Parsed(text, thinking)


@pytest.mark.parametrize("case", CASES)
def test_the_text_of_a_longer_answer_begins_with_that_of_a_shorter(case: str):
    """Token by token, what was shown as answer is never taken back: a thought must not flash up as text first."""
    ids: list[int] = []
    raw = CASES[case][0]
    for i, part in enumerate(raw.replace("<|channel>", "\0").replace("<channel|>", "\1")):
        ids += [OPEN_ID] if part == "\0" else [CLOSE_ID] if part == "\1" else spelled(part)
        now = processor().parse(ids).text
        assert processor().parse(ids[:i]).text == now[: len(processor().parse(ids[:i]).text)]
    assert processor().parse(ids) == parse(raw)


def test_other_control_tokens_never_reach_the_text():
    ids = [OPEN_ID, *spelled("thought\nHm"), END, CLOSE_ID, *spelled("Yes"), END]
    assert processor().parse(ids) == Parsed("Yes", "Hm")
