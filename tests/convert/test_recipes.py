"""Recipes by role, a user's own recipe, and what is said of a recipe that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert import plan
from convert.recipes import KEEP, RECIPES, ROLES, Recipe, ends_in, parse_encoding, recipe
from convert.targets import target
from convert.targets.hf import HuggingFace
from convert.targets.mlx import MLX
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.tensors import Tensor, tensor_table
from tests.convert.cases import converted, refused, run, source
from tests.core.test_config import PUBLISHED

TABLE = tensor_table(ModelConfig.from_dict(read_json(PUBLISHED)))
LAYER = "model.decoder.layers"


def chosen(found: Recipe) -> dict[str, str]:
    return {name: str(choice.encoding) for name, choice in plan.choose(TABLE, MLX(), found).items()}


def size(name: str) -> int:
    choices = plan.choose(TABLE, MLX(), RECIPES[name])
    return sum(choice.encoding.nbytes(TABLE[row].shape) for row, choice in choices.items())


def test_experts4_of_the_published_model_fits_in_18_gb():
    assert 16e9 < size("experts4") < 18e9
    assert size("bf16") == 51_647_562_456, "the payload of the published files"
    assert size("mxfp4") < size("experts4") < size("w8") < 28.5e9


def test_experts4_by_role():
    found = chosen(RECIPES["experts4"])
    expected = {
        f"{LAYER}.3.experts.gate_up_proj": "affine 4-bit g64",
        f"{LAYER}.3.experts.down_proj": "affine 4-bit g64",
        f"{LAYER}.3.self_attn.q_proj.weight": "affine 8-bit g64",
        f"{LAYER}.3.mlp.down_proj.weight": "affine 8-bit g64",
        f"{LAYER}.3.router.proj.weight": "affine 8-bit g64",
        "model.decoder.embed_tokens.weight": "affine 8-bit g64",
        "model.decoder.self_conditioning.up_proj.weight": "affine 8-bit g64",
        f"{LAYER}.3.router.scale": "bfloat16",
        f"{LAYER}.3.router.per_expert_scale": "bfloat16",
        f"{LAYER}.3.layer_scalar": "bfloat16",
        "model.encoder.language_model.layers.3.layer_scalar": "bfloat16",
        "model.encoder.embed_vision.embedding_projection.weight": "bfloat16",
        "model.encoder.vision_tower.encoder.layers.3.mlp.down_proj.linear.weight": "bfloat16",
    }
    assert {name: found[name] for name in expected} == expected
    quantized = [name for name in TABLE if found[name] != "bfloat16"]
    assert len(quantized) == 299, "60 banks, 115 attention, 90 dense MLP, 30 routers, 3 of self-conditioning, 1 table"


def test_groups_fall_back_and_the_plan_says_so():
    """704 and 2112 are no multiples of 128."""
    found = Recipe("g128", dict.fromkeys(ROLES, parse_encoding("affine 4 g128")))
    choices = plan.choose(TABLE, MLX(), found)
    down = choices[f"{LAYER}.0.experts.down_proj"]
    assert str(down.encoding) == "affine 4-bit g64" and "704" in down.note and "128" in down.note
    assert str(choices[f"{LAYER}.0.experts.gate_up_proj"].encoding) == "affine 4-bit g128"
    tower = choices["model.encoder.vision_tower.encoder.layers.0.mlp.down_proj.linear.weight"]
    assert str(tower.encoding) == "bfloat16" and "4304" in tower.note
    assert not choices["model.decoder.norm.weight"].note, "vectors are never quantized; that needs no word"


def test_groups_that_a_format_has_not():
    choices = plan.choose(TABLE, target("gguf"), RECIPES["w8"])
    attention = choices[f"{LAYER}.0.self_attn.q_proj.weight"]
    assert str(attention.encoding) == "affine 8-bit g32" and attention.note == "gguf has no groups of 64"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16", "bfloat16"),
        ("float32", "float32"),
        ("affine 4 g32", "affine 4-bit g32"),
        ("affine 6", "affine 6-bit g64"),
        ("affine 8-bit g128", "affine 8-bit g128"),
        ("MXFP4", "mxfp4"),
        ("nvfp4 global", "nvfp4 with global scale"),
        ("fp8", "fp8 per channel"),
        ("fp8 block 128", "fp8 block 128"),
        ("keep", "None"),
    ],
)
def test_encodings_in_words(text: str, expected: str):
    assert str(parse_encoding(text)) == expected


@pytest.mark.parametrize(
    "text", ["", "affine", "affine 7 g64", "affine 4 g48", "int4", "affine 4 g64 more", "fp8 block x"]
)
def test_what_is_no_encoding(text: str):
    with pytest.raises(OptionError) as error:
        parse_encoding(text)
    assert repr(text) in str(error.value)


def test_names_are_compared_in_whole_parts():
    row = Tensor("model.decoder.layers.0.mlp.down_proj.weight", (2, 2), "mlp")
    assert ends_in(row, "down_proj") and ends_in(row, "mlp.down_proj") and ends_in(row, row.name)
    assert not ends_in(row, "proj") and not ends_in(row, "n_proj") and not ends_in(row, "mlp")


OWN = """
name = "mine"
[roles]
experts = "affine 4 g64"
attention = "mxfp8"
default = "bf16"
[[override]]
layers = [0, -1]
roles = ["experts", "attention"]
encoding = "affine 8 g64"
[[override]]
modules = ["experts.down_proj"]
encoding = "affine 6 g64"
"""


def test_a_recipe_of_ones_own(tmp_path: Path):
    (tmp_path / "mine.toml").write_text(OWN)
    found = open_checkpoint(run(source(), tmp_path / "out", "--recipe", str(tmp_path / "mine.toml")))
    form = {name: str(stored.encoding) for name, stored in found.tensors.items()}
    assert form[f"{LAYER}.0.experts.gate_up_proj"] == form[f"{LAYER}.5.experts.gate_up_proj"] == "affine 8-bit g64"
    assert form[f"{LAYER}.1.experts.gate_up_proj"] == "affine 4-bit g64"
    assert {form[f"{LAYER}.{i}.experts.down_proj"] for i in range(6)} == {"affine 6-bit g64"}, "later ones win"
    assert form[f"{LAYER}.0.self_attn.q_proj.weight"] == "affine 8-bit g64"
    assert form[f"{LAYER}.1.self_attn.q_proj.weight"] == "mxfp8"
    assert form["model.decoder.embed_tokens.weight"] == "bfloat16"
    block = read_json(tmp_path / "out" / "config.json")["quantization"]
    assert (block["bits"], block["mode"]) == (4, "affine")
    assert block[f"{LAYER}.1.self_attn.q_proj"] == {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    assert all("mode" in row for row in block.values() if isinstance(row, dict))


def test_keep_in_one_role(tmp_path: Path):
    (tmp_path / "mine.toml").write_text('[roles]\nexperts = "mxfp4"\ndefault = "keep"\n')
    found = open_checkpoint(run(converted("w8"), tmp_path / "out", "--recipe", str(tmp_path / "mine.toml")))
    assert str(found.tensors[f"{LAYER}.0.experts.down_proj"].encoding) == "mxfp4"
    assert str(found.tensors["model.decoder.embed_tokens.weight"].encoding) == "affine 8-bit g64"


MISTAKES = {
    "[roles]\nexpert = 'bf16'": "roles.expert",
    "[roles]\nexperts = 4": "roles.experts",
    "[roles]\nexperts = 'int3'": "int3",
    "roles = 3": "roles",
    "role = 3": "role",
    "[[override]]\nlayers = [0]": "encoding",
    "[[override]]\nlayers = [true]\nencoding = 'bf16'": "layers",
    "[[override]]\nroles = ['heads']\nencoding = 'bf16'": "heads",
    "[[override]]\nlayer = [0]\nencoding = 'bf16'": "layer",
    "[[override]]\nlayers = [6]\nencoding = 'bf16'": "layer 6 of 6",
    "[[override]]\nmodules = ['down']\nencoding = 'bf16'": "no tensor",
    "override = 1": "override",
    "[roles": "TOML",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_recipe_with_a_mistake(text: str, tmp_path: Path, capsys):
    (tmp_path / "mine.toml").write_text(text)
    line = refused(capsys, source(), "--out", tmp_path / "out", "--recipe", tmp_path / "mine.toml")
    assert MISTAKES[text] in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--recipe", "experts5"), "experts4"),
        (("--recipe", "absent.toml"), "absent.toml"),
        (("--recipe", "fp8"), "fp8 per channel"),
        (("--to", "hf", "--recipe", "experts4"), "affine"),
        (("--to", "onnx"), "hf"),
    ],
)
def test_recipes_and_formats_that_are_not(options: tuple[str, ...], word: str, tmp_path: Path, capsys):
    line = refused(capsys, source(), "--out", tmp_path / "out", *options)
    assert word in line and not (tmp_path / "out").exists()


def test_formats_and_recipes_by_name():
    assert recipe(None) is recipe("keep") is KEEP and isinstance(target("hf"), HuggingFace)
    assert all(set(found.roles) == set(ROLES) for found in RECIPES.values())
