"""What a quantization cost: the report's command, from checkpoints to JSON, table and picture."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from convert import measure, report
from convert.command import main
from convert.measure import Setup
from convert.quality import dequantized, groups, hybrid
from convert.questions import DEMO_PROMPTS, LEVELS, Question, read_questions
from mlx_diffgemma.backend import choose
from mlx_diffgemma.formats import Checkpoint, open_checkpoint
from mlx_diffgemma.formats.encoding import Encoded, encode, grouped
from mlx_diffgemma.formats.stored import Stored
from mlx_diffgemma.hub import DEMO
from tests.convert import demo_prompts
from tests.convert.cases import refused, source

FEW = [Question("2+2=", "4", "1"), Question("upper hello", "HELLO", "2"), Question("sort table", "abelt", "3")]


@functools.cache
def demo() -> Checkpoint:
    return open_checkpoint(DEMO)


def replaced(stored: Stored, found: Encoded) -> Stored:
    def load(start: int, stop: int) -> Encoded:
        parts = {part: array[start:stop] for part, array in found.parts.items()}
        return Encoded(found.encoding, (stop - start, *found.shape[1:]), parts)

    return dataclasses.replace(stored, encoding=found.encoding, load=load, quantized=True)


@functools.cache
def quantized(roles: tuple[str, ...] = ("experts",)) -> Checkpoint:
    """The demo checkpoint, the matrices of some roles in mxfp4; made in memory."""
    tensors = {}
    for name, stored in demo().tensors.items():
        encoding = grouped("mxfp4")
        if demo().table[name].role in roles and encoding.fits(stored.shape):
            stored = replaced(stored, encode(stored.read().decode(), encoding))
        tensors[name] = stored
    return dataclasses.replace(demo(), tensors=tensors)


def setup(backend: str = "cpu", **options) -> Setup:
    return Setup(choose(backend), "float32", **options)


@functools.cache
def folder() -> Path:
    """The demo with experts in mxfp4, as the converter writes it; one group for each layer."""
    place, recipe = Path(_home().name) / "dg-mxfp4", Path(_home().name) / "only-experts.toml"
    recipe.write_text('[roles]\nexperts = "mxfp4"\n')
    assert main(["demo", "--out", str(place), "--recipe", str(recipe), "--quiet"]) == 0
    return place


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="report-")


def test_the_packaged_prompts_are_the_demos_own():
    assert DEMO_PROMPTS.read_text(encoding="utf-8") == demo_prompts.lines(), demo_prompts.__doc__
    questions = read_questions("demo")
    assert len(questions) == demo_prompts.COUNT and all(question.answer for question in questions)


def test_a_model_against_itself_loses_nothing(fast_backend):
    figures = measure.measure(demo(), demo(), FEW, setup(fast_backend))
    for mode in ("without", "with"):
        canvas = figures["canvas"][mode]
        assert canvas["kl"]["max"] == 0 and canvas["top1"] == 1 and set(canvas["experts"]["layers"]) == {1.0}
    assert set(figures["weights"]["roles"].values()) == {0.0}
    assert figures["modules"] | {"estimated_seconds": 0} == {
        "groups": 0, "trials": LEVELS * len(FEW), "estimated_seconds": 0, "kl": None
    }  # fmt: skip
    assert figures["generation"]["answers"]["difference"] == 0 and figures["generation"]["same_text"] == len(FEW)


def test_kernels_are_judged_by_their_own_dequantized_values(fast_backend):
    figures = measure.measure(dequantized(quantized()), quantized(), FEW, setup(fast_backend, itself=True))
    assert figures["weights"] is None
    assert figures["canvas"]["with"]["kl"]["max"] < 1e-7 and figures["canvas"]["with"]["top1"] == 1
    assert figures["modules"]["groups"] == demo().config.text.num_hidden_layers


def test_measuring_is_deterministic():
    first, again = (measure.measure(demo(), quantized(), FEW, setup(by_module=False)) for _ in range(2))
    timed = {"seconds": 0, "modules": 0}
    models = ("source", "quantized")
    assert first | timed | {"models": 0} == again | timed | {"models": 0}
    assert all(first["models"][side].keys() == again["models"][side].keys() for side in models)
    assert first["canvas"]["with"]["kl"]["mean"] > 0


def test_another_seed_asks_other_canvases():
    one, other = (measure.measure(demo(), demo(), FEW, setup(seed=seed)) for seed in (0, 1))
    assert one["sampled"]["noise"] != other["sampled"]["noise"]


def test_a_hybrid_has_one_group_of_the_other():
    other = quantized(("experts", "mlp"))
    found = groups(other, [name for name, stored in other.tensors.items() if stored.quantized])
    assert set(found) == {(layer, role) for layer in range(6) for role in ("mlp", "experts")}
    mixed = hybrid(demo(), other, found[3, "mlp"])
    swapped = {name for name in mixed.tensors if mixed.tensors[name] is not demo().tensors[name]}
    assert swapped == {f"model.decoder.layers.3.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert all(mixed.tensors[name] is other.tensors[name] for name in swapped)


def test_by_module_finds_the_one_module_that_was_changed():
    """All quantized is then the same as this module quantized; the budget decides where nobody does."""
    experts = [name for name in groups(quantized(), demo().table)[2, "experts"]]
    one = hybrid(demo(), quantized(), experts)
    figures = measure.measure(demo(), one, FEW, setup(by_module=True))
    (row,) = figures["modules"]["kl"]
    assert (row["layer"], row["role"]) == (2, "experts")
    assert row["kl"] == pytest.approx(figures["canvas"]["with"]["kl"]["mean"])
    assert [row["relative"] > 0 for row in figures["weights"]["groups"]].count(True) == 1


def test_the_table_by_module_is_left_out_where_it_costs_too_much(monkeypatch):
    monkeypatch.setattr(measure, "AFFORDABLE", 0.0)
    figures = measure.measure(demo(), quantized(), FEW, setup())
    assert figures["modules"]["kl"] is None and figures["modules"]["estimated_seconds"] > 0
    figures["layers"] = 6
    about = {"quantized": NAMED, "source": NAMED | {"itself": False}, "backend": "cpu", "dtype": "float32"}
    drawn = report.chart(about | figures)
    assert drawn.quantity == "relative error" and set(drawn.cells) == {(layer, "experts") for layer in range(6)}
    assert "--by-module does it" in printed(about | figures)


NAMED = {"name": "name", "bytes": 4e6, "bits_per_weight": 16.0}


def printed(figures: dict) -> str:
    stream = io.StringIO()
    report.show(figures, Console(file=stream, width=100, highlight=False))
    return stream.getvalue()


def test_prompts_without_answers_take_canvases_from_the_sources_own_denoising():
    figures = measure.measure(demo(), quantized(), [Question("2+2=", None, "1")], setup(by_module=False))
    generation, sampled = figures["generation"], figures["sampled"]
    assert generation["answers"] is None and generation["source"]["rate"] is None
    assert sampled["temperatures"] == sorted(sampled["temperatures"], reverse=True)
    assert sampled["temperatures"][0] == pytest.approx(demo().generation.t_max)
    assert sampled["noise"][0] > 0.9, "the first step reads noise alone"


def test_the_command_prints_one_screen_and_writes_everything(tmp_path: Path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": question.prompt, "answer": question.answer} for question in FEW]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, picture = tmp_path / "report.json", tmp_path / "report.png"
    wanted = ["--report", prompts, "--against", "demo", "--out", out, "--picture", picture]
    assert main([str(part) for part in (folder(), *wanted, "--backend", "cpu", "--steps-limit", 8)]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 120
    assert "dg-mxfp4 (" in text and "against demo_checkpoint" in text and "top-1 kept" in text
    figures = json.loads(out.read_text())
    assert set(figures) == {
        "versions", "quantized", "source", "recipe", "made_by", "prompts", "backend", "dtype", "steps_limit", "layers",
        "canvas", "generation", "weights", "modules", "sampled", "settings", "models", "seconds",
    }  # fmt: skip
    assert figures["recipe"]["name"] == "only-experts" and figures["settings"]["max_denoising_steps"] == 8
    assert figures["dtype"] == "bfloat16" and figures["sampled"]["positions"] == 48
    assert figures["quantized"]["formats"]["experts"] == {"mxfp4": 12}
    assert 0.11 < figures["weights"]["roles"]["experts"] < 0.13
    assert len(figures["modules"]["kl"]) == figures["modules"]["groups"] == 6
    with Image.open(picture) as image:
        assert image.width > 800 and len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 50


def test_the_reference_measures_in_the_only_dtype_it_has(tmp_path: Path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "report.json"
    prompts.write_text("2+2=\n")
    wanted = ["--report", prompts, "--against", "demo", "--backend", "reference", "--out", out, "--steps-limit", 2]
    assert main([str(part) for part in ("demo", *wanted, "--quiet")]) == 0
    assert json.loads(out.read_text())["dtype"] == "float32"
    assert capsys.readouterr() == ("", "")


def test_mistakes_are_one_line(tmp_path: Path, capsys):
    empty, long, odd = tmp_path / "empty.txt", tmp_path / "long.txt", tmp_path / "odd.jsonl"
    empty.write_text("\n \n")
    long.write_text("1+1=\n" + "9" * 1100 + "\n")
    odd.write_text('{"prompt": "1+1="}\n{"prompt": 2}\n')
    asked = lambda prompts, *more: refused(capsys, "demo", "--report", prompts, "--backend", "cpu", *more)  # noqa: E731
    against, other = ("--against", "demo"), source()
    capsys.readouterr()  # of what made it
    assert "holds no prompt" in asked(empty, *against)
    assert "line 2: the prompt has 1,1" in asked(long, *against) and "context holds 1,024" in asked(long, *against)
    assert "line 2: expected an object with a prompt" in asked(odd, *against)
    assert "is not a file" in asked(tmp_path / "none.txt", *against)
    assert "are not of one model: canvas_length is 48 and 16" in asked("demo", "--against", other)
    assert "holds no quantized tensor" in asked("demo", "--against", "itself")
    assert "--report needs --against" in asked("demo")
    assert "neither a folder here nor a hub name" in asked("demo", "--against", "nowhere")
    assert "dtype='int8' must be" in asked("demo", *against, "--dtype", "int8")
    assert "max_denoising_steps=0 must be" in asked("demo", *against, "--steps-limit", 0)
    assert "ends in .json" in asked("demo", *against, "--out", tmp_path)
    assert "there is no folder" in asked("demo", *against, "--picture", tmp_path / "no" / "map.png")
    assert "--recipe does not go with --report" in asked("demo", *against, "--recipe", "w8")
    unknown = refused(capsys, "demo", "--report", "demo", *against, "--backend", "abacus")
    assert "backend='abacus' is unknown" in unknown
    assert "--against belongs to --report" in refused(capsys, "demo", "--out", tmp_path / "x", *against)
