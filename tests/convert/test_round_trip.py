"""There and back again: what a format can hold comes back bit for bit, and the config says the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.command import main
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.hub import DEMO
from mlx_diffgemma.tensors import encoder_scalar, layer_name
from tests.convert.cases import converted, run, same_numbers, source
from tests.formats.quantized import KINDS, quantized


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_hf_to_mlx_to_hf(dtype: str, tmp_path: Path):
    there = run(source(dtype), tmp_path / "mlx", "--to", "mlx")
    back = run(there, tmp_path / "hf", "--to", "hf")
    same_numbers(source(dtype), there)
    same_numbers(source(dtype), back)
    one, other = (load_file(folder / "model.safetensors") for folder in (source(dtype), back))
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in one.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in other.items()
    }
    assert ModelConfig.from_folder(source(dtype)).text == ModelConfig.from_folder(back).text


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_to_mlx_keeps_every_code(kind: str, tmp_path: Path):
    """Without a recipe nothing is decoded: words, scales and biases are carried over."""
    same_numbers(quantized(kind), run(quantized(kind), tmp_path / "again"))


@pytest.mark.parametrize("recipe", ["w8", "experts4", "mxfp4", "nvfp4"])
def test_converting_to_the_recipe_it_has_changes_nothing(recipe: str, tmp_path: Path):
    same_numbers(converted(recipe), run(converted(recipe), tmp_path / "again", "--recipe", recipe))


def test_wider_floats_and_back_are_exact(tmp_path: Path, capsys):
    (tmp_path / "wide.toml").write_text('[roles]\ndefault = "f32"\n')
    wide = run(source(), tmp_path / "wide", "--to", "hf", "--recipe", str(tmp_path / "wide.toml"))
    same_numbers(source(), wide, encodings=False)
    narrow = tmp_path / "narrow"
    assert main([str(wide), "--out", str(narrow), "--to", "hf", "--recipe", "bf16"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.partition("\n\n")[0].splitlines()[1:]]
    assert {row[-1] for row in rows} == {"exact"}
    same_numbers(source(), narrow)
    roles = json.loads((narrow / "conversion_manifest.json").read_text())["errors_by_role"]
    assert set(roles.values()) == {0.0}


@pytest.mark.parametrize("recipe", ["experts4", "nvfp4"])
def test_a_quantized_checkpoint_back_in_bfloat16_is_its_decoded_numbers(recipe: str, tmp_path: Path):
    back = open_checkpoint(run(converted(recipe), tmp_path / "hf", "--to", "hf"))
    low = open_checkpoint(converted(recipe))
    for name in low.table:
        values = low.read(name).astype(back.tensors[name].read().parts["weight"].dtype)
        assert np.array_equal(values, back.read(name)), name


def test_both_sets_of_layer_scalars_and_every_bank_arrive():
    found, first = open_checkpoint(converted("experts4")), open_checkpoint(source())
    layers = range(found.config.text.num_hidden_layers)
    for name in [f"{layer_name(i)}.layer_scalar" for i in layers] + [encoder_scalar(i) for i in layers]:
        assert found.read(name) == first.read(name)
    banks = [stored for name, stored in found.tensors.items() if found.table[name].role == "experts"]
    assert len(banks) == 2 * len(layers) and all(str(bank.encoding) == "affine 4-bit g64" for bank in banks)


def test_every_format_in_a_row(tmp_path: Path):
    """bfloat16 goes through all of them unharmed."""
    place: Path | str = "demo"
    for to in ("gguf", "mlx", "compressed-tensors", "hf"):
        place = run(place, tmp_path / to, "--to", to, "--recipe", "bf16")
    same_numbers(DEMO, Path(place))


def test_every_second_rounding_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """To fewer bits or to bfloat16: both round what was rounded before. Carrying codes over does not."""
    said = {}
    for name, options in {
        "requantized": ("--recipe", "mxfp4"),
        "to bfloat16": ("--recipe", "bf16"),
        "kept": (),
    }.items():
        assert main([str(quantized("affine4")), "--out", str(tmp_path / name), *options]) == 0
        said[name] = "".join(capsys.readouterr())
    assert "quantized twice" in said["requantized"] and "quantized twice" in said["to bfloat16"]
    assert "twice" not in said["kept"]
