"""``mlx_diffgemma.bench --plan``: what people and programs get to see of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from mlx_diffgemma.commands import bench as command
from mlx_diffgemma.tools import plan, work_ends
from tests.conftest import load_model
from tests.formats.quantized import quantized
from tests.terminal.screen import ROOT, environment
from tests.tiny import checkpoint


@pytest.fixture(autouse=True)
def as_wide_as_a_pipe(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


def planned(capsys, *options: str) -> str:
    assert command.main(["--plan", *options]) == 0
    return capsys.readouterr().out


def test_the_plan_as_people_see_it(capsys):
    text = planned(capsys)
    assert text.startswith("diffusiongemma-26B-A4B-it, 4bit: one denoising step of 256 tokens behind 4,096\n")
    assert "m4-max: 546 GB/s, 40 GPU cores, 16.2 TFLOP/s" in text and "nothing here was measured" in text
    for part in work_ends.PARTS:
        assert f"\n{part} " in text
    assert "copies of the prefix per step: 0 bytes" in text
    assert "goal: under 18 GB, met" in text and "fits Macs from 24 GB on" in text
    assert "judged as load does: without kernels" in text
    assert "\x1b" not in text, "a pipe gets no colours"
    assert max(map(len, text.splitlines())) <= 120
    assert text.splitlines() == [line.rstrip() for line in text.splitlines()]


def figures(text: str, part: str) -> list[str]:
    return re.search(rf"^{part}  +(.*)$", text, re.M)[1].split()


def test_the_plan_fits_a_narrow_terminal_by_columns_not_digits(capsys, monkeypatch):
    whole = planned(capsys)
    assert len(figures(whole, "step")) == 6
    for width, columns in ((200, 6), (80, 6), (73, 6), (72, 5), (60, 4), (50, 3), (40, 2), (20, 2)):
        monkeypatch.setenv("COLUMNS", str(width))
        text = planned(capsys)
        assert max(map(len, text.splitlines())) <= max(width, 42)
        shown = figures(text, "step")
        assert len(shown) == columns and [figure for figure in figures(whole, "step") if figure in shown] == shown
        assert "kernels" in text and "floor ms" in text
    monkeypatch.setenv("COLUMNS", "80")
    assert planned(capsys).count("floor ms") == 2, "neither column reads as measured"


def test_the_plan_of_a_mac_that_is_too_small(capsys):
    text = planned(capsys, "--chip", "m1")
    assert "\ntoo large for any m1: that was sold with 16 GB at most\n" in text
    assert "too large" not in planned(capsys, "--chip", "m1-pro")


def test_the_goal_is_that_of_one_row_and_4096_tokens(capsys):
    assert "goal" in planned(capsys, "--prompt-tokens", "4096").split("memory")[-2]
    for options in (["--prompt-tokens", "4097"], ["--batch", "2"], ["--bits", "8bit"]):
        assert "goal: under" not in planned(capsys, *options)


def test_macs_are_judged_by_the_version_that_takes_more(capsys):
    found = json.loads(planned(capsys, "--json"))["memory"]
    assert found["total"] == found["plain_total"] > found["fused_total"]
    assert found["smallest"] == found["smallest_fused"] == 24
    between = json.loads(planned(capsys, "--prompt-tokens", "13000", "--json"))["memory"]
    assert between["smallest"] == 32 and between["smallest_fused"] == 24
    assert ". With kernels from 24 GB on" in " ".join(planned(capsys, "--prompt-tokens", "13000").split())


def test_a_rounded_extent_is_multiplied_by_plain_operations(capsys):
    assert "plain operations multiply" not in planned(capsys)
    assert "GFLOP: with kernels; plain operations multiply 2,5" in planned(capsys, "--prompt-tokens", "1500")


def test_the_plan_as_json(capsys):
    found = json.loads(planned(capsys, "--chip", "m3-pro", "--prompt-tokens", "1024", "--json"))
    assert found["chip"]["name"] == "m3-pro" and found["prompt_tokens"] == 1024
    assert [part["part"] for part in found["parts"]] == list(work_ends.PARTS)
    for side in ("plain", "fused"):
        for unit in ("bytes", "operations", "milliseconds"):
            assert found["total"][side][unit] == pytest.approx(sum(part[side][unit] for part in found["parts"]))
    assert found["vocabulary_and_attention"]["less"] >= 0.35
    assert found["prefix"]["copied"] == 0
    assert found["memory"]["total"] == sum(found["memory"]["parts"].values()) < found["memory"]["limit"]


def test_a_slower_chip_has_a_higher_floor(capsys):
    floors = [
        json.loads(planned(capsys, "--chip", name, "--json"))["total"]["fused"]["milliseconds"]
        for name in ("m1", "m3-pro", "m4-max", "m5-max")
    ]
    assert floors == sorted(floors, reverse=True) and floors[0] > 5 * floors[2]


def test_the_plan_of_survivors(capsys):
    text = planned(capsys, "--self-conditioning", "survivors", "--survivors", "200")
    assert (
        "survivors: 200 per row are assumed" in text and "GFLOP: with kernels; plain operations multiply 2,661" in text
    )
    assert figures(text, "soft embedding")[-3] == "0"


def test_the_plan_of_other_models(capsys, tmp_path):
    assert planned(capsys, "--model", "demo").startswith("demo, Hugging Face: one denoising step of 48")
    folder = quantized("affine4")
    found = json.loads(planned(capsys, "--model", str(folder), "--prompt-tokens", "9", "--json"))
    held = found["memory"]["parts"]
    assert held["weights"] + held["embedding"] == load_model(folder, "mlx").describe()["weight_bytes"]
    config = tmp_path / "mine.json"
    config.write_text(plan.PUBLISHED.read_text())
    text = planned(capsys, "--model", str(config), "--bits", "16", "--batch", "4")
    assert text.startswith("mine, bf16: one denoising step of 256 tokens behind 4,096, batch 4\n")
    assert "4,096 tokens in 4 rows" in text and "goal: under" not in text


def test_the_plan_of_a_float32_model_counts_four_bytes(capsys):
    found = json.loads(planned(capsys, "--model", str(checkpoint()), "--prompt-tokens", "9", "--json"))
    looked = next(part for part in found["parts"] if part["part"] == "vocabulary passes")
    assert looked["fused"]["bytes"] == 16 * 512 * 4


def test_the_plan_writes_a_file(capsys, tmp_path):
    place = tmp_path / "new" / "plan.json"
    assert "vocabulary + attention" in planned(capsys, "--json", str(place))
    assert json.loads(place.read_text())["model"] == plan.NAME
    assert [path.name for path in place.parent.iterdir()] == ["plan.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_plan_needs_no_framework(tmp_path):
    """And downloads nothing: it works where no backend is installed."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('mlx', 'torch', 'huggingface_hub'))); "
        "from mlx_diffgemma.commands.bench import main; sys.exit(main(['--plan', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "4bit"


def test_a_config_that_is_wrong_is_named(capsys, tmp_path):
    for place in (tmp_path / "mine.json", tmp_path / "folder" / "config.json"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(plan.PUBLISHED.read_text().replace('"canvas_length": 256', '"canvas_length": -1'))
        given = place if place.name == "mine.json" else place.parent
        assert command.main(["--plan", "--model", str(given)]) == 2
        err = capsys.readouterr().err
        assert str(place) in err and "canvas_length" in err and err.count("\n") == 1


def test_the_plan_of_a_folder_that_has_only_a_config(capsys, tmp_path):
    (tmp_path / "config.json").write_text(plan.PUBLISHED.read_text())
    text = planned(capsys, "--model", str(tmp_path), "--bits", "mxfp4")
    assert text.startswith(f"{tmp_path.name}, mxfp4: one denoising step of 256 tokens")
