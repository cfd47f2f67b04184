"""transformers' fine-grained FP8: partial blocks, fused and unfused experts, one scale per matrix."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.formats.encoding import Encoding
from tests.formats import foreign as f
from tests.formats.foreign import Kind, altered, dequantized, describe, foreign, refused, same, write

BANK = "model.decoder.layers.2.experts"
DOWN = "model.decoder.layers.2.mlp.down_proj"  # [128, 192]
ALIGNED = f.SHAPE | {"moe_intermediate_size": 128}
Tensors = dict[str, Tensor]


def test_codes_and_scales_are_those_of_the_file():
    read, tensors = open_checkpoint(foreign("fp8-block")), load_file(foreign("fp8-block") / "model.safetensors")
    for bank, grid in (("gate_up_proj", (8, 3, 1)), ("down_proj", (8, 1, 2))):
        encoded = read.encoded(f"{BANK}.{bank}")
        assert encoded.encoding == Encoding("fp8", "float32", block=128)
        assert encoded.parts["weight"].tobytes() == tensors[f"{BANK}.{bank}"].view(torch.uint8).numpy().tobytes()
        assert encoded.parts["scales"].shape == grid
        assert np.array_equal(encoded.parts["scales"], tensors[f"{BANK}.{bank}_scale_inv"].numpy())


def test_rows_of_a_partial_block():
    """down_proj's transpose does not exist here: mlp.gate_proj [192, 128] has one whole block of rows and a half."""
    name = "model.decoder.layers.2.mlp.gate_proj.weight"
    opened = open_checkpoint(foreign("fp8-block"))
    assert np.array_equal(opened.tensors[name].read(128, 192).decode(), opened.read(name)[128:])


def unfused(shape: dict[str, int], edge: int = 128) -> Kind:
    coder = partial(f.fp8_blocks, edge=edge)
    return Kind({"experts": coder, "mlp": coder}, f.BLOCKS | {"weight_block_size": [edge, edge]}, shape)


@pytest.mark.parametrize(("shape", "edge"), [(ALIGNED, 128), (f.SHAPE, 64), (f.SHAPE, 32)])
def test_experts_apart_are_joined_where_blocks_align(shape: dict[str, int], edge: int, tmp_path: Path):
    folder = write(tmp_path, unfused(shape, edge))
    opened = open_checkpoint(folder / "foreign")
    assert opened.tensors[f"{BANK}.gate_up_proj"].encoding.block == edge
    assert same(folder / "foreign", folder / "plain")


def test_experts_apart_are_refused_where_blocks_do_not_align(tmp_path: Path):
    refused(write(tmp_path, unfused(f.CUT)) / "foreign", "experts.0.gate_proj.weight", "inside a block of 128 rows")


def one_scale(weight: Tensor) -> f.Coded:
    coded = f.fp8_tensor(weight)
    return f.Coded({"weight": coded.parts["weight"], "weight_scale_inv": coded.parts["weight_scale"]}, coded.value)


def test_one_scale_per_matrix(tmp_path: Path):
    config = f.BLOCKS | {"weight_block_size": None}
    folder = write(tmp_path, Kind({"experts": one_scale, "attention": one_scale}, config))
    assert open_checkpoint(folder / "foreign").tensors[f"{BANK}.down_proj"].encoding == Encoding("fp8", "float32")
    assert same(folder / "foreign", folder / "plain")


def test_a_matrix_that_was_left_dense(tmp_path: Path):
    """transformers writes what its blocks do not divide in bfloat16."""
    folder = write(tmp_path, Kind({"attention": f.fp8_blocks}, f.BLOCKS, f.CUT))
    opened = open_checkpoint(folder / "foreign")
    assert not opened.tensors[f"{BANK}.down_proj"].quantized and same(folder / "foreign", folder / "plain")


def test_scales_of_activations_are_not_used(tmp_path: Path):
    scales = {f"{DOWN}.activation_scale": torch.ones(()), f"{BANK}.down_proj_activation_scale": torch.ones(8)}
    folder = altered("fp8-block", tmp_path / "copy", lambda t: t.update(scales))
    assert same(folder, dequantized("fp8-block")) and open_checkpoint(folder).notes == ()


def halve(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight_scale_inv"] = tensors[f"{DOWN}.weight_scale_inv"][:, :1]


def transpose(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight_scale_inv"] = tensors[f"{DOWN}.weight_scale_inv"].T


@pytest.mark.parametrize("change", [halve, transpose])
def test_a_grid_that_does_not_cover_the_matrix(change, tmp_path: Path):
    refused(altered("fp8-block", tmp_path / "copy", change), f"{DOWN}.weight_scale_inv", "(1, 2)")


@pytest.mark.parametrize("size", [[128, 64], [1, 128]])
def test_blocks_that_are_not_square(size: list[int], tmp_path: Path):
    folder = altered("fp8-block", tmp_path / "copy", lambda t: None)
    describe(folder, f.BLOCKS | {"weight_block_size": size})
    refused(folder, "config.json", str(size), "convert from google/diffusiongemma-26B-A4B-it instead")


@pytest.mark.parametrize("size", [128, [128], [0, 0], ["128", "128"], "128x128", [True, True]])
def test_sizes_that_are_none(size: Any, tmp_path: Path):
    folder = altered("fp8-block", tmp_path / "copy", lambda t: None)
    describe(folder, f.BLOCKS | {"weight_block_size": size})
    with pytest.raises(ConfigError, match="weight_block_size") as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_blocks_of_another_size_than_config_says(tmp_path: Path):
    folder = altered("fp8-block", tmp_path / "copy", lambda t: None)
    describe(folder, f.BLOCKS | {"weight_block_size": [64, 64]})
    refused(folder, "scale_inv")
