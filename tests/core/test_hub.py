"""Loading by hub name, against a hub on this machine: each case in a process of its own, with a cache of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mlx_diffgemma.hub import DEMO
from tests.core.fake_hub import FakeHub
from tests.core.test_config import PUBLISHED

CHILD = """
import json, sys, time
import huggingface_hub.constants
import mlx_diffgemma as m
from mlx_diffgemma import reference
time.sleep = lambda seconds: None  # huggingface_hub waits 23 s before it believes that nobody answers
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 2**20  # and keeps 10 MiB at a time; the demo has 4
memory, *names = sys.argv[1:]
if int(memory):
    reference.memory = lambda device: int(memory)
for name in names:
    name, _, revision = name.partition("@")
    try:
        model, processor = m.load(name, backend="reference", revision=revision or None)
        result = m.generate(model, processor, "words 347", seed=1, max_denoising_steps=1)
        print(json.dumps({"text": result.text}))
    except Exception as error:
        print(json.dumps({"error": str(error), "type": type(error).__name__}))
"""
SIZES = """
import sys
from mlx_diffgemma import hub
def fits(config, stored):
    raise SystemExit(stored)
hub.resolve(sys.argv[1], fits)
"""
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def plain(folder: Path, source: Path = DEMO) -> Path:
    folder.mkdir(parents=True)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def sharded(folder: Path) -> Path:
    plain(folder)
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    halves = [dict(tensors[:80]), dict(tensors[80:])]
    for name, half in zip(SHARDS, halves, strict=True):
        save_file(half, folder / name)
    places = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    total = sum(tensor.nbytes for _, tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def huge(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(PUBLISHED.read_bytes())
    index = {"metadata": {"total_size": 51_647_562_456}, "weight_map": {"a": "model-00001-of-00011.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00011.safetensors").write_bytes(b"never fetched")
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub({}) as found:
        yield found


def child(hub: FakeHub, cache: Path, *names: str, offline: bool = False, memory: int = 0) -> list[dict[str, Any]]:
    """What each name led to; ``hub.log`` starts afresh."""
    hub.log.clear()
    command, environment = [sys.executable, "-c", CHILD, str(memory), *names], surroundings(hub, cache)
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def surroundings(hub: FakeHub, cache: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    return environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}


def refused(outcome: dict[str, Any], *parts: str, kind: str = "FileNotFoundError") -> None:
    assert outcome.get("type") == kind, outcome
    assert "\n" not in outcome["error"] and all(part in outcome["error"] for part in parts), outcome


def test_a_model_is_downloaded_once_and_then_read_from_the_cache(hub: FakeHub, tmp_path: Path):
    """Twice online: weights come once, and only they. Then offline: nothing is asked at all."""
    hub.repos["org/demo"] = plain(tmp_path / "demo")
    (tmp_path / "demo" / "training_state.bin").write_bytes(b"not ours")
    (tmp_path / "demo" / "original").mkdir()
    (tmp_path / "demo" / "original" / "consolidated.safetensors").write_bytes(b"twice the gigabytes")
    first, second = child(hub, tmp_path / "cache", "org/demo", "org/demo")
    assert first == second and first["text"]
    assert hub.downloads(".safetensors") == ["model.safetensors"]
    assert set(hub.downloads()) == {path.name for path in DEMO.iterdir()}
    (offline,) = child(hub, tmp_path / "cache", "org/demo", offline=True)
    assert offline == first and hub.log == []


def test_what_does_not_exist_is_one_line(hub: FakeHub, tmp_path: Path):
    hub.repos["org/demo"] = plain(tmp_path / "demo")
    hub.repos["org/other"] = plain(tmp_path / "other")
    (tmp_path / "other" / "config.json").unlink()
    names = ("org/absent", "org/demo@no-such-branch", "org/other", "org--x/y", "a/b/c")
    absent, revision, other, invalid, path = child(hub, tmp_path / "cache", *names)
    refused(absent, "'org/absent'", "HF_TOKEN")
    refused(other, "'org/other'", "config.json")
    refused(invalid, "'org--x/y'")
    refused(path, "'a/b/c'", "hub name like")
    assert "text" in revision, "this hub knows every revision"
    (offline,) = child(hub, tmp_path / "empty", "org/demo", offline=True)
    refused(offline, "'org/demo'", "HF_HUB_OFFLINE is set", "cache")
    assert hub.log == []


def test_a_hub_that_cannot_be_reached_is_one_line(hub: FakeHub, tmp_path: Path):
    hub.address = "http://127.0.0.1:9"  # the discard port: nobody listens
    (outcome,) = child(hub, tmp_path / "cache", "org/demo")
    refused(outcome, "'org/demo'", "cannot be reached")


def test_what_cannot_fit_is_refused_before_its_weights_are_asked_for(hub: FakeHub, tmp_path: Path):
    """51 GB downloaded onto a 16 GB machine is the mistake; with an index and, for one file, without."""
    hub.repos["org/huge"] = huge(tmp_path / "huge")
    (large,) = child(hub, tmp_path / "cache", "org/huge", memory=16 * 10**9)
    refused(large, "111.1 GB", "16.0 GB are free", kind="MemoryBudgetError")  # the reference computes in float32
    assert hub.downloads() == ["config.json", "model.safetensors.index.json"]
    hub.repos["org/demo"] = plain(tmp_path / "demo")
    (small,) = child(hub, tmp_path / "cache", "org/demo", memory=1_000_000)
    refused(small, "smaller checkpoint", kind="MemoryBudgetError")
    assert hub.downloads(".safetensors") == []


def test_one_file_without_an_index_is_as_large_as_it_is(hub: FakeHub, tmp_path: Path):
    """RedHatAI's FP8 is one file of 27 GB; by its config alone it would be taken for the 52 GB of bfloat16."""
    folder = huge(tmp_path / "fp8")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00011.safetensors").rename(folder / "model.safetensors")
    hub.repos["org/fp8"] = folder
    command = [sys.executable, "-c", SIZES, "org/fp8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=surroundings(hub, tmp_path / "c"))
    assert done.stderr.strip() == "" and done.returncode == len(b"never fetched")
    assert hub.downloads() == ["config.json"]


def test_a_cut_connection_goes_on_where_it_broke(hub: FakeHub, tmp_path: Path):
    """huggingface_hub asks for the rest by Range: whole chunks that came are not fetched again."""
    hub.repos["org/demo"] = plain(tmp_path / "demo")
    hub.cut["model.safetensors"] = 1_500_000
    (outcome,) = child(hub, tmp_path / "cache", "org/demo")
    assert outcome["text"]
    weights = [asked for method, path, asked in hub.log if method == "GET" and path.endswith("/model.safetensors")]
    assert weights == [None, "bytes=1048576-"]


def test_a_download_that_failed_keeps_its_finished_files(hub: FakeHub, tmp_path: Path):
    """One shard there, one not: a clear line, online and offline; the next try fetches only what is missing.

    huggingface_hub 2.4 begins an unfinished file anew in another process; its finished files stay.
    """
    hub.repos["org/shards"] = sharded(tmp_path / "shards")
    hub.refuse[SHARDS[1]] = 1
    (failed,) = child(hub, tmp_path / "cache", "org/shards")
    refused(failed, "'org/shards'", "403", "try again")
    (offline,) = child(hub, tmp_path / "cache", "org/shards", offline=True)
    refused(offline, "'org/shards'", "not whole")
    (outcome,) = child(hub, tmp_path / "cache", "org/shards")
    assert outcome["text"] and hub.downloads(".safetensors") == [SHARDS[1]]
