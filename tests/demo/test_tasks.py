"""The demo's tasks: answers are right, the split is a split, the chat ids are the template's."""

from __future__ import annotations

import json
import random

import pytest
import sudoku
import tasks
import vocabulary

from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.hub import DEMO
from mlx_diffgemma.prompts.processor import Processor


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("task", tasks.NAMES_OF_TASKS)
def test_the_split_holds(task, held):
    rng = random.Random(3)
    for _ in range(20):
        example = tasks.draw(task, rng, held=held)
        assert task == "rhyme" or tasks.held_out(example.prompt) == held


@pytest.mark.parametrize("size", [4, 6])
def test_sudokus_have_one_solution_and_it_is_the_answer(size):
    rng = random.Random(4)
    for make in (sudoku.puzzle, sudoku.variation):
        for _ in range(5):
            question, answer = make(size, rng)
            assert sudoku.solutions([list(row) for row in question]) == 1
            flat = [(q, a) for rows in zip(question, answer, strict=True) for q, a in zip(*rows, strict=True)]
            assert all(q in (0, a) for q, a in flat) and any(q == 0 for q, _ in flat)
            height, width = sudoku.BOX[size]
            whole = set(range(1, size + 1))
            boxes = [
                {answer[r + i][c + j] for i in range(height) for j in range(width)}
                for r in range(0, size, height)
                for c in range(0, size, width)
            ]
            assert all(set(group) == whole for group in [*answer, *zip(*answer, strict=True), *boxes])


def test_answers_are_what_they_say():
    rng = random.Random(5)
    for _ in range(50):
        for task in ("add", "sort", "json"):
            example = tasks.draw(task, rng, held=True)
            if task == "add":
                left, right = example.prompt.rstrip("=").split("+")
                assert int(left) + int(right) == int(example.answer)
            elif task == "sort":
                assert sorted(example.prompt.removeprefix("sort ")) == list(example.answer)
            else:
                pairs = dict(pair.split("=") for pair in example.prompt.split()[1:])
                assert {k: str(v) for k, v in json.loads(example.answer).items()} == pairs


def test_dialogs_are_longer_than_the_window():
    rng = random.Random(6)
    window = open_checkpoint(DEMO).config.text.sliding_window
    for _ in range(50):
        example = tasks.draw("dialog", rng, held=True)
        assert len(vocabulary.chat(example.prompt, example.history)) > window


def test_chat_ids_are_those_of_the_packaged_template():
    processor = Processor.from_folder(DEMO, open_checkpoint(DEMO).generation)
    for example in tasks.evaluation_set(60):
        assert processor.prompt_ids(example.messages) == tuple(vocabulary.chat(example.prompt, example.history))


def test_the_evaluation_set_is_fixed_and_held_out():
    first, again = tasks.evaluation_set(100), tasks.evaluation_set(100)
    assert first == again and first[:50] == tasks.evaluation_set(50)
