"""What is seen while it runs: a bar on a terminal, lines in a log, nothing if asked; tables that line up."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from convert import progress
from convert.command import main
from convert.progress import Lines, shown
from convert.text import clock, parse_size, readable, table
from tests.convert.cases import refused, source


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_a_bar_that_goes_away():
    stream = Terminal()
    with shown(2_000_000, quiet=False, stream=stream) as bar:
        bar.advance(1_000_000)
        bar.progress.refresh()  # type: ignore[attr-defined]
    text = stream.getvalue()
    assert "50 %" in text and "1.0/2.0 MB" in text and text.rstrip("\n").endswith("\x1b[2K")


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    lines = Lines(10_000_000_000, stream)
    for now[0] in range(1, 21):
        lines.advance(100_000_000)
    assert stream.getvalue().splitlines() == [
        "  5 %  500 MB of 10 GB  100 MB/s  1:35 left",
        " 10 %  1 GB of 10 GB  100 MB/s  1:30 left",
        " 15 %  1.5 GB of 10 GB  100 MB/s  1:25 left",
        " 20 %  2 GB of 10 GB  100 MB/s  1:20 left",
    ]


def test_quiet_is_silent(tmp_path: Path, capsys):
    folder = str(source())
    capsys.readouterr()
    assert main([folder, "--recipe", "w8", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_the_summary_lines_up(tmp_path: Path, capsys):
    folder = str(source())
    capsys.readouterr()
    assert main([folder, "--recipe", "experts4", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = lines[0]
    rows = lines[1 : lines.index("")]
    for column in ("from", "to"):
        at = head.index(f" {column} ") + 1
        assert all(row[at - 2 : at] == "  " and row[at] != " " for row in rows)
    assert any(line.startswith("bits") for line in lines) and any(line.startswith("time") for line in lines)
    assert max(map(len, lines)) <= 160 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (999_600, "1 MB"), (4_214_000_000, "4.21 GB"), (5e12, "5 TB")],
)
def test_sizes(size: float, text: str):
    assert readable(size) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5GiB", 1610612736), ("42", 42), ("5 furlongs", None), ("GB", None)],
)
def test_sizes_are_read(text: str, size: int | None):
    assert parse_size(text) == size


def test_times_and_tables():
    assert [clock(s) for s in (7, 750, 3723)] == ["0:07", "12:30", "1:02:03"]
    assert table([("a", "bb"), ("ccc", "d")], "<>") == ["a    bb", "ccc   d"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "source"),
        (("demo",), "--out"),
        (("demo", "--verify"), "--show"),
        (("demo", "--resume"), "--out"),
        (("demo", "--out", "x", "--shard-size", "5 furlongs"), "5 furlongs"),
        (("demo", "--out", "x", "--shard-size", "0"), "size"),
        (("absent", "--out", "x"), "absent"),
        (("~nobodyhere/x", "--out", "x"), "nobodyhere"),
        (("demo", "--out", "~nobodyhere/x"), "nobodyhere"),
        (("absent.gguf", "--out", "x"), "absent.gguf"),
        (("demo", "--outt", "x"), "--out"),
        (("demo", "--to", "gguf", "--out", "x", "--resume"), "--resume"),
        (("demo", "--to", "gguf", "--out", "x", "--sidecars-from", "y"), "--sidecars-from"),
        (("demo", "--to", "gguf", "--out", "x", "--shard-size", "1GB"), "--shard-size"),
        (("demo", "--to", "gguf", "--out", "x.gguf", "--upload", "a/b"), "--upload needs --out to be a folder"),
        (("demo", "--out", "x.gguf"), "--to gguf"),
        (("demo", "--out", "x", "--revision", "main"), "--revision"),
        (("demo", "--show", "--out", "x"), "--out does not go with --show"),
        (("demo", "--show", "--recipe", "w8"), "--recipe does not go with --show"),
        (("demo", "--show", "--dry-run"), "--dry-run does not go with --show"),
        (("demo", "--show", "--to", "hf"), "--to does not go with --show"),
        (("demo", "--show", "--sidecars-from", "y"), "--sidecars-from does not go with --show"),
        (("demo", "--show", "--verify"), "nothing to verify"),
        (("demo", "--show", "--upload", "a/b"), "--upload does not go with --show"),
        (("demo", "--dry-run", "--upload", "a/b"), "--upload does not go with --dry-run"),
        (("demo", "--dry-run", "--sidecars-from", "y"), "'y' is not a folder"),
        (("demo", "--upload", "a/b", "--recipe", "w8"), "--recipe needs --out"),
        (("demo", "--out", "x", "--recipe", "~nobodyhere/x.toml"), "nobodyhere"),
        (("~nobodyhere/x.gguf", "--out", "x"), "nobodyhere"),
        (("demo", "--report", "demo", "--against", "demo", "--out", "~nobodyhere/x.json"), "nobodyhere"),
        (("demo", "--report", "~nobodyhere/x", "--against", "demo"), "nobodyhere"),
        (("demo", "--report", "demo", "--against", "demo", "--to", "hf"), "--to does not go with --report"),
        (("demo", "--report", "demo", "--against", "demo", "--shard-size", "1GB"), "--shard-size does not go"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], word: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert word in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())
