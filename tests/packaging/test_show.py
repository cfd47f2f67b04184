"""``mlx_diffgemma.convert --show``: what it says of a checkpoint, and how it says no."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from convert.command import main
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.hub import DEMO


@pytest.mark.parametrize("arguments", [["demo", "--show"], ["--show", str(DEMO)]])
def test_it_shows_what_a_checkpoint_holds(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 0
    lines = {line.strip().split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    checkpoint = open_checkpoint(DEMO)
    assert f"{len(checkpoint.table):,} tensors" in lines["total"]
    assert f"{sum(row.size for row in checkpoint.table.values()):,} values" in lines["total"]
    assert {row.role for row in checkpoint.table.values()} <= set(lines)
    assert lines["entropy_bound"].split() == ["entropy_bound", str(checkpoint.generation.entropy_bound)]
    assert lines["canvas_length"].split() == ["canvas_length", str(checkpoint.config.canvas_length)]


def damaged(folder: Path) -> Path:
    shutil.copytree(DEMO, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize("kind", ["missing", "empty", "damaged", "nothing to do", "no source", "unknown option"])
def test_a_mistake_is_one_line_and_status_2(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = {
        "missing": lambda: ["--show", str(tmp_path / "absent")],
        "empty": lambda: ["--show", str(tmp_path)],
        "damaged": lambda: ["--show", str(damaged(tmp_path / "demo"))],
        "nothing to do": lambda: ["demo"],
        "no source": lambda: ["--show"],
        "unknown option": lambda: ["demo", "--too", "mlx"],
    }[kind]()
    assert status(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1 and captured.err.startswith("mlx_diffgemma.convert: ")


def status(arguments: list[str]) -> int:
    """The exit status, whether ``main`` returns it or argparse exits with it."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
