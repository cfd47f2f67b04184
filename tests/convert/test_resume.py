"""An interrupted conversion goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from convert import run
from convert.command import main
from mlx_diffgemma.formats import open_checkpoint
from tests.convert.cases import contents, refused, source

OPTIONS = ("--recipe", "experts4", "--shard-size", "150kB", "--quiet")
JOURNAL = ".convert-journal.json"
CHILD = """
import os, signal, sys, time
from convert import chunks, run
from convert.command import main

how, count, *arguments = sys.argv[1:]
module, name = (run, "_finish") if how == "between" else (chunks, "_chunk")
original, calls = getattr(module, name), [0]

def counted(*given):
    calls[0] += 1
    if calls[0] == int(count):
        if how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return original(*given)

setattr(module, name, counted)
sys.exit(main(arguments))
"""


def child(how: str, count: int, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A conversion that ends at the ``count``th chunk, or file."""
    command = [sys.executable, "-c", CHILD, how, str(count), str(source()), "--out", str(out), *OPTIONS, *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([str(source()), "--out", str(out), *OPTIONS]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 8
    return out


@pytest.mark.parametrize(("how", "count"), [("within", 1), ("within", 60), ("within", 150), ("between", 4)])
def test_killed_and_resumed_equals_never_killed(how: str, count: int, whole: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert child(how, count, out).returncode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError):
        open_checkpoint(out)
    assert "--resume continues it" in refused(capsys, source(), "--out", out, *OPTIONS)
    done = json.loads((out / JOURNAL).read_text())["shards"]
    before = {name: (out / name).stat().st_mtime_ns for name in done}
    assert child("never", 0, out, "--resume").returncode == 0
    assert {name: (out / name).stat().st_mtime_ns for name in done} == before, "a finished file was written again"
    assert contents(out) == contents(whole)


def test_twice_killed(whole: Path, tmp_path: Path):
    out = tmp_path / "out"
    child("between", 2, out)
    child("between", 3, out, "--resume")
    assert len(json.loads((out / JOURNAL).read_text())["shards"]) == 3
    assert child("never", 0, out, "--resume").returncode == 0
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_a_finished_file_that_was_harmed_is_written_again(harm: str, whole: Path, tmp_path: Path):
    out = tmp_path / "out"
    child("between", 4, out)
    first = out / sorted(json.loads((out / JOURNAL).read_text())["shards"])[0]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    if harm == "gone":
        first.unlink()
    else:
        first.write_bytes(data if harm == "changed" else data[:-1])
    assert child("never", 0, out, "--resume").returncode == 0
    assert contents(out) == contents(whole)


def test_an_interrupt_says_how_to_go_on(whole: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = child("interrupt", 60, out)
    assert done.returncode == 130 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "--resume" in done.stderr
    assert json.loads((out / JOURNAL).read_text())["shards"] and not list(out.glob("*.part"))
    assert child("never", 0, out, "--resume").returncode == 0
    assert contents(out) == contents(whole)


def test_the_errors_of_files_that_were_finished_before_are_kept(whole: Path, tmp_path: Path):
    out = tmp_path / "out"
    child("between", 4, out)
    child("never", 0, out, "--resume")
    one, other = (json.loads((folder / "conversion_manifest.json").read_text()) for folder in (whole, out))
    assert one["errors_by_role"] == other["errors_by_role"] and set(one["errors_by_role"]) >= {"experts", "attention"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("--recipe", "mxfp4"), "recipe"),
        (("--shard-size", "300kB"), "shards"),
        (("--text-only",), "shards"),
        (("--to", "hf", "--recipe", "bf16"), "target"),
    ],
)
def test_another_plan_is_refused(change: tuple[str, ...], word: str, tmp_path: Path, capsys):
    out = tmp_path / "out"
    child("between", 2, out)
    before = contents(out)
    line = refused(capsys, source(), "--out", out, *OPTIONS, "--resume", *change)
    assert word in line and "another kind" in line
    assert contents(out) == before


def test_another_source_is_refused(tmp_path: Path, capsys):
    shutil.copytree(source(), tmp_path / "source")
    out = tmp_path / "out"
    child("between", 2, out)
    os.utime(tmp_path / "source" / "model.safetensors", (1, 1))
    assert "source" in refused(capsys, tmp_path / "source", "--out", out, *OPTIONS, "--resume")


def test_resuming_nothing_starts(whole: Path, tmp_path: Path):
    assert main([str(source()), "--out", str(tmp_path / "out"), *OPTIONS, "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_two_at_once(tmp_path: Path, capsys, monkeypatch):
    """The second is refused, and takes nothing from the first."""
    write, seen = run.write_shard, []

    def meanwhile(plan, shard, folder, progress):
        errors = write(plan, shard, folder, progress)
        if not seen:
            seen.append(child("never", 0, tmp_path / "out", "--resume"))
        return errors

    monkeypatch.setattr(run, "write_shard", meanwhile)
    assert main([str(source()), "--out", str(tmp_path / "out"), *OPTIONS]) == 0
    assert seen[0].returncode == 2 and "another conversion" in seen[0].stderr
    open_checkpoint(tmp_path / "out")
