"""The live view, event by event, on a terminal in memory."""

from __future__ import annotations

import re

import pytest
from rich.style import Style

from mlx_diffgemma.events import Finished
from mlx_diffgemma.terminal import shade
from mlx_diffgemma.terminal.live import StreamView
from mlx_diffgemma.terminal.text import fold, harmless
from tests.terminal.fakes import BYTES, CLOSE_ID, OPEN_ID, PAD, Terminal, block, draft, processor
from tests.terminal.screen import everything, visible

OURS = re.compile(r"\x1b\[(\?(25|7|2026)[hl]|\d*A|K|J|[\d;]*m)|\r\n|\r")


def test_drafts_replace_one_another():
    terminal = Terminal()
    view = terminal.view()
    view.wait("reading")
    for step, text in enumerate(["xxxx xxxxx", "hexx xxrld\nand a second line", "hello world"], 1):
        view.show(draft(text, step=step))
        rows = visible(terminal.screen)
        assert rows[:-1] == text.split("\n")
        assert f"step {step}/48" in rows[-1]
    assert len(visible(terminal.screen)) == 2


def test_settled_text_stays_and_the_frame_goes():
    terminal = Terminal()
    view = terminal.view()
    view.show(draft("one\ntwo th"))
    view.show(block("one\ntwo th"))
    view.show(draft("ree\nfour", block=1, text="one\ntwo three\nfour"))
    assert visible(terminal.screen)[:-1] == ["one", "two three", "four"]
    view.show(block("ree\nfour", 1))
    view.close()
    assert visible(terminal.screen) == ["one", "two three", "four"]
    cells = [terminal.screen.buffer[y][x] for y in range(3) for x in range(10)]
    assert all(cell.fg == "default" and not cell.italics for cell in cells)
    assert terminal.raw.endswith("\x1b[?25h")
    assert terminal.screen.cursor.x == 0


def test_interruption_leaves_finished_blocks_only():
    terminal = Terminal()
    view = terminal.view()
    view.show(draft("settled "))
    view.show(block("settled "))
    view.show(draft("not yet", block=1, text="settled not yet"))
    view.close()
    assert visible(terminal.screen) == ["settled"]


def test_accepted_and_renoised_differ():
    terminal = Terminal()
    terminal.view().show(draft("abcdef", accepted=[True, False, False, True, True, True], confidence=[1, 0.1, 0.9, 1]))
    kept, faint, strong = (terminal.screen.buffer[0][x] for x in range(3))
    assert kept.fg == "default" and not kept.italics
    assert faint.italics and strong.italics
    assert len({kept.fg, faint.fg, strong.fg}) == 3


def test_shades_rise_with_confidence():
    styles = [shade.style(shade.Piece("x", accepted=False, confidence=c)) for c in (0.0, 0.3, 0.5, 0.7, 1.0)]
    assert [s.color.name for s in styles] == list(shade.LADDER)
    assert shade.style(shade.Piece("x", confidence=0.2)) != shade.style(shade.Piece("x", confidence=0.9))


def test_nothing_after_the_end_token():
    terminal = Terminal()
    terminal.view().show(draft(["seen", PAD, PAD], text="seen"))
    assert visible(terminal.screen)[0] == "seen"
    terminal.view().show(draft(["short", 2_000_000, "beyond"], text="short"))
    assert "beyond" not in terminal.raw


def test_no_more_than_max_tokens_and_the_stop_text():
    terminal = Terminal()
    terminal.view(max_tokens=5).show(draft("hello world"))
    assert visible(terminal.screen)[0] == "hello"
    terminal = Terminal()
    terminal.view().show(draft("hello STOP world", text="hello "))
    assert visible(terminal.screen)[0] == "hello"


def test_an_end_that_was_held_back_comes_with_the_result():
    finished = Finished(0, (), (), "length", text="one ST")
    terminal, plain = Terminal(), Terminal()
    view, stream = terminal.view(), StreamView(plain)
    for each in (view, stream):
        each.show(block("one ST", text="one "))
        each.show(draft("OP", block=1, text="one "))
    assert visible(terminal.screen)[0] == "one"
    view.show(draft("ART", block=1, text="one START"))
    assert visible(terminal.screen)[0] == "one START"
    for each in (view, stream):
        each.show(finished)
        each.close()
    assert visible(terminal.screen) == visible(plain.screen) == ["one ST"]


@pytest.mark.parametrize(("columns", "rows"), [(80, 6), (13, 24), (7, 4), (200, 50)])
def test_drafts_taller_than_the_screen(columns, rows):
    text = "\n".join(f"line {i} of a long answer" for i in range(40))
    terminal = Terminal(columns, rows)
    view = terminal.view()
    for step in (1, 2, 3):
        view.show(draft(text, step=step))
        assert not terminal.screen.history.top
        assert len(visible(terminal.screen)) <= rows
    view.show(block(text))
    view.close()
    wrapped = [row.plain.rstrip() for row in fold([(text, Style())], columns)]
    assert everything(terminal.screen) == wrapped


def test_wide_characters_fill_narrow_rows():
    terminal = Terminal(8, 24)
    view = terminal.view()
    view.show(draft("日本語のテキスト", text="日本語のテキスト"))
    assert [row.replace(" ", "") for row in visible(terminal.screen)[:2]] == ["日本語の", "テキスト"]
    view.show(block("日本語のテキスト"))
    view.close()
    assert [row.replace(" ", "") for row in visible(terminal.screen)] == ["日本語の", "テキスト"]


def test_a_terminal_that_changes_its_width():
    terminal = Terminal(60, 20)
    view = terminal.view()
    view.show(draft("short\nlines"))
    terminal.screen.resize(20, 40)
    view.console.width = 40
    view.show(draft("short\nlines", step=2))
    assert visible(terminal.screen).count("lines") == 1
    assert view.painter._top(20, 20).count("A") == 1


def test_a_narrower_terminal_rewraps_the_frame():
    view = Terminal(60, 20).view()
    view.show(draft("x" * 50))
    assert view.painter._top(60, 20) == "\r\x1b[1A"
    assert view.painter._top(30, 20) == "\r\x1b[3A"  # both rows are longer than 30: four rows


@pytest.mark.parametrize(
    "hostile",
    [
        "\x1b[2J\x1b[31m",
        "\x1b]0;title\x07",
        "\x9b2J\x90q\x9c",
        "a\rb\x08c\x7f",
        "\x0e\x0f\x0c\x0b\x00",
        "\u202egnp\u2028",
    ],
)
def test_control_characters_are_harmless(hostile):
    terminal = Terminal()
    view = terminal.view()
    view.show(draft(hostile))
    view.show(block(hostile))
    view.close()
    rest = OURS.sub("", terminal.raw)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u202e]", rest)
    assert "\x1b[2J" not in terminal.raw and "\x1b[31m" not in terminal.raw

    plain = Terminal()
    stream = StreamView(plain)
    stream.show(block(hostile))
    stream.close()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", plain.raw)


def test_harmless_keeps_text():
    text = "tab\there, naïve, 日本, 🙂\nnext"
    assert harmless(text) == text
    assert harmless("a\r\nb\x1b[m") == "a\nb␛[m"


def test_thoughts_are_dim_and_not_part_of_the_answer():
    terminal = Terminal()
    view = terminal.view()
    thinking = [OPEN_ID, "thought\n", "two and two", CLOSE_ID, "four"]
    view.show(draft(thinking, text="four"))
    assert visible(terminal.screen)[0] == "two and twofour"
    assert terminal.screen.buffer[0][0].italics and not terminal.screen.buffer[0][11].italics
    view.show(block(thinking, text="four"))
    view.close()
    assert visible(terminal.screen) == ["two and two", "four"]
    assert view.text == "four"


def test_a_thought_over_two_blocks():
    speller = shade.Speller(processor())
    pieces, channel = speller.pieces([OPEN_ID, *map(ord, "thou")])
    assert pieces == [] and channel.thought
    pieces, channel = speller.pieces([*map(ord, "ght\nhm"), CLOSE_ID, ord("A")], channel)
    assert [(p.text, p.thought) for p in pieces] == [("h", True), ("m", True), ("A", False)]
    assert not channel.thought


def test_bytes_join_to_characters():
    speller = shade.Speller(processor())
    euro = [BYTES + byte for byte in "€".encode()]
    assert speller.spell([ord("a"), *euro, ord("b")]) == [("a", 1), ("€", 3), ("b", 1)]
    assert speller.spell(euro[:1]) == [("\ufffd", 1)]


def test_a_wide_character_moves_to_the_next_row_whole():
    assert [row.plain for row in fold([("日本語", Style())], 5)] == ["日本", "語"]


def test_tabs_reach_their_stops():
    assert [row.plain for row in fold([("a\tb\n\tc", Style())], 40)] == ["a       b", "        c"]
