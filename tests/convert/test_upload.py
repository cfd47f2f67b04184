"""Uploading: only what verifies, exactly the files of the manifest, and a card that says what it is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

from convert.card import base_model, card
from convert.command import main
from tests.convert.cases import converted, refused, run, source

REPO = "someone/diffusiongemma-tiny-4bit"


class Hub:
    """Records what would be sent."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.files: dict[str, bytes] = {}
        self.refusal: Exception | None = None

    def create_repo(self, repo: str, exist_ok: bool) -> None:
        self.calls.append(f"create {repo}")
        if self.refusal:
            raise self.refusal

    def create_commit(self, repo: str, operations: list, commit_message: str) -> SimpleNamespace:
        self.calls.append(f"commit {repo}")
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", type("HfApi", (), {"__new__": lambda kind: fake}))
    return fake


def manifest(folder: Path) -> dict:
    return json.loads((folder / "conversion_manifest.json").read_text())


def test_a_conversion_is_sent_as_it_lies(hub: Hub, capsys):
    folder = converted("experts4")
    assert main([str(folder), "--upload", REPO]) == 0
    assert hub.calls == [f"create {REPO}", f"commit {REPO}"]
    assert set(hub.files) == {*manifest(folder)["outputs"], "conversion_manifest.json", "README.md"}
    for path in folder.iterdir():
        assert hub.files[path.name] == path.read_bytes()
    assert capsys.readouterr().out == f"https://hub/{REPO}/commit/1\n"


def test_what_is_not_the_manifests_stays_here(hub: Hub, tmp_path: Path):
    shutil.copytree(converted("experts4"), tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("private")
    assert main([str(tmp_path / "copy"), "--upload", REPO, "--quiet"]) == 0
    assert "notes.txt" not in hub.files


def test_converted_and_sent_in_one_go(hub: Hub, tmp_path: Path):
    run(source(), tmp_path / "out", "--recipe", "mxfp4", "--upload", REPO)
    assert hub.calls[-1] == f"commit {REPO}" and "mxfp4" in hub.files["README.md"].decode()


def test_a_changed_file_stops_it(hub: Hub, tmp_path: Path, capsys):
    shutil.copytree(converted("experts4"), tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refused(capsys, tmp_path / "copy", "--upload", REPO, "--quiet")
    assert hub.calls == []


def test_a_folder_without_a_manifest(hub: Hub, capsys):
    assert "conversion_manifest.json" in refused(capsys, source(), "--upload", REPO, "--quiet")
    assert hub.calls == []


def test_a_name_that_is_none_is_refused_before_anything_is_converted(hub: Hub, tmp_path: Path, capsys):
    assert "tiny" in refused(capsys, source(), "--out", tmp_path / "out", "--upload", "tiny")
    assert hub.calls == [] and not (tmp_path / "out").exists()


def test_a_hub_that_refuses(hub: Hub, capsys):
    hub.refusal = OSError("401 Unauthorized\nlong story")
    line = refused(capsys, converted("experts4"), "--upload", REPO, "--quiet")
    assert "401 Unauthorized" in line and "long story" not in line


def test_the_card():
    found = manifest(converted("experts4"))
    found["source"]["name"] = "google/diffusiongemma-26B-A4B-it"
    text = card(found, REPO)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "google/diffusiongemma-26B-A4B-it" and front["base_model_relation"] == "quantized"
    assert front["library_name"] == "mlx" and front["pipeline_tag"] == "text-generation"
    assert f"--model {REPO}" in text and "experts4" in text and "## Licence" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| experts "))
    assert re.fullmatch(r"\| experts \| bfloat16 \| affine 4-bit g64 \| 12 \| (9|10)\.\d\d% \|", row)


def test_the_base_model_is_the_first_of_the_chain(tmp_path: Path):
    shutil.copytree(converted("experts4"), tmp_path / "models--some--thing" / "snapshots" / "1")
    first = run(tmp_path / "models--some--thing" / "snapshots" / "1", tmp_path / "mlx", "--text-only")
    second = run(first, tmp_path / "again", "--to", "hf")
    assert manifest(first)["source"]["name"] == "some/thing"
    assert manifest(second)["source"]["made_from"][0] == "some/thing"
    assert base_model(manifest(second)) == "some/thing"
    assert base_model(manifest(converted("experts4"))) is None
