"""Sources on the hub: converted without a question of memory, planned and shown without their weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_diffgemma.hub import DEMO
from tests.convert.cases import contents, converted, run
from tests.core.fake_hub import FakeHub

CHILD = """
import sys, time
import huggingface_hub.constants
from mlx_diffgemma import reference
from convert.command import main

time.sleep = lambda seconds: None
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 2**20
reference.memory = lambda device: 1000
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub({"org/demo": DEMO, "org/small": converted("experts4")}) as found:
        yield found


def child(hub: FakeHub, cache: Path, *arguments: object, offline: bool = False) -> subprocess.CompletedProcess[str]:
    hub.log.clear()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_a_model_by_name_is_converted_whatever_the_memory(hub: FakeHub, tmp_path: Path):
    out = tmp_path / "out"
    done = child(hub, tmp_path / "cache", "org/demo", "--recipe", "experts4", "--out", out, "--quiet")
    assert done.returncode == 0, done.stderr
    there = contents(run("demo", tmp_path / "local", "--recipe", "experts4"))
    here = contents(out)
    assert here.pop("conversion_manifest.json").count(b'"name": "org/demo"') == 1
    there.pop("conversion_manifest.json")
    assert here == there


@pytest.mark.parametrize("options", [("--recipe", "experts4", "--dry-run"), ("--show",)])
def test_planning_and_showing_read_headers_only(options: tuple[str, ...], hub: FakeHub, tmp_path: Path):
    done = child(hub, tmp_path / "cache", "org/demo", *options)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    asked = [ranged for method, path, ranged in hub.log if path.endswith(".safetensors") and method == "GET"]
    assert asked == ["bytes=0-100000"]
    local = subprocess.run(
        [sys.executable, "-m", "convert.command", "demo", *options], capture_output=True, text=True, check=True
    )
    differ = [line for line in done.stdout.splitlines() if line not in local.stdout.splitlines()]
    assert all(line.startswith(("folder", "note")) for line in differ), differ


def test_a_quantized_model_is_planned_from_its_headers(hub: FakeHub, tmp_path: Path):
    done = child(hub, tmp_path / "cache", "org/small", "--recipe", "mxfp8", "--dry-run")
    assert done.returncode == 0 and "twice" in done.stdout and "affine 4-bit g64" in done.stdout


def test_what_is_in_the_cache_needs_no_hub(hub: FakeHub, tmp_path: Path):
    assert child(hub, tmp_path / "cache", "org/demo", "--out", tmp_path / "one", "--quiet").returncode == 0
    done = child(hub, tmp_path / "cache", "org/demo", "--dry-run", offline=True)
    assert done.returncode == 0 and hub.log == [], done.stderr


def test_what_cannot_be_had_is_one_line(hub: FakeHub, tmp_path: Path):
    hub.repos["org/cut"] = Path(shutil.copytree(DEMO, tmp_path / "cut"))
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"12345678")
    for name, options, word in (
        ("org/absent", ("--dry-run",), "org/absent"),
        ("org/cut", ("--dry-run",), "org/cut"),
        ("org/absent", ("--out", tmp_path / "out"), "org/absent"),
    ):
        done = child(hub, tmp_path / "cache", name, *options)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and word in done.stderr, done.stderr
