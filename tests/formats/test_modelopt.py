"""ModelOpt: nvidia's NVFP4 byte for byte, FP8, where its config is, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.formats.encoding import Encoding
from mlx_diffgemma.tensors import tensor_table
from tests.formats import foreign as f
from tests.formats.foreign import Kind, altered, dequantized, describe, foreign, hollow, modelopt, refused, same, write

BANK = "model.decoder.layers.2.experts"
UP = f"{BANK}.5.up_proj"
FIXTURE = Path(__file__).parents[2] / "mlx_diffgemma" / "fixtures" / "diffusiongemma-26B-A4B-it.json"
Tensors = dict[str, Tensor]


def test_nvfp4_keeps_every_byte_and_has_a_global_scale_per_row():
    read, tensors = (
        open_checkpoint(foreign("modelopt-nvfp4")),
        load_file(foreign("modelopt-nvfp4") / "model.safetensors"),
    )
    for bank, halves in ((f"{BANK}.gate_up_proj", ("gate", "up")), (f"{BANK}.down_proj", ("down",))):
        encoded = read.encoded(bank)
        assert encoded.encoding == Encoding("nvfp4", bits=4, group_size=16, global_scale=True)
        for e in range(8):
            parts = {
                kind: torch.cat(
                    [tensors[f"{BANK}.{e}.{half}_proj.{name}"].reshape(-1).view(torch.uint8) for half in halves]
                )
                for kind, name in (("weight", "weight"), ("scales", "weight_scale"))
            }
            for kind, values in parts.items():
                assert encoded.parts[kind][e].tobytes() == values.numpy().tobytes()
            scales = [float(tensors[f"{BANK}.{e}.{half}_proj.weight_scale_2"]) for half in halves]
            rows = encoded.parts["global_scale"][e]
            assert np.array_equal(rows, np.repeat(np.float32(scales), len(rows) // len(halves)))
            assert len(set(scales)) == len(halves)


def test_fp8_repeats_a_tensors_scale_for_its_rows():
    encoded = open_checkpoint(foreign("modelopt-fp8")).encoded(f"{BANK}.gate_up_proj")
    assert encoded.encoding == Encoding("fp8", "float32")
    scales = encoded.parts["scales"][..., 0]  # [8, 128], gate and up with one scale each
    assert all(len(set(half)) == 1 for row in scales for half in np.split(row, 2)) and len(set(scales.flat)) == 16


VARIANTS = {
    "fp8 with one axis": (partial(f.fp8_tensor, shape=(1,)), Encoding("fp8", "float32")),
    "fp8 per channel": (partial(f.fp8_channel, dtype=torch.float32, flat=True), Encoding("fp8", "float32")),
    "mxfp8": (f.mxfp8_ct, Encoding("mxfp8", bits=8, group_size=32)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_read_exactly(variant: str, tmp_path: Path):
    coder, encoding = VARIANTS[variant]
    folder = write(tmp_path, Kind({"experts": coder, "mlp": coder}, modelopt("FP8")))
    assert open_checkpoint(folder / "foreign").tensors[f"{BANK}.gate_up_proj"].encoding == encoding
    assert same(folder / "foreign", folder / "plain")


def test_the_config_may_lie_in_a_file_of_its_own(tmp_path: Path):
    folder = altered("modelopt-nvfp4", tmp_path / "copy", lambda t: None)
    describe(folder, None)
    aside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (folder / "hf_quant_config.json").write_text(json.dumps(aside))
    assert open_checkpoint(folder).format == "ModelOpt" and same(folder, dequantized("modelopt-nvfp4"))


def test_the_config_may_be_the_text_models(tmp_path: Path):
    folder = altered("modelopt-nvfp4", tmp_path / "copy", lambda t: None)
    describe(folder, None)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = modelopt("NVFP4")
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).format == "ModelOpt" and same(folder, dequantized("modelopt-nvfp4"))


def test_the_config_may_leave_its_method_out(tmp_path: Path):
    folder = altered("modelopt-nvfp4", tmp_path / "copy", lambda t: None)
    describe(folder, {"quant_algo": "NVFP4"})
    assert open_checkpoint(folder).format == "ModelOpt"


def test_without_any_config_the_experts_are_not_guessed(tmp_path: Path):
    folder = altered("modelopt-nvfp4", tmp_path / "copy", lambda t: None)
    describe(folder, None)
    refused(folder, "experts")


def awq(tensors: Tensors) -> None:
    tensors[f"{UP}.pre_quant_scale"] = torch.ones(128)


def int4(tensors: Tensors) -> None:
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].float()
    del tensors[f"{UP}.weight_scale_2"]


@pytest.mark.parametrize(("change", "parts"), [(awq, ("pre_quant_scale", "AWQ")), (int4, ("uint8", "NVFP4"))])
def test_what_is_not_read_is_refused_by_name(change, parts: tuple[str, ...], tmp_path: Path):
    folder = altered("modelopt-nvfp4", tmp_path / "copy", change)
    refused(folder, UP, *parts, "convert from google/diffusiongemma-26B-A4B-it instead")


def test_the_published_checkpoint_opens(tmp_path: Path):
    """nvidia's NVFP4: 47,067 tensors of 18,818,050,776 bytes, the scales of activations among them."""
    config = json.loads(FIXTURE.read_text())
    config = config.get("config", config) | {"quantization_config": modelopt("NVFP4")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, row in tensor_table(ModelConfig.from_dict(config)).items():
        if row.role != "experts":
            rows[name] = ("BF16", row.shape)
            continue
        base, _, which = name.rpartition(".")
        halves = ("gate_proj", "up_proj") if which == "gate_up_proj" else (which,)
        experts, out, size = row.shape
        for module in (f"{base}.{e}.{half}" for e in range(experts) for half in halves):
            rows[f"{module}.weight"] = ("U8", (out // len(halves), size // 2))
            rows[f"{module}.weight_scale"] = ("F8_E4M3", (out // len(halves), size // 16))
            rows |= {f"{module}.{part}": ("F32", ()) for part in ("weight_scale_2", "input_scale")}
    hollow(tmp_path / "model.safetensors", rows)
    assert len(rows) == 47_067
    assert open_checkpoint(tmp_path).nbytes == 18_818_050_776 - 4 * 11_520
