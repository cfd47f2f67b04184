"""The real command, the demo's board and the examples, with the packaged checkpoint on the NumPy reference."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.terminal.screen import ROOT, environment, everything, run, visible

COMMAND = ["-m", "mlx_diffgemma", "generate", "--backend", "reference", "--seed", "7", "--prompt", "recite jack"]
JACK = [
    "Jack and Jill went up the hill",
    "To fetch a pail of water.",
    "Jack fell down and broke his crown,",
    "And Jill came tumbling after.",
]


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (40, 4)])
def test_drafts_are_drawn_in_place(columns, rows):
    session = run(COMMAND, columns, rows)
    assert session.status == 0
    assert everything(session.screen) == JACK
    assert any("settled" in line for frame in session.frames for line in frame)
    for frame in session.frames:
        assert sum("settled" in line for line in frame) <= 1
        assert sum(line.startswith("Jack and Jill") for line in frame) <= 1
    assert session.raw.endswith(b"\x1b[?25h")


def test_no_live_writes_plain_text():
    session = run([*COMMAND, "--no-live"])
    assert session.status == 0
    assert b"\x1b" not in session.raw
    assert visible(session.screen) == JACK


@pytest.mark.parametrize("live", [True, False])
def test_interruption_leaves_the_finished_block(live):
    slow = ["--stability-threshold", "12", "--max-denoising-steps", "400"]
    flags = [] if live else ["--no-live"]
    ready = (lambda screen: "block 2" in visible(screen)[-1]) if live else (lambda screen: bool(visible(screen)))
    session = run([*COMMAND, *slow, *flags], interrupt=lambda screen: bool(visible(screen)) and ready(screen))
    assert session.status == 130
    assert visible(session.screen) == [JACK[0], "To fetch a pail o"]
    assert session.seconds_after_signal < 5  # a step and the interpreter's end, on a busy machine
    assert session.raw.endswith(b"\x1b[?25h") == live


def test_a_stuck_first_canvas_can_be_interrupted():
    endless = ["--stability-threshold", "off", "--max-denoising-steps", "2000"]
    session = run([*COMMAND, *endless], interrupt=lambda screen: "step 2/" in "".join(visible(screen)))
    assert session.status == 130
    assert visible(session.screen) == []


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ("generate.py", '{"name": "bob", "age": 3}'),
        ("stream_drafts.py", "And Jill came tumbling after."),
        ("batch.py", "'three hundred forty-seven'"),
    ],
)
def test_examples_run(example, words):
    command = [sys.executable, f"examples/{example}", "--backend", "reference"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert words in done.stdout
    assert len((ROOT / "examples" / example).read_text().splitlines()) < 60
