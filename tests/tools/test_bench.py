"""``mlx_diffgemma.bench``: mistakes of both halves of the command, measuring, and what it says of peers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_diffgemma as m
from mlx_diffgemma.__main__ import main as package_main
from mlx_diffgemma.backend import Choice, installed
from mlx_diffgemma.commands import bench as command
from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.hub import DEMO
from mlx_diffgemma.tools import bench, bench_report, plan, work_ends
from tests.core.scripted import CANVAS, STEPS, Scripted, processor
from tests.terminal.screen import ROOT, environment

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
    return model, Tokenizer()

def stream_generate(model, tokenizer, prompt, max_tokens):
    if model == "brittle" and max_tokens != 8:
        raise ValueError("out of memory")
    for i in range(max_tokens):
        time.sleep(0.002)
        yield SimpleNamespace(generation_tokens=i + 1, peak_memory=1.5)
"""


# ---- the command


SURVIVORS = ["--plan", "--self-conditioning", "survivors", "--survivors"]
MISTAKES = [
    (["--plan", "--chip", "m9"], "chip 'm9' is unknown; choose one of m1, "),
    (["--plan", "--bits", "3"], "--bits '3' is unknown; choose bf16, 4bit"),
    (["--plan", "--bits", ""], "--bits '' is unknown; choose bf16, 4bit"),
    (["--plan", "--model", ""], "--model is empty"),
    (["--model", ""], "--model is empty"),
    (["--plan", "--survivors", "9"], "--survivors needs --self-conditioning survivors"),
    ([*SURVIVORS, "nan"], "--survivors nan must be from 1 to 262,144"),
    ([*SURVIVORS, "inf"], "--survivors inf must be from 1 to 262,144"),
    ([*SURVIVORS, "0"], "--survivors 0 must be from 1 to 262,144"),
    ([*SURVIVORS, "262145"], "must be from 1 to 262,144, which is the vocabulary"),
    (["--plan", "--kept", "257"], "--kept 257 must be from 1 to 256, which is the canvas"),
    (["--plan", "--prompt-tokens", "262144"], "--prompt-tokens 262,144 and a canvas of 256 are too many; the context"),
    (["--plan", "--model", "demo", "--prompt-tokens", "1000"], "the context holds 1,024"),
    (["--peer-python", "python"], "--peer-python needs --against or --against-ar"),
    (
        ["--prompt-tokens", "1000"],
        "--prompt-tokens 1,000 and --blocks 2 of 48 each are too many; the context holds 1,024",
    ),
    (["--blocks", "99"], "--blocks 99 of 48 tokens each are too many behind "),
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


@pytest.mark.parametrize(
    "given", ["", ".", "new/", "/proc/plan.json", "/proc/new/plan.json", "file/plan.json", "n" * 300]
)
@pytest.mark.parametrize("mode", [["--plan"], []], ids=["plan", "measure"])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(mode, given, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "new").mkdir()
    for work in ("load", "planned"):
        monkeypatch.setattr(command, work, lambda *args, **named: pytest.fail("this is work"))
    assert command.main([*mode, "--json", given]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mlx_diffgemma.bench: --json ") and captured.err.count("\n") == 1
    assert captured.out == "" and sorted(path.name for path in tmp_path.iterdir()) == ["file", "new"]
    assert list((tmp_path / "new").iterdir()) == []


def test_a_closed_pipe_ends_it_quietly():
    for options in (["--plan"], ["--plan", "--json"]):
        with subprocess.Popen(
            [sys.executable, "-m", "mlx_diffgemma", "bench", *options],
            cwd=ROOT,
            env={name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b"" and process.wait() == 141


def test_help_says_each_default_once(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("m4-max") == 1 and "demo (default); with --plan" in text and "(default: the 26B)" in text


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
    assert lines[2] == "Options: none. Approximations: none."
    record |= {"options": {"tail": "hold"}}
    record["conditions"]["model"]["approximations"] = ["tail='hold': so and so"]
    assert "\nOptions: tail='hold'. Approximations: tail='hold': so and so.\n" in bench_report.markdown(record)


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
    assert row.count("|") == 7 and f"{peer['ratio']['median']:.2f} (" in row
    assert "| 1.50 GB |" in row and "peak memory" in text and " GB |" in row


def test_steps_per_canvas_of_a_peer_that_denoises():
    assert bench.steps_per_canvas({"steps": 60, "canvas_tokens": 512.0}, 256) == {"steps_per_canvas": 30.0}
    assert bench.steps_per_canvas({"tokens": 9}, 256) == {}
    known = {"min": 29.0, "median": 30.0, "max": 31.0}
    told = {"kind": "mlx-vlm", "versions": {"mlx-vlm": "1"}, "model": "m", "tokens_per_second": known, "first": known}
    row = bench_report.peer_row(told | {"peak_memory": {"median": 0.05}, "ratio": None, "steps_per_canvas": known})
    assert row == "| mlx-vlm 1 m | 30.0 | 30.0 | 30,000 | 50.0 MB | no tokens |"


def test_a_missing_peer_is_one_line():
    record, _ = measured([bench.Rival("mlx-lm", "x")], rounds=1)
    assert record["peers"] == []
    assert record["missing"] == [
        f"mlx-lm is not installed in {sys.executable}: pip install mlx-lm, then run this again"
    ]
    assert record["missing"][0] not in bench_report.markdown(record), "it is said once, on stderr"


def test_a_peer_that_cannot_load_is_one_line(monkeypatch, tmp_path):
    peers(monkeypatch, tmp_path)
    record, _ = measured([bench.Rival("mlx-lm", "broken")], rounds=1)
    assert record["missing"] == ["mlx-lm could not load broken: no such model"]


def test_a_peer_that_ends_in_between_does_not_take_ours_with_it(monkeypatch, tmp_path):
    peers(monkeypatch, tmp_path)
    said: list[str] = []
    model, speaker = Talkative("abcdefgh" * 4), processor()
    task = bench.task(model, speaker, tokens=None, blocks=2, rounds=2, question="why")
    record = bench.measure(model, speaker, SCRIPTED, task, [bench.Rival("mlx-lm", "brittle")], said.append)
    assert record["missing"] == ["mlx-lm ended while answering: ValueError: out of memory"]
    assert said.count(record["missing"][0]) == 1 and record["peers"] == []
    assert record["ours"]["tokens"]["median"] == 2 * CANVAS


def test_a_peer_that_was_asked_for_and_failed_is_one_line_and_the_status(capfd, monkeypatch, tmp_path):
    peers(monkeypatch, tmp_path)
    options = ["--backend", "cpu", "--rounds", "1", "--blocks", "1", "--against-ar", "broken"]
    assert command.main(options) == 1
    captured = capfd.readouterr()
    assert captured.err.count("no such model") == 1 and "Traceback" not in captured.err + captured.out
    assert "mlx-lm" not in captured.out and "| ms per step |" in captured.out


def test_mlx_vlm_gets_the_folder_of_the_demo():
    options = command.parser().parse_args(["--against", "mlx-vlm", "--peer-python", "py"])
    assert command.rivals_of(options, "demo") == [bench.Rival("mlx-vlm", str(DEMO), "py")]
    assert command.rivals_of(options, "org/name") == [bench.Rival("mlx-vlm", "org/name", "py")]


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
    with pytest.raises(OptionError, match=r"--prompt-tokens 255 and --blocks 1 .* the context holds 256"):
        bench.task(model, None, tokens=255, blocks=1, rounds=1, question="why")
    with pytest.raises(OptionError, match=r"--blocks 99 .* behind 10; the context holds 256"):
        bench.task(model, speaker, tokens=None, blocks=99, rounds=1, question="why")


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
    assert record["options"] == {"backend": "mlx"} and record["conditions"]["model"]["approximations"] == []
    assert installed("mlx") and record["conditions"]["versions"]["mlx"]


def test_the_vocabulary_is_timed_as_the_model_makes_it(capsys, tmp_path):
    place = tmp_path / "bench.json"
    options = ["--backend", "mlx", "--rounds", "1", "--blocks", "1", "--self-conditioning", "survivors"]
    assert command.main([*options, "--json", str(place)]) == 0
    captured, record = capsys.readouterr(), json.loads(place.read_text())
    (name,) = (name for name in record["parts"] if name.startswith("head product"))
    assert re.fullmatch(
        r"head product, vocabulary passes, soft embedding \(survivors, (0|25|100)% of rows dense\)", name
    )
    assert record["options"]["self_conditioning"] == "survivors"
    assert "Options: backend='mlx', self_conditioning='survivors'. Approximations: self_conditioning" in captured.out
