"""compressed-tensors: every way of storing a matrix, by its own formula; the ways that are refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.formats.encoding import Encoding
from mlx_diffgemma.tensors import tensor_table
from tests.formats import foreign as f
from tests.formats.foreign import (
    Kind,
    altered,
    ct,
    ct_group,
    describe,
    foreign,
    fp8_blocks,
    hollow,
    refused,
    same,
    write,
)

BANK = "model.decoder.layers.2.experts"
GATE_UP, ALIGNED = f"{BANK}.gate_up_proj", f.SHAPE | {"moe_intermediate_size": 128}
FIXTURE = Path(__file__).parents[2] / "mlx_diffgemma" / "fixtures" / "diffusiongemma-26B-A4B-it.json"


def stacked(kind: str, part: str) -> np.ndarray:
    """The part of every expert's gate, then up, as bytes [8, 2 * rows, ...]."""
    tensors = load_file(foreign(kind) / "model.safetensors")
    rows = [[tensors[f"{BANK}.{e}.{half}_proj.{part}"] for half in ("gate", "up")] for e in range(8)]
    return torch.stack([torch.cat(pair) for pair in rows]).view(torch.uint8).numpy()


def test_nvfp4_keeps_every_byte_and_has_a_global_scale_per_row():
    read = open_checkpoint(foreign("ct-nvfp4")).encoded(GATE_UP)
    assert read.encoding == Encoding("nvfp4", bits=4, group_size=16, global_scale=True)
    assert np.array_equal(read.parts["weight"].view(np.uint8), stacked("ct-nvfp4", "weight_packed"))
    assert np.array_equal(read.parts["scales"], stacked("ct-nvfp4", "weight_scale"))
    divisors = stacked("ct-nvfp4", "weight_global_scale").view(np.float32)  # [8, 2]
    assert np.array_equal(read.parts["global_scale"], np.repeat(np.float32(1) / divisors, 64, axis=1))
    assert all(gate != up for gate, up in divisors)


def test_fp8_keeps_every_byte():
    read = open_checkpoint(foreign("ct-fp8")).encoded(GATE_UP)
    assert read.encoding == Encoding("fp8", "bfloat16")
    assert np.array_equal(read.parts["weight"].view(np.uint8), stacked("ct-fp8", "weight"))
    assert np.array_equal(read.parts["scales"].view(np.uint8), stacked("ct-fp8", "weight_scale"))


def test_int4_keeps_every_word_and_int8_every_code():
    read = open_checkpoint(foreign("ct-int4")).encoded(GATE_UP)
    assert read.encoding == Encoding("affine", "bfloat16", bits=4, group_size=32)
    assert np.array_equal(read.parts["weight"].view(np.uint8), stacked("ct-int4", "weight_packed"))
    assert np.array_equal(read.parts["biases"], read.parts["scales"] * read.parts["scales"].dtype.type(-8))
    read = open_checkpoint(foreign("ct-int8")).encoded(GATE_UP)
    assert read.encoding == Encoding("affine", "bfloat16", bits=8, group_size=128)
    assert np.array_equal(read.parts["weight"].view(np.uint8), stacked("ct-int8", "weight") ^ 128)


def test_formats_are_named_as_in_the_file():
    for kind, name in (("ct-int4", "int4 g32"), ("ct-int8", "int8 per channel"), ("modelopt-fp8", "fp8 per tensor")):
        assert {stored.format for stored in open_checkpoint(foreign(kind)).tensors.values()} == {"bfloat16", name}


def integers(format: str = "pack-quantized", bits: int = 4, **more: Any) -> dict[str, Any]:
    return ct(ct_group(["Linear"], format, bits, "int", "group", **more))


def packed(bits: int = 4, **more: Any) -> Kind:
    coder = partial(f.int_packed, bits=bits, **more)
    return Kind({"experts": coder, "mlp": coder}, integers(bits=bits))


VARIANTS = {  # kind, and the encoding of a bank of experts
    "fp8 of float32 scales": (
        Kind({"experts": partial(f.fp8_channel, dtype=torch.float32)}, ct(f.FP8)),
        Encoding("fp8", "float32"),
    ),
    "fp8 per tensor": (Kind({"experts": partial(f.fp8_tensor, shape=(1,))}, ct(f.FP8)), Encoding("fp8", "float32")),
    "fp8 blocks": (
        Kind(
            {"experts": partial(fp8_blocks, name="weight_scale"), "mlp": partial(fp8_blocks, name="weight_scale")},
            ct(ct_group(["Linear"], "float-quantized", 8, "float", "block", block_structure=[128, 128])),
            ALIGNED,
        ),
        Encoding("fp8", "float32", block=128),
    ),
    "mxfp4": (
        Kind({"experts": f.mxfp4_ct}, ct(ct_group(["Linear"], "mxfp4-pack-quantized", 4, "float", "group"))),
        Encoding("mxfp4", bits=4, group_size=32),
    ),
    "mxfp8": (
        Kind({"experts": f.mxfp8_ct}, ct(ct_group(["Linear"], "mxfp8-quantized", 8, "float", "group"))),
        Encoding("mxfp8", bits=8, group_size=32),
    ),
    "int4 g64": (packed(group=64), Encoding("affine", "bfloat16", 4, 64)),
    "int4 g128 in float16": (
        Kind({"experts": partial(f.int_packed, group=128, dtype=torch.float16)}, integers(), ALIGNED),
        Encoding("affine", "float16", 4, 128),
    ),
    "int4 per channel": (packed(group=0), Encoding("affine", "bfloat16", 4, 128)),
    "int4 g96": (packed(group=96), Encoding("affine", "bfloat16", 4, 32)),
    "int4 asymmetric": (packed(symmetric=False), Encoding("affine", "float32", 4, 32)),
    "int4 asymmetric per channel": (packed(group=0, symmetric=False), Encoding("affine", "float32", 4, 128)),
    "int2": (packed(bits=2), Encoding("affine", "bfloat16", 2, 32)),
    "int8 packed": (packed(bits=8, group=64), Encoding("affine", "bfloat16", 8, 64)),
    "int8 packed asymmetric": (packed(bits=8, symmetric=False), Encoding("affine", "float32", 8, 32)),
}
SHAPES = {"int4 g96": {"hidden_size": 192, "moe_intermediate_size": 96, "intermediate_size": 192}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_read_exactly(variant: str, tmp_path: Path):
    kind, encoding = VARIANTS[variant]
    if variant in SHAPES:
        kind = Kind(kind.coders, kind.config, SHAPES[variant])
    folder = write(tmp_path, kind)
    opened = open_checkpoint(folder / "foreign")
    assert opened.tensors[GATE_UP].encoding == encoding
    assert same(folder / "foreign", folder / "plain")
    for name, stored in opened.tensors.items():
        if stored.quantized and not stored.encoding.block:
            assert np.array_equal(stored.read(3, 7).decode(), opened.read(name)[3:7])


def test_float32_scales_of_integers_are_within_two_roundings(tmp_path: Path):
    """code * scale + bias rounds twice where (code - zero) * scale rounds once."""
    folder = write(tmp_path, packed(dtype=torch.float32))
    ours, theirs = (open_checkpoint(folder / name).read(GATE_UP) for name in ("foreign", "plain"))
    assert np.abs(ours - theirs).max() <= 2 * np.finfo(np.float32).eps * np.abs(theirs).max()


def test_fp8_blocks_that_gate_and_up_share_are_refused(tmp_path: Path):
    """192 rows of gate end in the middle of a block: joined to up there is no square block any more."""
    blocks = ct(ct_group(["Linear"], "float-quantized", 8, "float", "block", block_structure="128x128"))
    folder = write(tmp_path, Kind({"experts": partial(fp8_blocks, name="weight_scale")}, blocks, f.CUT))
    refused(folder / "foreign", "experts.0.gate_proj.weight", "block of 128 rows")


def test_groups_of_16_are_refused(tmp_path: Path):
    refused(write(tmp_path, packed(group=16)) / "foreign", "weight_scale", "multiples of 32", "convert from google/")


def test_an_activation_order_is_refused(tmp_path: Path):
    name = f"{BANK}.5.up_proj.weight_g_idx"
    folder = altered("ct-int4", tmp_path / "copy", lambda t: t.update({name: torch.arange(128)}))
    refused(folder, name, "orders columns by activation", "convert from google/")


def test_an_order_that_only_calibration_used_is_fine(tmp_path: Path):
    folder = altered("ct-int4", tmp_path / "copy", lambda t: None)
    describe(folder, ct(f.INT4 | {"weights": f.INT4["weights"] | {"actorder": "weight"}}))
    assert same(folder, f.dequantized("ct-int4"))


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_packed"])
def test_a_quantization_that_was_not_finished(part: str, tmp_path: Path):
    """Status "frozen": the weight is dense and its scale lies beside it."""

    def thaw(tensors: dict[str, Tensor]) -> None:
        module = f"{BANK}.5.up_proj"
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].bfloat16()
        if part != "weight":
            tensors[f"{module}.{part}"] = tensors.pop(f"{module}.weight_scale")

    refused(altered("ct-fp8", tmp_path / "copy", thaw), f"{BANK}.5.up_proj")


def test_codes_of_another_width_than_config_says(tmp_path: Path):
    folder = altered("ct-int4", tmp_path / "copy", lambda t: None)
    for bits in (8, 3, 7, 16):
        describe(folder, integers(bits=bits))
        refused(folder, "weight_packed")
    describe(folder, ct(f.INT4, f.INT8))
    assert same(folder, f.dequantized("ct-int4"))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "marlin-24"},
        {"format": "sparse-24-bitmask"},
        {"format": "mxfp6-pack-quantized"},
        {"sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}},
        {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
        {"config_groups": {"group_0": f.FP8 | {"weights": f.FP8["weights"] | {"block_structure": [1, 128]}}}},
        {"config_groups": {"group_0": f.FP8 | {"format": ["float-quantized"]}}},
    ],
    ids=lambda change: str(next(iter(change.items())))[:60],
)
def test_what_is_not_read_is_refused_by_name(change: dict[str, Any], tmp_path: Path):
    folder = altered("ct-fp8", tmp_path / "copy", lambda t: None)
    describe(folder, ct(f.FP8) | change)
    refused(folder, "config.json", "convert from google/diffusiongemma-26B-A4B-it instead")


@pytest.mark.parametrize(
    "change", [{"config_groups": [1]}, {"config_groups": {"a": 3}}, {"sparsity_config": "2:4"}, {"config_groups": "x"}]
)
def test_a_config_that_describes_nothing(change: dict[str, Any], tmp_path: Path):
    folder = altered("ct-fp8", tmp_path / "copy", lambda t: None)
    describe(folder, ct(f.FP8) | change)
    with pytest.raises(ConfigError, match=r"config\.json") as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["gptq", "auto-round", "awq", "bitsandbytes", "torchao", "hqq", "new-thing", 3])
def test_other_methods_are_refused_with_what_to_convert_instead(method: object, tmp_path: Path):
    folder = altered("ct-int4", tmp_path / "copy", lambda t: None)
    describe(folder, {"quant_method": method, "bits": 4, "group_size": 32})
    refused(folder, "convert from google/diffusiongemma-26B-A4B-it", "compressed-tensors, ModelOpt, MLX or GGUF")


def test_the_published_fp8_checkpoint_opens(tmp_path: Path):
    """RedHatAI's: 24,232 tensors, of which 11,725 modules are quantized; its file has 27,200,864,632 bytes."""
    config = json.loads(FIXTURE.read_text())
    config = config.get("config", config) | {"quantization_config": ct(f.FP8)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, row in tensor_table(ModelConfig.from_dict(config)).items():
        if row.role not in ("experts", "attention", "mlp") or len(row.shape) < 2:
            rows[name] = ("BF16", row.shape)
            continue
        modules = [name.removesuffix(".weight")]
        if row.role == "experts":
            base, _, which = name.rpartition(".")
            halves = ("gate_proj", "up_proj") if which == "gate_up_proj" else (which,)
            modules = [f"{base}.{e}.{half}" for e in range(row.shape[0]) for half in halves]
        out = int(np.prod(row.shape[:-1])) // len(modules)
        for module in modules:
            rows[f"{module}.weight"] = ("F8_E4M3", (out, row.shape[-1]))
            rows[f"{module}.weight_scale"] = ("BF16", (out, 1))
    hollow(tmp_path / "model.safetensors", rows)
    assert len(rows) == 24_232 and sum(name.endswith("weight_scale") for name in rows) == 11_725
    opened = open_checkpoint(tmp_path)
    assert sum(stored.quantized for stored in opened.tensors.values()) == 60 + 115 + 90
    assert 0 < 27_200_864_632 - opened.nbytes < 4_000_000  # the rest is its header
