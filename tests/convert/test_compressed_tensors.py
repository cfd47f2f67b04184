"""The compressed-tensors writer: names, shapes, dtypes and config are RedHatAI's; the numbers are their formulas'."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from convert import plan, recipes, run
from convert.targets.compressed_tensors import CompressedTensors, reciprocal
from convert.targets.mlx import MLX
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.formats.encoding import Encoding, dense
from mlx_diffgemma.tensors import tensor_table
from tests.convert.cases import same_numbers, source
from tests.formats import foreign as f
from tests.formats.quantized import quantized

FIXTURE = Path(__file__).parents[2] / "mlx_diffgemma" / "fixtures" / "diffusiongemma-26B-A4B-it.json"
LAYER = "model.decoder.layers.2"
EXPERT = f"{LAYER}.experts.5.up_proj"
FP8 = recipes.RECIPES["fp8"]
MIXED = replace(
    recipes.RECIPES["experts4-fp8"], roles=recipes.RECIPES["experts4-fp8"].roles | {"self_conditioning": dense()}
)


class Silent:
    def advance(self, read: int) -> None:
        pass


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="compressed-")


@functools.cache
def written(name: str) -> Path:
    """``source()`` in one of the two recipes."""
    return convert(source(), Path(_home().name) / name, {"fp8": FP8, "mixed": MIXED}[name])


def convert(folder: Path, out: Path, recipe: recipes.Recipe = recipes.KEEP, target=None) -> Path:
    run.convert(plan.make(open_checkpoint(folder), target or CompressedTensors(), recipe), out, Silent())
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def quantization(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def matrices() -> dict[str, Tensor]:
    """The linear layers of the source that both recipes quantize, one per expert, in float32."""
    found = {}
    for name, tensor in load_file(source() / "model.safetensors").items():
        if f.role(name) in ("attention", "mlp") and tensor.ndim == 2:
            found[name.removesuffix(".weight")] = tensor.float()
        for e, bank in enumerate(tensor if f.role(name) == "experts" else ()):
            base, _, which = name.rpartition(".")
            halves = ("gate_proj", "up_proj") if which == "gate_up_proj" else (which,)
            found |= {f"{base}.{e}.{h}": m.float() for h, m in zip(halves, bank.chunk(len(halves)), strict=True)}
    return found


def test_fp8_tensors_are_those_of_the_formula():
    """llm-compressor's: amax / 448 in bfloat16, codes rounded once; everything else as it was."""
    expected = {}
    for module, matrix in matrices().items():
        expected |= {f"{module}.{part}": tensor for part, tensor in f.fp8_channel(matrix).parts.items()}
    for name, tensor in load_file(source() / "model.safetensors").items():
        if f.role(name) not in ("experts", "attention", "mlp") or tensor.ndim < 2:
            expected[name] = tensor
    found = tensors(written("fp8"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_nvfp4_tensors_are_as_vllm_declares_them():
    """``CompressedTensorsW4A4Nvfp4MoEMethod.create_weights``; and one global scale for gate and up of an expert."""
    found = tensors(written("mixed"))
    expected = {
        "weight_packed": (torch.uint8, (64, 64)),
        "weight_scale": (torch.float8_e4m3fn, (64, 8)),
        "weight_global_scale": (torch.float32, (1,)),
    }
    for module in (m for m in matrices() if ".experts." in m and "down" not in m):
        parts = {name.rpartition(".")[2]: t for name, t in found.items() if name.startswith(f"{module}.")}
        assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == expected
        twin = module.replace("gate_proj", "up_proj")
        assert torch.equal(parts["weight_global_scale"], found[f"{twin}.weight_global_scale"])
    assert not [name for name in found if name.endswith(("weight_shape", "input_global_scale", "experts.gate_up_proj"))]


@pytest.mark.parametrize("name", ["fp8", "mixed"])
def test_what_was_written_reads_back_as_it_was_encoded(name: str):
    recipe, back, first = {"fp8": FP8, "mixed": MIXED}[name], open_checkpoint(written(name)), open_checkpoint(source())
    for row in first.table.values():
        stored = back.tensors[row.name]
        wanted = recipe.wanted(row, 6)
        assert stored.encoding == (wanted if len(row.shape) > 1 else dense()), row.name
        if stored.quantized:  # the error of the format, and not one more
            values, found = first.read(row.name).astype(np.float32), back.read(row.name)
            limit = 0.12 if stored.encoding.mode == "nvfp4" else 0.04
            assert np.linalg.norm(values - found) < limit * np.linalg.norm(values)


def test_config_of_fp8_is_redhats():
    """Key for key, on the table of the 26B model; the order of what is ignored is theirs too."""
    config = json.loads(FIXTURE.read_text())
    config = config.get("config", config)
    table = tensor_table(ModelConfig.from_dict(config))
    choices = plan.choose(table, CompressedTensors(), FP8)
    encodings = {name: choice.encoding for name, choice in choices.items()}
    found = CompressedTensors().config(config, encodings)["quantization_config"]
    assert list(found) == [
        "config_groups", "format", "global_compression_ratio", "ignore", "kv_cache_scheme", "quant_method",
        "quantization_status", "sparsity_config", "transform_config", "version",
    ]  # fmt: skip
    group = found["config_groups"]["group_0"]
    assert found["format"] == group["format"] == "float-quantized" and group["targets"] == ["Linear"]
    assert found["kv_cache_scheme"] is None and found["quantization_status"] == "compressed"
    weights, inputs = group["weights"], group["input_activations"]
    keys = ("num_bits", "type", "strategy", "dynamic", "symmetric", "group_size")
    assert [weights[key] for key in keys] == [8, "float", "channel", False, True, None]
    assert [inputs[key] for key in keys] == [8, "float", "token", True, True, None]
    ignore = found["ignore"]
    assert len(ignore) == len(set(ignore)) == 255
    assert ignore[0] == "model.encoder.language_model.layers.0.router.proj" and ignore[-1] == "lm_head"
    assert "model.decoder.self_conditioning.gate_proj" in ignore
    assert "model.encoder.embed_vision.embedding_projection" in ignore
    assert "model.encoder.vision_tower.encoder.layers.26.mlp.down_proj.linear" in ignore


def test_coverage_on_the_26b_table():
    """30 * 128 * 3 experts, 115 of attention, 90 of the dense MLP; tensors and bytes are the published ones."""
    config = json.loads(FIXTURE.read_text())
    table = tensor_table(ModelConfig.from_dict(config.get("config", config)))
    outputs = []
    for name, choice in plan.choose(table, CompressedTensors(), FP8).items():
        outputs += CompressedTensors().outputs(table[name], choice.encoding)
    names = [output.name for output in outputs]
    assert sum(name.endswith(".weight_scale") for name in names) == 30 * 128 * 3 + 115 + 90 == 11_725
    assert len(names) == len(set(names)) == 24_232
    assert 0 < 27_200_864_632 - sum(plan.size(output) for output in outputs) < 4_000_000  # the rest is the header


FORMATS = {torch.uint8: "nvfp4-pack-quantized", torch.float8_e4m3fn: "float-quantized"}


def matched(module: str, config: dict) -> str | None:
    """The format of a module as vLLM finds it: ignored, else by name or pattern, else by class."""

    def meets(target: str) -> bool:
        return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module

    if any(meets(target) for target in config["ignore"]):
        return None
    groups = config["config_groups"].values()
    named = [group["format"] for group in groups if any(meets(target) for target in group["targets"])]
    return next(iter(named), next((g["format"] for g in groups if "Linear" in g["targets"]), None))


@pytest.mark.parametrize("name", ["fp8", "mixed"])
def test_targets_and_ignore_say_what_the_tensors_say(name: str):
    config, found = quantization(written(name)), tensors(written(name))
    for tensor in found:
        module, _, part = tensor.rpartition(".")
        if part in ("weight", "weight_packed") and re.fullmatch(r".*(proj|projection|linear)", module):
            kind = FORMATS.get(found[tensor].dtype)
            assert matched(module, config) == kind, module
            if kind:  # vLLM renames
                assert matched(module.replace("model.decoder.", "model."), config) == kind, module
    assert config["format"] == {"fp8": "float-quantized", "mixed": "mixed-precision"}[name]
    moe = "model.layers.2.moe.experts.routed_experts.0.gate_proj"  # as vLLM asks for a bank
    assert matched(moe, config) == {"fp8": "float-quantized", "mixed": "nvfp4-pack-quantized"}[name]


def test_layers_of_different_formats_are_named_one_by_one(tmp_path: Path):
    overrides = (
        recipes.Override(Encoding("fp8"), layers=(1,), roles=("experts",)),
        recipes.Override(dense(), layers=(2,), roles=("experts", "attention")),
        recipes.Override(dense(), layers=(3,), roles=("mlp",)),
    )
    folder = convert(source(), tmp_path / "out", replace(MIXED, overrides=overrides))
    config = quantization(folder)
    assert matched("model.decoder.layers.1.experts.7.up_proj", config) == "float-quantized"
    assert matched("model.decoder.layers.0.experts.7.up_proj", config) == "nvfp4-pack-quantized"
    assert matched("model.decoder.layers.2.experts.7.up_proj", config) is None
    assert matched("model.decoder.layers.2.self_attn.q_proj", config) is None
    assert matched("model.decoder.layers.3.mlp.up_proj", config) is None
    assert matched("model.decoder.layers.4.mlp.up_proj", config) == "float-quantized"
    assert open_checkpoint(folder).format == "compressed-tensors"


@pytest.mark.parametrize("kind", ["ct-fp8", "ct-mixed", "modelopt-nvfp4", "modelopt-fp8"])
def test_what_is_stored_so_already_is_carried_over(kind: str, tmp_path: Path):
    """Codes and scales bit for bit; a global scale within the one rounding of its reciprocal."""
    folder = convert(f.foreign(kind), tmp_path / "out")
    one, other = open_checkpoint(f.foreign(kind)), open_checkpoint(folder)
    for name in one.table:
        a, b = one.encoded(name), other.encoded(name)
        assert a.encoding == b.encoding, name
        for part, array in a.parts.items():
            if part == "global_scale":
                np.testing.assert_allclose(b.parts[part], array, rtol=1.2e-7)
            else:
                assert b.parts[part].tobytes() == array.tobytes(), (name, part)


def test_ct_to_ct_keeps_even_the_divisors(tmp_path: Path):
    same_numbers(f.foreign("ct-mixed"), convert(f.foreign("ct-mixed"), tmp_path / "out"))


def test_formats_that_it_has_not_are_written_dense(tmp_path: Path):
    """Affine, MX and nvfp4 outside of experts: vLLM would want one global scale for modules that have two."""
    target, rows = CompressedTensors(), open_checkpoint(source()).table
    nvfp4 = Encoding("nvfp4", bits=4, group_size=16, global_scale=True)
    assert target.holds(rows[f"{LAYER}.experts.down_proj"], nvfp4)
    assert not target.holds(rows[f"{LAYER}.experts.down_proj"], replace(nvfp4, global_scale=False))
    assert not target.holds(rows[f"{LAYER}.mlp.up_proj.weight"], nvfp4)
    for encoding in (Encoding("affine", bits=4, group_size=64), Encoding("fp8", "float32", block=128)):
        assert not target.holds(rows[f"{LAYER}.mlp.up_proj.weight"], encoding)
    for name in (f"{LAYER}.router.proj.weight", "model.decoder.self_conditioning.up_proj.weight"):
        assert not target.holds(rows[name], Encoding("fp8"))


def test_mlx_nvfp4_goes_to_compressed_tensors_and_back(tmp_path: Path):
    """Without a global scale it is one; with one it is kept."""
    for kind in ("nvfp4", "nvfp4+global"):
        there = convert(quantized(kind), tmp_path / kind / "ct")
        back = convert(there, tmp_path / kind / "mlx", target=MLX())
        one, other = open_checkpoint(quantized(kind)), open_checkpoint(back)
        for name in (f"{LAYER}.experts.gate_up_proj", f"{LAYER}.experts.down_proj"):
            np.testing.assert_allclose(other.read(name), one.read(name), rtol=2.5e-7)


def test_rows_with_global_scales_of_their_own_are_refused(tmp_path: Path):
    folder = shutil.copytree(quantized("nvfp4+global"), tmp_path / "source")
    scales = {f"{LAYER}.experts.down_proj.weight_scale_2": torch.rand(8, 128)}
    f.save(folder, load_file(folder / "model.safetensors") | scales)
    with pytest.raises(CheckpointError, match=r"experts\.\d\.down_proj has more than one global scale") as error:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_divisor_is_the_one_whose_reciprocal_is_the_factor():
    factor = np.random.default_rng(0).uniform(1e-6, 1, 10_000).astype(np.float32)
    back = np.float32(1) / reciprocal(factor)
    assert np.abs(back.view(np.int32) - factor.view(np.int32)).max() <= 1
    divisors = np.random.default_rng(1).uniform(1, 1e6, 10_000).astype(np.float32)
    assert np.array_equal(np.float32(1) / reciprocal(np.float32(1) / divisors), np.float32(1) / divisors)
