"""``mlx_diffgemma.bench``: both halves of the command, its mistakes, and what it says of peers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_diffgemma as m
from mlx_diffgemma.__main__ import main as package_main
from mlx_diffgemma.backend import Choice, installed
from mlx_diffgemma.commands import bench as command
from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.tools import bench, bench_report, plan, work_ends
from tests.conftest import load_model
from tests.core.scripted import CANVAS, STEPS, Scripted, processor
from tests.formats.quantized import quantized
from tests.terminal.screen import ROOT, environment
from tests.tiny import checkpoint

SCRIPTED = Choice("scripted", "none", "cpu", "numpy", "test")
PEER = """
import time
from types import SimpleNamespace

__version__ = "9.9"

class Tokenizer:
    def apply_chat_template(self, messages, add_generation_prompt):
        return [ord(c) for c in messages[0]["content"]]

def load(model):
    print("noise on stdout")
    if model == "broken":
        raise SystemExit("no such model")
    return None, Tokenizer()

def stream_generate(model, tokenizer, prompt, max_tokens):
    for i in range(max_tokens):
        time.sleep(0.002)
        yield SimpleNamespace(generation_tokens=i + 1, peak_memory=1.5)
"""


# ---- --plan


def planned(capsys, *options: str) -> str:
    assert command.main(["--plan", *options]) == 0
    return capsys.readouterr().out


def test_the_plan_as_people_see_it(capsys):
    text = planned(capsys)
    assert text.startswith("diffusiongemma-26B-A4B-it, 4bit: one denoising step of 256 tokens behind 4,096\n")
    assert "m4-max: 546 GB/s, 40 GPU cores, 16.2 TFLOP/s" in text and "nothing here was measured" in text
    for part in work_ends.PARTS:
        assert f"\n {part} " in text
    assert "copies of the prefix per step: 0 bytes" in text
    assert "goal: under 18 GB" in text and "fits Macs from 24 GB on" in text
    assert "\x1b" not in text, "a pipe gets no colours"
    assert max(map(len, text.splitlines())) <= 120


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
    assert "survivors: 200 per row are assumed" in text and "378 to 0" in text


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


def test_the_plan_needs_no_framework(tmp_path):
    """And downloads nothing: it works where no backend is installed."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('mlx', 'torch', 'huggingface_hub'))); "
        "from mlx_diffgemma.commands.bench import main; sys.exit(main(['--plan', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "4bit"


MISTAKES = [
    (["--plan", "--chip", "m9"], "chip 'm9' is unknown; choose one of m1, "),
    (["--plan", "--bits", "3"], "--bits 3 is unknown; choose bf16, 4bit"),
    (
        ["--plan", "--model", "org/name"],
        "--plan downloads nothing; give a folder, a config.json, demo, or leave it out",
    ),
    (["--plan", "--model", "demo", "--bits", "4"], "the files of demo have a format already"),
    (["--plan", "--rounds", "3"], "--rounds is for measuring; leave it out"),
    (["--plan", "--against-ar", "x"], "--against-ar is for measuring"),
    (["--plan", "--batch", "0"], "--batch 0 must be at least 1"),
    (["--plan", "--prompt-tokens", "-4"], "--prompt-tokens -4 must be at least 1"),
    (["--chip", "m1"], "--chip belongs to --plan; leave it out"),
    (["--rounds", "0"], "--rounds 0 must be at least 1"),
    (["--model", "/no/such"], "'/no/such' is neither a folder here nor a hub name"),
    (["--backend", "gpu"], "backend='gpu' is unknown"),
    (["--backend", "cpu", "--tail", "hold"], "tail='hold' is not available"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=lambda value: " ".join(value) if value else "")
def test_mistakes_are_one_line(options, message, capsys):
    assert command.main(options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mlx_diffgemma.bench: ") and message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_it_is_a_command_of_the_package(capsys):
    assert package_main(["bench", "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == plan.NAME


# ---- measuring


def measured(rivals=(), *, rounds: int = 3, blocks: int = 2, script: str = "abcdefgh" * 4) -> tuple[dict, Scripted]:
    model, speaker = Talkative(script), processor()
    task = bench.task(model, speaker, tokens=None, blocks=blocks, rounds=rounds, question="why")
    return bench.measure(model, speaker, SCRIPTED, task, rivals), model


class Talkative(Scripted):
    def describe(self) -> dict:
        return {"backend": "scripted", "device": "cpu", "dtype": "float32", "weight_bytes": 3_000_000}

    def encode(self, tokens, cache=None, *, lengths=None, score=False):
        return super().encode(tokens, cache, lengths=[tokens.shape[1]] if lengths is None else lengths, score=score)


def test_what_is_measured():
    record, model = measured()
    ours = record["ours"]
    assert ours["steps_per_canvas"] == {"min": STEPS, "median": STEPS, "max": STEPS}
    assert ours["tokens"]["median"] == 2 * CANVAS and ours["steps"] == [STEPS, STEPS]
    assert ours["tokens_per_forward"]["median"] == pytest.approx(CANVAS / STEPS)
    assert ours["peak_memory"] == 1
    for figure in bench_report.FIGURES:
        low, middle, high = (ours[figure][key] for key in ("min", "median", "max"))
        assert 0 < low <= middle <= high
    assert {spec.seed for spec in model.specs} == {0}, "every round the same answer"
    assert record["parts"] is None and record["peers"] == [] and record["missing"] == []
    assert record["conditions"]["versions"]["mlx-diffgemma"] == m.__version__
    json.dumps(record)


def test_the_report_can_be_pasted():
    record, _ = measured()
    text = bench_report.markdown(record)
    lines = text.splitlines()
    assert "backend scripted on cpu (ops), float32" in lines[0]
    assert "Weights 3.0 MB." in lines[1]
    for name, _, _ in bench_report.FIGURES.values():
        assert f"\n| {name} | " in text
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {5}


def peers(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "mlx_lm.py").write_text(PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_peer_takes_turns(monkeypatch, tmp_path):
    peers(monkeypatch, tmp_path)
    record, _ = measured([bench.Rival("mlx-lm", "some/model")], rounds=2)
    (peer,) = record["peers"]
    assert peer["versions"]["mlx-lm"] == "9.9" and peer["model"] == "some/model"
    assert peer["tokens"] == {"min": 16, "median": 16, "max": 16}, "as many as we gave"
    assert peer["first"]["min"] >= 0.002 and peer["seconds"]["min"] >= 0.032
    assert peer["tokens_per_second"]["max"] <= 500
    ours = record["ours"]["tokens_per_second"]
    assert ours["min"] / peer["tokens_per_second"]["max"] <= peer["ratio"]["min"] <= peer["ratio"]["max"]
    text = bench_report.markdown(record)
    row = next(line for line in text.splitlines() if line.startswith("| mlx-lm 9.9 some/model |"))
    assert row.count("|") == 6 and f"{peer['ratio']['median']:.2f} (" in row


def test_a_missing_peer_is_one_line():
    record, _ = measured([bench.Rival("mlx-lm", "x")], rounds=1)
    assert record["peers"] == []
    assert record["missing"] == [
        f"mlx-lm is not installed in {sys.executable}: pip install mlx-lm, then run this again"
    ]
    assert bench_report.markdown(record).endswith(record["missing"][0])


def test_a_peer_that_cannot_load_is_one_line(monkeypatch, tmp_path):
    peers(monkeypatch, tmp_path)
    record, _ = measured([bench.Rival("mlx-lm", "broken")], rounds=1)
    assert record["missing"] == ["mlx-lm could not load broken; its own error is above"]


def test_a_python_that_is_not_there(tmp_path):
    record, _ = measured([bench.Rival("mlx-lm", "x", str(tmp_path / "python"))], rounds=1)
    assert record["missing"] == [f"mlx-lm: {tmp_path / 'python'} cannot be started; give another with --peer-python"]


def test_a_prompt_of_so_many_tokens():
    model, speaker = Scripted("abc"), processor()
    short = bench.task(model, speaker, tokens=None, blocks=1, rounds=1, question="why")
    long = bench.task(model, speaker, tokens=60, blocks=1, rounds=1, question="why")
    assert len(short.ids) < 60 - 4 < len(long.ids) <= 60
    with pytest.raises(OptionError, match="too few; the question alone has 10"):
        bench.task(model, speaker, tokens=5, blocks=1, rounds=1, question="why")
    with pytest.raises(OptionError, match="the context holds 256"):
        bench.task(model, speaker, tokens=255, blocks=1, rounds=1, question="why")


def test_parts_of_the_demo(capsys, tmp_path):
    """The whole command on the packaged model, with MLX on a CPU, which the report says."""
    place = tmp_path / "bench.json"
    assert command.main(["--backend", "mlx", "--rounds", "1", "--blocks", "1", "--json", str(place)]) == 0
    captured, record = capsys.readouterr(), json.loads(place.read_text())
    assert "backend mlx on cpu (plain operations), bfloat16" in captured.out
    known = {*work_ends.PARTS, "head product, vocabulary passes, soft embedding"}
    assert set(record["parts"]) <= known and len(record["parts"]) == 10
    layers = 6
    calls = {name: part["calls"] for name, part in record["parts"].items()}
    assert calls["canvas attention"] == calls["un-sort, weigh, sum"] == calls["q, k norm and RoPE"] == layers
    assert calls["q, k, v, o products"] == 4 * layers - 1, "the full layer has no v_proj"
    assert calls["norms and residuals"] == calls["router"] == 2 * layers
    assert calls["dense MLP"] == 4 * layers + 1 and calls["experts"] == 3 * layers
    assert calls["embedding, conditioning"] == 3
    assert all(0 < part["min"] <= part["milliseconds"] <= part["max"] for part in record["parts"].values())
    assert installed("mlx") and record["conditions"]["versions"]["mlx"]
