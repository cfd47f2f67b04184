"""Whatever goes wrong: one line, status 2, the source as it was, and nothing that a loader would take for a model."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import chunks, output, run, writer
from convert.command import main
from mlx_diffgemma.formats import open_checkpoint
from tests.convert.cases import contents, converted, refused, source

NORM = "model.decoder.norm.weight"
TO = ("--to", "mlx", "--recipe", "experts4")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(source(), tmp_path / "source")
    return tmp_path / "source"


def loads(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except (ValueError, FileNotFoundError):
        return False
    return True


def change(folder: Path, alter: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    alter(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def tensor_in_two_files(folder: Path) -> None:
    save_file({NORM: load_file(folder / "model.safetensors")[NORM]}, folder / "second.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated": (cut, ("truncated", "download it again")),
    "missing": (lambda f: change(f, lambda t: t.pop(NORM)), (NORM, "lacks")),
    "unknown": (lambda f: change(f, lambda t: t.update({"more.weight": torch.zeros(2)})), ("more.weight",)),
    "misshapen": (lambda f: change(f, lambda t: t.update({NORM: torch.zeros(7)})), (NORM, "(7,)", "(128,)")),
    "twice": (tensor_in_two_files, (NORM, "stored twice")),
    "not a number": (
        lambda f: change(f, lambda t: t["model.decoder.embed_tokens.weight"].fill_(torch.nan)),
        ("embed_tokens", "NaN"),
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json",)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_source(kind: str, copy: Path, tmp_path: Path, capsys):
    damage, parts = DAMAGE[kind]
    damage(copy)
    before = contents(copy)
    line = refused(capsys, copy, "--out", tmp_path / "out", *TO, "--quiet")
    assert all(part in line for part in parts), line
    assert contents(copy) == before and not loads(tmp_path / "out")


def test_the_output_is_the_source(copy: Path, capsys):
    before = contents(copy)
    assert "source itself" in refused(capsys, copy, "--out", copy, *TO)
    assert "source itself" in refused(capsys, copy, "--out", f"{copy}/../{copy.name}", *TO)
    assert contents(copy) == before


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_the_output_is_not_empty(resume: tuple[str, ...], tmp_path: Path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    assert "letter.txt" in refused(capsys, source(), "--out", tmp_path / "out", *TO, *resume)
    assert contents(tmp_path / "out") == {"letter.txt": b"dear"}


def test_the_output_is_a_file(tmp_path: Path, capsys):
    (tmp_path / "out").write_text("dear")
    assert "is a file" in refused(capsys, source(), "--out", tmp_path / "out", *TO)


def test_a_finished_conversion_is_not_overwritten(tmp_path: Path, capsys):
    before = contents(converted("experts4"))
    for resume in ((), ("--resume",)):
        assert "give a new folder" in refused(capsys, source(), "--out", converted("experts4"), *TO, *resume)
    assert contents(converted("experts4")) == before


def test_hidden_files_are_no_obstacle(tmp_path: Path):
    """A cloned empty repository, or what a file manager leaves."""
    (tmp_path / "out" / ".git").mkdir(parents=True)
    assert main([str(source()), "--out", str(tmp_path / "out"), *TO, "--quiet"]) == 0
    assert loads(tmp_path / "out")


def test_no_room(tmp_path: Path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    line = refused(capsys, source(), "--out", tmp_path / "out" / "deep", *TO)
    assert "free" in line and not (tmp_path / "out").exists()


def fail(code: int) -> Callable[..., int]:
    """A disk that has room for the header and little more."""
    written = [0]

    def pwrite(file: int, data: bytes, at: int) -> int:
        written[0] += len(data)
        if written[0] > 300_000:
            raise OSError(code, os.strerror(code))
        return os.pwrite(file, data, at)

    return pwrite


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_the_disk_fails_in_the_middle(code: int, tmp_path: Path, capsys, monkeypatch):
    """What was finished is kept and can be continued."""
    out, small = tmp_path / "out", ("--shard-size", "200kB", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "os", type("OS", (), {"pwrite": staticmethod(fail(code)), "cpu_count": os.cpu_count}))
        line = refused(capsys, source(), "--out", out, *TO, *small)
    assert os.strerror(code) in line and "--resume" in line
    assert not loads(out) and not (out / "config.json").exists() and not list(out.glob("*.part"))
    assert main([str(source()), "--out", str(out), *TO, *small, "--resume"]) == 0 and loads(out)


def test_a_limit_on_file_sizes(tmp_path: Path):
    """The kernel itself says no."""
    code = (
        "import resource, sys; from convert.command import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(main(sys.argv[1:]))"
    )
    arguments = [str(source()), "--out", str(tmp_path / "out"), *TO, "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "File too large" in done.stderr
    assert not loads(tmp_path / "out") and not list((tmp_path / "out").glob("*.part"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_no_permission(tmp_path: Path, capsys, monkeypatch):
    def mkdir(path: Path, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    line = refused(capsys, source(), "--out", tmp_path / "out", *TO)
    assert "Permission denied" in line and str(tmp_path / "out") in line


def test_a_result_that_reads_otherwise_is_no_success(tmp_path: Path, capsys, monkeypatch):
    """The last look is a loader's: a mistake of the writer must not pass."""
    write = run.write_shard

    def forgetful(plan, shard, folder, progress):
        errors = write(plan, shard, folder, progress)
        path = folder / (shard.name + writer.PART)
        tensors = load_file(path)
        tensors.pop("model.encoder.language_model.layers.0.layer_scalar")
        save_file(tensors, path, {"format": "mlx"})
        return errors

    monkeypatch.setattr(run, "write_shard", forgetful)
    line = refused(capsys, source(), "--out", tmp_path / "out", *TO, "--quiet")
    assert "layers.0.layer_scalar" in line and not (tmp_path / "out" / "config.json").exists()


def test_the_config_comes_last(tmp_path: Path, monkeypatch):
    """At the moment it gets its name, everything else is there and whole."""
    seen: list[set[str]] = []
    rename = Path.rename

    def watch(path: Path, target: Path) -> Path:
        if Path(target).name == "config.json":
            assert not loads(tmp_path / "out")
            seen.append({name for name in os.listdir(tmp_path / "out") if not name.startswith(".")})
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watch)
    assert main([str(source()), "--out", str(tmp_path / "out"), *TO, "--quiet"]) == 0
    manifest = json.loads((tmp_path / "out" / "conversion_manifest.json").read_text())
    assert seen == [{*manifest["outputs"], "conversion_manifest.json", "config.json.part"} - {"config.json"}]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*manifest["outputs"], "conversion_manifest.json"])
