"""mlx_diffgemma.generate where its output is a pipe, and the mistakes a person can make."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

import mlx_diffgemma as m
from mlx_diffgemma.__main__ import main as package_main
from mlx_diffgemma.commands import generate
from tests.terminal.screen import ROOT, environment

DEMO = ["--backend", "reference", "--seed", "7"]
RHYME = [*DEMO, "--prompt", "recite jack"]


@pytest.fixture(scope="module")
def rhyme():
    model, processor = m.load("demo", backend="reference")
    return m.generate(model, processor, "recite jack", seed=7)


def test_a_pipe_gets_the_text_alone(capsys, rhyme):
    assert generate.main(RHYME) == 0
    captured = capsys.readouterr()
    assert captured.out == rhyme.text + "\n"
    assert captured.err == ""


def test_json_is_one_object(capsys, rhyme):
    assert generate.main([*RHYME, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    result = json.loads(captured.out)
    assert list(result) == ["text", "thinking", "tokens", "canvases", "finish_reason", "stats"]
    assert result["text"] == rhyme.text
    assert result["tokens"] == list(rhyme.tokens)
    assert result["canvases"] == [list(canvas) for canvas in rhyme.canvases]
    assert result["stats"]["steps_per_block"] == list(rhyme.stats.steps_per_block)
    assert captured.err == ""


def test_stats_go_to_stderr(capsys, rhyme):
    assert generate.main([*RHYME, "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out == rhyme.text + "\n"
    assert "tokens, stop" in captured.err and "reference" in captured.err


def test_the_prompt_from_stdin(capsys, monkeypatch, rhyme):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"recite jack\n")))
    assert generate.main([*DEMO, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == rhyme.text + "\n"


def test_stop_and_max_tokens(capsys):
    assert generate.main([*RHYME, "--stop", " went", "--stop", "water"]) == 0
    assert capsys.readouterr().out == "Jack and Jill\n"
    assert generate.main([*RHYME, "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == "Jack\n"


def test_only_given_options_are_passed_on(monkeypatch):
    seen = {}

    def stream(model, processor, prompt, *, seed, **options):  # a seed is always there, to be reported
        seen.update(options)
        return iter(())

    monkeypatch.setattr(generate, "stream_generate", stream)
    assert generate.main(["--backend", "reference", "--prompt", "x"]) == 0
    assert seen == {}
    some = ["--t-min", "0.1", "--stability-threshold", "off", "--no-thinking", "--temperature", "0", "--stop", "a"]
    assert generate.main(["--backend", "reference", "--prompt", "x", *some]) == 0
    assert seen == {
        "t_min": 0.1,
        "stability_threshold": None,
        "enable_thinking": False,
        "temperature": 0.0,
        "stop": ["a"],
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "x", "--seed", "abc"], ["--seed", "'abc'", "whole number"]),
        (["--prompt", "x", "--seed", "-1"], ["seed=-1"]),
        (["--prompt", "x", "--t-min", "warm"], ["--t-min", "'warm'"]),
        (["--prompt", "x", "--t-min", "2"], ["t_max", "t_min=2.0"]),
        (["--prompt", "x", "--max-tokens", "0"], ["max_tokens=0"]),
        (["--prompt", "x", "--backend", "abacus"], ["'abacus'", "choose"]),
        (["--prompt", "x", "--dtype", "int3"], ["'int3'"]),
        (["--prompt", "x", "--model", "no-such-folder"], ["'no-such-folder'"]),
        (["--prompt", "x", "--thinking"], ["thinking"]),
        (["--prompt", "  "], ["prompt is empty"]),
        (["--pormpt", "x"], ["'--pormpt'", "--prompt"]),
        (["--prompt", "x", "--zzzz\x1b[2J\ny=5"], ["unknown option", "--help"]),
        (["hello", "--prompt", "x"], ["'hello'"]),
        (["--stop"], ["--stop"]),
        ([], ["--prompt", "stdin"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, arguments, words):
    try:
        status = generate.main(["--backend", "reference", *arguments])
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith("mlx_diffgemma.generate: ") and captured.err.count("\n") == 1
    assert "\x1b" not in captured.err
    for word in words:
        assert word in captured.err


def test_other_errors_are_not_hidden(monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("a bug")

    monkeypatch.setattr(generate, "stream_generate", broken)
    with pytest.raises(ValueError, match="a bug"):
        generate.main(RHYME)


def test_json_after_an_interruption(capsys, monkeypatch):
    real = m.stream_generate

    def stream(*arguments, **options):
        for event in real(*arguments, **options):
            yield event
            if isinstance(event, m.Block):
                raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream_generate", stream)
    assert generate.main([*RHYME, "--json"]) == 130
    result = json.loads(capsys.readouterr().out)
    assert result["finish_reason"] == "cancelled"
    assert result["text"].startswith("Jack and Jill") and len(result["canvases"]) == 1
    assert result["stats"]["blocks"] == 1


def test_a_broken_pipe_ends_quietly():
    command = [sys.executable, "-m", "mlx_diffgemma", "generate", *RHYME]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment(), text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_the_package_dispatches(capsys, rhyme):
    assert package_main(["generate", *RHYME]) == 0
    assert capsys.readouterr().out == rhyme.text + "\n"
    assert package_main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
    assert package_main([]) == 2
    assert package_main(["frobnicate"]) == 2
    captured = capsys.readouterr()
    assert "'frobnicate'" in captured.err and captured.out == ""


@pytest.mark.parametrize("bad", [["--max-tokens", "0"], ["--t-min", "0.5", "--t-max", "0.5"], ["--entropy-bound", "0"]])
def test_bad_values_are_refused_before_a_model_is_loaded(monkeypatch, capsys, bad):
    monkeypatch.setattr(generate, "load", lambda *args, **options: pytest.fail("loaded"))
    assert generate.main(["--prompt", "x", *bad]) == 2
    assert bad[0].removeprefix("--").replace("-", "_") in capsys.readouterr().err


def test_one_temperature_alone_waits_for_the_checkpoint(monkeypatch, capsys):
    """The checkpoint's own t_max may be higher than the default."""

    def load(*args, **options):
        raise FileNotFoundError("reached")

    monkeypatch.setattr(generate, "load", load)
    assert generate.main(["--prompt", "x", "--t-min", "0.9"]) == 2
    assert "reached" in capsys.readouterr().err
