"""What holds of every foreign format: the numbers are those of its own formulas, and nothing odd is let in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlx_diffgemma.formats import open_checkpoint
from tests.formats.foreign import KINDS, altered, dequantized, describe, foreign, refused, same

LAYER = "model.decoder.layers.2"
NORM = f"{LAYER}.input_layernorm.weight"
ADVICE = ("input_scale", "input_global_scale", "weight_shape")  # parts that reading does not need
PER_EXPERT = [kind for kind in KINDS if not KINDS[kind].fused]
Tensors = dict[str, Tensor]

each_kind = pytest.mark.parametrize("kind", KINDS)


def parts(tensors: Tensors) -> Iterator[str]:
    """The tensors of one quantized module; of an expert where experts are quantized apart."""
    module = f"{LAYER}.experts.5.up_proj." if f"{LAYER}.experts.5.up_proj.weight_scale" in tensors else ""
    module = module or f"{LAYER}.experts.down_proj"
    yield from (name for name in tensors if name.startswith(module) and not name.endswith(ADVICE))


def encoder_name(name: str) -> str:
    return name.replace("model.decoder", "model.encoder.language_model")


@each_kind
def test_numbers_are_those_of_the_formats_own_formula(kind: str):
    opened = open_checkpoint(foreign(kind))
    assert opened.quantized and opened.dtype == "bfloat16" and opened.notes == ()
    assert same(foreign(kind), dequantized(kind))


@each_kind
def test_a_range_of_rows_is_that_range_of_the_whole(kind: str):
    """Converters and backends read banks expert by expert, and matrices some rows at a time."""
    opened = open_checkpoint(foreign(kind))
    for name, stored in opened.tensors.items():
        rows, edge = stored.shape[0], stored.encoding.block if len(stored.shape) == 2 else 0
        start, stop = (edge, rows) if edge else (rows // 3, rows - 1)
        if start < stop:
            assert np.array_equal(stored.read(start, stop).decode(), opened.read(name)[start:stop]), name


@each_kind
def test_parts_are_as_the_encoding_says(kind: str):
    for name, stored in open_checkpoint(foreign(kind)).tensors.items():
        read = stored.read()
        found = {part: (array.shape, array.dtype) for part, array in read.parts.items()}
        assert read.encoding == stored.encoding and read.shape == stored.shape
        assert found == stored.encoding.parts(stored.shape), name


@each_kind
def test_opening_reads_no_weights(kind: str, monkeypatch: pytest.MonkeyPatch):
    folder = foreign(kind)
    monkeypatch.setattr(np, "memmap", lambda *_, **__: pytest.fail("a weight was read"))
    open_checkpoint(folder)


@each_kind
def test_bytes_are_those_of_the_file(kind: str):
    """All of them, but scales of activations."""
    tensors = load_file(foreign(kind) / "model.safetensors")
    counted = sum(t.nbytes for name, t in tensors.items() if not name.endswith(ADVICE))
    assert open_checkpoint(foreign(kind)).nbytes == counted


@each_kind
def test_a_module_that_lacks_a_part(kind: str, tmp_path: Path):
    names = list(parts(load_file(foreign(kind) / "model.safetensors")))
    assert len(names) > 1
    for index, name in enumerate(names):
        refused(altered(kind, tmp_path / str(index), lambda t, name=name: t.pop(name)), name.rpartition(".")[0])


@each_kind
def test_a_part_of_another_shape(kind: str, tmp_path: Path):
    names = [n for n in parts(load_file(foreign(kind) / "model.safetensors")) if not n.endswith(("_2", "global_scale"))]
    for index, name in enumerate(names):

        def shorten(tensors: Tensors, name: str = name) -> None:
            tensors[name] = torch.cat([tensors[name].view(torch.uint8)] * 3).view(tensors[name].dtype)

        if load_file(foreign(kind) / "model.safetensors")[name].ndim:
            refused(altered(kind, tmp_path / str(index), shorten), name, "model.safetensors", "shape")


@each_kind
def test_a_part_of_another_dtype(kind: str, tmp_path: Path):
    for index, name in enumerate(parts(load_file(foreign(kind) / "model.safetensors"))):

        def retype(tensors: Tensors, name: str = name) -> None:
            tensors[name] = tensors[name].to(torch.int16)

        refused(altered(kind, tmp_path / str(index), retype), name, "int16")


@pytest.mark.parametrize("kind", PER_EXPERT)
def test_an_expert_is_missing(kind: str, tmp_path: Path):
    def lose(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{LAYER}.experts.5.")]:
            del tensors[name]

    refused(altered(kind, tmp_path / "copy", lose), f"{LAYER}.experts", "lacks expert 5")


@pytest.mark.parametrize("kind", PER_EXPERT)
def test_an_expert_too_many(kind: str, tmp_path: Path):
    def add(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{LAYER}.experts.5.")]:
            tensors[name.replace("experts.5", "experts.8")] = tensors[name].clone()

    refused(altered(kind, tmp_path / "copy", add), f"{LAYER}.experts", "more than 8 experts")


@each_kind
@pytest.mark.parametrize("name", [f"{LAYER}.experts.5.gate_proj.zeal", "model.decoder.layers.6.layer_scalar"])
def test_a_tensor_that_the_model_has_not(kind: str, name: str, tmp_path: Path):
    refused(altered(kind, tmp_path / "copy", lambda t: t.update({name: torch.ones(1)})), name)


@each_kind
def test_a_tensor_in_two_files(kind: str, tmp_path: Path):
    name = next(parts(load_file(foreign(kind) / "model.safetensors")))
    folder = shutil.copytree(foreign(kind), tmp_path / "copy")
    save_file({name: load_file(folder / "model.safetensors")[name]}, folder / "more.safetensors")
    refused(folder, name, "twice", "more.safetensors")


@each_kind
def test_weights_under_the_encoders_names(kind: str, tmp_path: Path):
    """Some exporters keep the other side of a tie: ModelOpt's canonical naming."""

    def rename(tensors: Tensors) -> None:
        for name in [n for n in tensors if "model.decoder." in n and "scalar" not in n and "conditioning" not in n]:
            tensors[encoder_name(name)] = tensors.pop(name)

    assert same(altered(kind, tmp_path / "copy", rename), dequantized(kind))


@each_kind
def test_both_names_of_a_tie(kind: str, tmp_path: Path):
    """Equal is fine; a difference in any part of the module is not."""

    def double(tensors: Tensors) -> None:
        for name in [n for n in tensors if f"{LAYER}.experts" in n]:
            tensors[encoder_name(name)] = tensors[name].clone()

    assert same(altered(kind, tmp_path / "equal", double), dequantized(kind))
    for index, name in enumerate(parts(load_file(foreign(kind) / "model.safetensors"))):

        def differ(tensors: Tensors, name: str = name) -> None:
            double(tensors)
            tensors[encoder_name(name)].reshape(-1).view(torch.uint8)[0] ^= 1

        refused(altered(kind, tmp_path / str(index), differ), encoder_name(name), "differs")


@each_kind
def test_a_file_of_dense_weights_though_config_says_otherwise(kind: str, tmp_path: Path):
    """Ignore lists are advice: a module without scales is dense, whatever config.json says of it."""
    folder = shutil.copytree(dequantized(kind), tmp_path / "copy")
    describe(folder, KINDS[kind].config)
    opened = open_checkpoint(folder)
    assert not opened.quantized and same(folder, dequantized(kind))


@each_kind
def test_a_norm_is_never_quantized(kind: str, tmp_path: Path):
    scale = "weight_scale_inv" if kind == "fp8-block" else "weight_scale"

    def quantize(tensors: Tensors) -> None:
        tensors[NORM] = tensors[NORM].to(torch.float8_e4m3fn)
        tensors[NORM.removesuffix("weight") + scale] = torch.ones(1)

    refused(altered(kind, tmp_path / "copy", quantize), NORM)


@each_kind
def test_a_file_without_vision_is_text_only(kind: str, tmp_path: Path):
    def cut(tensors: Tensors) -> None:
        for name in [n for n in tensors if "vision" in n]:
            del tensors[name]

    opened = open_checkpoint(altered(kind, tmp_path / "copy", cut))
    assert opened.config.vision is None and "text only" in opened.notes[0]


@pytest.mark.parametrize("kind", ["ct-fp8", "modelopt-nvfp4"])
def test_scales_of_the_cache_are_not_used(kind: str, tmp_path: Path):
    names = [f"{LAYER}.self_attn.k_scale", f"{LAYER}.self_attn.k_proj.k_scale", f"{LAYER}.self_attn.v_proj.v_scale"]
    folder = altered(kind, tmp_path / "copy", lambda t: t.update({name: torch.ones(1) for name in names}))
    assert same(folder, dequantized(kind))
    assert open_checkpoint(folder).notes == (f"not used: 1 tensor: {names[0]}",)
