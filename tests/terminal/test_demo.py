"""The demo's choice of prompts and how it shows an answer."""

from __future__ import annotations

import sys

import pytest

from mlx_diffgemma.events import Finished, Stats
from tests.terminal.fakes import Terminal, block, draft, processor
from tests.terminal.screen import ROOT, visible


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(ROOT / "demo"))
    import run

    yield run
    sys.path.remove(str(ROOT / "demo"))


def test_prompts_are_held_out_and_cover_every_task(demo):
    chosen = demo.examples()
    assert {example.task for example in chosen} == set(demo.NAMES_OF_TASKS)
    assert len({example.prompt for example in chosen}) == len(chosen) >= 15
    assert all(demo.draw.__globals__["held_out"](e.prompt) for e in chosen if e.task != "rhyme")
    assert chosen == demo.examples()


@pytest.mark.parametrize("columns", [90, 50])
def test_answers_stand_beside_their_prompts(demo, columns):
    terminal = Terminal(columns, 24)
    board = demo.Board(processor(), terminal.view().console)
    example = demo.Example("sudoku4", "sudoku\n1.\n.1", "12\n21")
    board.ask(example)
    board.show(example, draft("12\n23"))
    assert [row.split() for row in visible(terminal.screen)] == [["○", "sudoku4", "1.", "12"], [".1", "23"]]
    board.show(example, block("12\n21"))
    result = Finished(0, (1, 2, 3, 4, 5), (), "stop", Stats(steps_per_block=(2,)), "12\n21")
    board.settle(demo.Outcome(example, result))
    board.close()
    rows = visible(terminal.screen)
    assert rows[0].split() == ["✓", "sudoku4", "1.", "12"]
    assert " ".join(" ".join(rows[1:]).split()) == ".1 21 2 steps"
    assert demo.plain(demo.Outcome(example, result)).count("\n") == 0


def test_a_wrong_answer_is_marked(demo):
    example = demo.Example("add", "1+1=", "2")
    outcome = demo.Outcome(example, Finished(0, (), (), "stop", Stats(steps_per_block=(1,)), "3"))
    assert demo.plain(outcome) == "WRONG  add      1+1= -> 3 (1 step, expected 2)"
