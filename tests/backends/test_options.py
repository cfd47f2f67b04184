"""What ``load`` can be asked for beside a checkpoint: kernels, FP8 activations, an FP8 head; and who refuses what."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import cuda_backend
import mlx_diffgemma as m
from convert.command import main as convert
from cuda_backend.kernels import jit
from cuda_backend.linear import takes_fp8
from mlx_diffgemma import api, mlx_backend
from mlx_diffgemma.backend import CanvasSpec, LoadOptions
from mlx_diffgemma.commands import generate
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.formats import open_checkpoint
from tests.formats.foreign import foreign
from tests.formats.quantized import quantized
from tests.tiny import FULL, SLIDING, checkpoint

ONE_STEP = GenerationConfig(max_denoising_steps=2, confidence_threshold=None)
SMALL = (("num_hidden_layers", 2), ("layer_types", (SLIDING, FULL)))


def load(folder, **options):
    return cuda_backend.load(open_checkpoint(folder), device="cpu", **options)


def logits(model, vocab: int = 512) -> np.ndarray:
    rng = np.random.default_rng(3)
    canvas = rng.integers(0, vocab, (1, model.config.canvas_length))
    return model.inspect(model.encode(rng.integers(0, vocab, (1, 9))), canvas)["logits"]


def off(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - truth).mean() / np.square(truth).mean()))


# ---- what is refused


OTHERS = [
    ("mlx", {"activations": "fp8"}),
    ("mlx", {"head": "fp8"}),
    ("cpu", {"self_conditioning": "survivors"}),
    ("cpu", {"tail": "hold"}),
    *(
        ("reference", option)
        for option in (
            {"kernels": "ops"},
            {"kernels": "fused"},
            {"activations": "fp8"},
            {"head": "fp8"},
            {"self_conditioning": "survivors"},
            {"tail": "hold"},
        )
    ),
]


@pytest.mark.parametrize(("backend", "option"), OTHERS)
def test_a_backend_refuses_what_it_does_not_have(backend, option):
    (name, value), *_ = option.items()
    with pytest.raises(OptionError, match=rf"{name}='{value}' .*'{backend}': leave it out"):
        m.load("demo", backend=backend, **option)


@pytest.mark.parametrize(
    "option", [{"kernels": "fast"}, {"activations": "fp4"}, {"head": "int8"}, {"dtype": "float16"}, {"tail": "cut"}]
)
@pytest.mark.parametrize("backend", ["mlx", "cpu", "reference"])
def test_unknown_values_are_refused_before_anything_is_opened(backend, option):
    (name, value), *_ = option.items()
    with pytest.raises(OptionError, match=f"{name}='{value}'") as error:
        m.load("no-such-folder", backend=backend, **option)
    assert "\n" not in str(error.value)


def test_kernels_need_a_mac(monkeypatch):
    monkeypatch.setattr(mlx_backend, "read_weights", None)
    with pytest.raises(OptionError, match=r"kernels='fused': kernels need a Mac's GPU.*kernels='ops'"):
        m.load("demo", backend="mlx", kernels="fused")


def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(jit, "INTERPRETED", False)
    monkeypatch.setattr(api, "open_checkpoint", None)
    with pytest.raises(OptionError, match=r"kernels='fused': kernels need a CUDA GPU.*kernels='ops'"):
        m.load("demo", backend="cpu", kernels="fused")
    with pytest.raises(OptionError, match="CUDA GPU"):
        load(checkpoint(seed=1), kernels="fused")


@pytest.mark.parametrize(("kind", "formats"), [("dense", "bfloat16|float32"), ("affine4", "affine 4-bit g64")])
def test_fp8_activations_are_for_fp8_weights(kind, formats, monkeypatch):
    monkeypatch.setattr(cuda_backend, "read_weights", None)
    folder = checkpoint(seed=1) if kind == "dense" else quantized(kind)
    with pytest.raises(OptionError, match=rf"activations='fp8' .*({formats}).*recipe fp8"):
        load(folder, activations="fp8")
    with pytest.raises(OptionError, match="fp8 block"):
        load(foreign("fp8-block"), activations="fp8")


# ---- what is said


def test_by_default_all_is_exact_and_plain():
    about = load(checkpoint(seed=1)).describe()
    assert about["kernels"]["mode"] == "auto" and about["kernels"]["fused"] == []
    assert about["approximations"] == [] and "card" not in about
    assert about["memory"]["total"] == sum(about["memory"]["parts"].values())
    assert load(checkpoint(seed=1), kernels="ops").describe()["kernels"]["ops"].keys() == {"as asked"}
    assert json.loads(json.dumps(about)) == about


def test_approximations_have_names():
    both = load(foreign("ct-fp8"), dtype="float32", activations="fp8", head="fp8").describe()
    assert [re.search(r"\((\w+)='fp8'\)", text)[1] for text in both["approximations"]] == ["activations", "head"]
    assert both["memory"]["parts"]["head"] > 0
    assert load(foreign("ct-fp8"), dtype="float32").describe()["approximations"] == []


# ---- what is computed


@pytest.fixture(scope="module")
def demo_fp8(tmp_path_factory):
    """The demo with FP8 weights: it was trained, so that what is rounded stays close; random weights amplify."""
    folder = tmp_path_factory.mktemp("demo") / "fp8"
    assert convert(["demo", "--to", "compressed-tensors", "--recipe", "fp8", "--out", str(folder)]) == 0
    return folder


def test_fp8_activations_reach_every_fp8_weight_and_stay_close(demo_fp8):
    exact, model = (load(demo_fp8, dtype="float32", activations=each) for each in (None, "fp8"))
    for one in (exact, model):
        layer = one.network.weights.layers[0]
        weights = [layer.self_attn.o_proj, layer.mlp.down_proj, layer.experts.gate_up_proj, layer.experts.down_proj]
        assert all(takes_fp8(weight) == (one is model) for weight in weights)
        assert not takes_fp8(layer.router.proj)
    assert 1e-4 < off(logits(model, 128), logits(exact, 128)) < 0.15


def test_the_fp8_head_changes_steps_and_not_the_hidden_states():
    exact, model = (load(checkpoint(seed=1), dtype="float32", head=each) for each in (None, "fp8"))
    np.testing.assert_array_equal(logits(model), logits(exact))  # inspection looks at the exact head
    views = []
    for one in (exact, model):
        state = one.begin(one.encode(np.arange(9)[None]), [CanvasSpec(ONE_STEP, 7)])
        views.append(one.read(one.step(state)))
    assert 1e-5 < off(views[1].entropy, views[0].entropy) < 0.2


def test_the_whole_model_on_kernels_interpreted():
    """Reading a prompt, two steps, and a commit with the step behind it: all kernels that dense weights need."""
    folder = checkpoint(seed=1, shape=SMALL)
    plain, fused = (load(folder, dtype="float32", kernels=kernels) for kernels in ("ops", "fused"))
    about = fused.describe()["kernels"]
    assert about["interpreted"] and about["ops"] == {"no GPU": ["graph"]}
    assert fused.whole and fused.graphs is None
    shown = []
    for model in (plain, fused):
        cache = model.encode(np.arange(1, 12)[None])
        first = model.read(model.step(model.begin(cache, [CanvasSpec(ONE_STEP, 7)])))
        commit = (first.argmax, np.array([model.config.canvas_length]))
        state = model.step(model.begin(cache, [CanvasSpec(ONE_STEP, 7, block=1)], commit=commit))
        shown.append((first, model.read(state), model.read(model.step(state))))
    for one, other in zip(*shown, strict=True):
        assert off(other.entropy, one.entropy) < 1e-3 and off(other.confidence, one.confidence) < 1e-3
        np.testing.assert_array_equal(one.argmax, other.argmax)


# ---- the command line


def test_flags_reach_load_and_the_plan_is_shown(monkeypatch, capsys):
    seen = {}

    def loading(model, **options):
        seen.update(options)
        return m.load("demo", backend="cpu")

    monkeypatch.setattr(generate, "load", loading)
    flags = ["--kernels", "fused", "--activations", "fp8", "--head", "fp8"]
    assert generate.main(["--prompt", "12+34=", "--seed", "7", *flags]) == 0
    assert {name: seen[name] for name in ("kernels", "activations", "head")} == {
        "kernels": "fused",
        "activations": "fp8",
        "head": "fp8",
    }
    captured = capsys.readouterr()
    assert captured.out == "46\n" and captured.err.count("\n") == 1
    assert re.match(r"[\d.]+ MB on cpu: .*weights 3\.\d.*cache [\d.]+ at 1,024 tokens", captured.err)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kernels", "fast"], ["--kernels", "'fast'", "fused"]),
        (["--activations", "fp4"], ["--activations", "'fp4'", "fp8"]),
        (["--backend", "cpu", "--activations", "fp8"], ["activations='fp8'", "bfloat16"]),
        (["--backend", "reference", "--head", "fp8"], ["head='fp8'", "'reference'"]),
    ],
)
def test_mistakes_on_the_command_line(flags, words, capsys):
    try:
        status = generate.main(["--prompt", "x", *flags])
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


def test_options_that_were_not_given_are_not_passed_on():
    assert LoadOptions().chosen() == {} and LoadOptions("float32").chosen() == {}
    assert LoadOptions(None, "ops", head="fp8").chosen() == {"kernels": "ops", "head": "fp8"}
