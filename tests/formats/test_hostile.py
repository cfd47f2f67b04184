"""Files made to harm, and accidents that look like it: a name spelled twice, numbers without end, things that are no
files. Each ends soon, in one short line."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlx_diffgemma import hub
from mlx_diffgemma.errors import CheckpointError, UserError
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.formats.safetensors import open_file
from tests.formats.foreign import (
    BLOCKS,
    FP8,
    INT4,
    altered,
    ct,
    ct_group,
    dequantized,
    describe,
    foreign,
    modelopt,
    same,
)
from tests.formats.quantized import quantized
from tests.formats.saved import copied, written
from tests.tiny import checkpoint

BANK = "model.decoder.layers.2.experts"
UP = f"{BANK}.5.up_proj"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, Tensor]


def refused(folder: Path, *parts: str) -> None:
    before = time.monotonic()
    with pytest.raises((UserError, FileNotFoundError)) as error:
        open_checkpoint(folder)
    message = str(error.value)
    assert time.monotonic() - before < 5 and "\n" not in message and len(message) < 1000, message[:2000]
    assert all(part in message for part in parts), message


def respelled(old: str, new: str) -> Callable[[Tensors], None]:
    """Beside every tensor whose name has ``old``, another of it under ``new``, with other numbers."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if old in n]:
            tensors[name.replace(old, new)] = tensors[name].flip(0).contiguous()

    return change


@pytest.mark.parametrize("other", ["05", "\N{ARABIC-INDIC DIGIT FIVE}", "005"])
def test_an_expert_by_another_spelling_of_its_number(other: str, tmp_path: Path):
    refused(altered("ct-fp8", tmp_path / "copy", respelled(f"{BANK}.5.", f"{BANK}.{other}.")), f"{BANK}.{other}.")


def test_a_bank_with_and_without_its_suffix(tmp_path: Path):
    """mlx-vlm adds ``.weight``; a file with both names has two banks, and only one can be meant."""
    change = respelled(f"{BANK}.down_proj", f"{BANK}.down_proj.weight")
    refused(copied(tmp_path / "copy", change), f"{BANK}.down_proj", "twice")


def test_both_names_that_mlx_had_for_split_banks(tmp_path: Path):
    def split(tensors: Tensors) -> None:
        gate, up = tensors.pop(f"{BANK}.gate_up_proj").chunk(2, 1)
        for middle in ("switch_glu", "switch_mlp"):
            tensors[f"{BANK}.{middle}.gate_proj.weight"] = gate.clone()
            tensors[f"{BANK}.{middle}.up_proj.weight"] = up.clone()

    refused(copied(tmp_path / "copy", split), BANK, "twice")


@pytest.mark.parametrize("digits", [8, 40, 5000])
def test_an_expert_of_many_digits(digits: int, tmp_path: Path):
    name = f"{BANK}.{'9' * digits}.up_proj.weight"
    refused(altered("ct-fp8", tmp_path / "copy", lambda t: t.update({name: torch.ones(1)})), "99999999")


def test_a_twin_of_a_hundred_axes(tmp_path: Path):
    name = "model.encoder.language_model.layers.2.router.per_expert_scale"
    folder = copied(tmp_path / "copy", lambda t: t.update({name: torch.ones(8)}))
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header[name]["shape"] = [8] + [1] * 99
    written(folder / "model.safetensors", header, raw[8 + size :])
    refused(folder, name, "differs")


# ---- config.json


def configured(folder: Path, source: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_experts", "vocab_size", "hidden_size", "num_attention_heads"]
)
@pytest.mark.parametrize("size", [10**9, 10**15, 10**30])
@pytest.mark.parametrize("source", [checkpoint, lambda: foreign("ct-fp8")], ids=["hf", "ct-fp8"])
def test_a_network_without_end(key: str, size: int, source: Callable[[], Path], tmp_path: Path):
    def grow(config: dict[str, Any]) -> None:
        config["text_config"][key] = size
        config["text_config"].pop("layer_types", None)

    refused(configured(tmp_path / "copy", source(), grow))


def test_a_vision_tower_without_end(tmp_path: Path):
    def grow(config: dict[str, Any]) -> None:
        config["vision_config"]["num_hidden_layers"] = 10**9

    refused(configured(tmp_path / "copy", checkpoint(), grow), "num_hidden_layers")


@pytest.mark.parametrize("edge", [10**5, 10**12, 10**30])
def test_blocks_larger_than_any_memory(edge: int, tmp_path: Path):
    """Scales are repeated block by block when they are unpacked."""
    folder = altered("fp8-block", tmp_path / "copy", lambda t: None)
    describe(folder, BLOCKS | {"weight_block_size": [edge, edge]})
    refused(folder, "config.json", "10000")
    folder = altered("ct-fp8", tmp_path / "other", lambda t: None)
    describe(folder, ct(ct_group(["Linear"], "float-quantized", 8, "float", "block", block_structure=[edge, edge])))
    refused(folder, "config.json", "10000")


@pytest.mark.parametrize("text", ["9" * 5000, "0x0", "\N{ARABIC-INDIC DIGIT FIVE}", "a\nb"])
def test_blocks_that_are_no_size(text: str, tmp_path: Path):
    folder = altered("ct-fp8", tmp_path / "copy", lambda t: None)
    weights = FP8["weights"] | {"block_structure": text}
    describe(folder, ct(FP8 | {"weights": weights}))
    refused(folder, "config.json")


@pytest.mark.parametrize("algorithm", [["NVFP4"], {"a": 1}, 3, 3.5, True, "x" * 5000, "a\nb"])
def test_an_algorithm_that_is_no_name(algorithm: object, tmp_path: Path):
    """It is for messages alone: the parts tell how a module is stored."""

    def int4(tensors: Tensors) -> None:
        tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].float()
        del tensors[f"{UP}.weight_scale_2"]

    folder = altered("modelopt-nvfp4", tmp_path / "copy", int4)
    describe(folder, modelopt("NVFP4") | {"quant_algo": algorithm})
    refused(folder, UP)


@pytest.mark.parametrize("name", ["x" * 5000, "a\nb"])
def test_words_that_no_config_has(name: str, tmp_path: Path):
    folder = altered("ct-int4", tmp_path / "copy", lambda t: None)
    describe(folder, ct(INT4 | {"format": name}))
    refused(folder, "config.json")
    refused(configured(tmp_path / "other", checkpoint(), lambda c: c.update(model_type=name)), "model_type")


@pytest.mark.parametrize("bits", [["a"], {}, "4", 4.0, True, 10**400])
def test_widths_that_are_none(bits: object, tmp_path: Path):
    """The number of words in a row says it then, as where config.json names several."""
    folder = altered("ct-int4", tmp_path / "copy", lambda t: None)
    describe(folder, ct(INT4 | {"weights": INT4["weights"] | {"num_bits": bits}}))
    if type(bits) is int:
        refused(folder, "weight_packed")
    else:
        assert same(folder, dequantized("ct-int4"))


@pytest.mark.parametrize("key", ["t_min", "confidence_threshold", "max_new_tokens", "stability_threshold"])
@pytest.mark.parametrize("value", ["9" * 5000, [], {"a": "b" * 5000}, 10**400])
def test_a_generation_config_of_nonsense(key: str, value: object, tmp_path: Path):
    folder = copied(tmp_path / "copy")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    if type(value) is int and key in ("max_new_tokens", "stability_threshold"):
        open_checkpoint(folder)  # larger than ever needed, but a number
    else:
        refused(folder, "generation_config.json", key)


@pytest.mark.parametrize("text", ["x" * 5000, "a\nb"])
def test_a_quantization_of_long_words(text: str, tmp_path: Path):
    for key, value in ((text, {"bits": 7, "group_size": 64}), ("mode", text), ("bits", text)):

        def change(config: dict[str, Any], key: str = key, value: object = value) -> None:
            config["quantization"][key] = value
            config["quantization"][f"{BANK}.down_proj"] = {"bits": text, "group_size": 64}

        refused(configured(tmp_path / f"{len(key)}-{key[:4]!r}", quantized("affine4"), change))


# ---- files


def test_names_without_end(tmp_path: Path):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    long = "x" * 10**6
    for header in ({long: entry}, {long: entry | {"dtype": "F4"}}, f'{{"{long}": 1, "{long}": 2}}'.encode()):
        with pytest.raises(UserError) as error:
            open_file(written(tmp_path / "a.safetensors", header, bytes(16)))
        assert len(str(error.value)) < 1000


def test_a_name_twice_among_very_many(tmp_path: Path):
    """Found in one pass: comparing each with each would take hours."""
    names = ",".join(f'"{i}":0' for i in range(200_000))
    before = time.monotonic()
    with pytest.raises(UserError, match="'199999' is stored twice"):
        open_file(written(tmp_path / "a.safetensors", f'{{{names},"199999":0}}'.encode()))
    assert time.monotonic() - before < 5


def folder_of(path: Path) -> None:
    path.mkdir()


def broken_link(path: Path) -> None:
    path.symlink_to(path.parent / "blobs" / "gone")


NO_FILES = {"a folder": folder_of, "a broken link": broken_link, "a pipe": os.mkfifo}


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("kind", NO_FILES)
def test_weights_that_are_no_file(kind: str, indexed: bool, tmp_path: Path):
    """A cache that was cleaned by hand leaves links that lead nowhere; opening a pipe would wait for ever."""
    folder = copied(tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    NO_FILES[kind](folder / "model.safetensors")
    if indexed:
        (folder / INDEX).write_text('{"weight_map": {"a": "model.safetensors"}}')
    refused(folder, "model.safetensors", "download it again")


@pytest.mark.parametrize(
    "name", ["a\nb.safetensors", "\0.safetensors", "x" * 5000 + ".safetensors", "\ud800.safetensors"]
)
def test_an_index_of_names_that_no_file_has(name: str, tmp_path: Path):
    folder = copied(tmp_path / "copy")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder, INDEX, "weight_map")


@pytest.mark.parametrize("size", ["NaN", "Infinity", "-Infinity", "1e400", "-1", "1" + "0" * 4000, "null", '"5"', "[]"])
def test_an_index_of_a_size_that_is_none(size: str, tmp_path: Path):
    (tmp_path / INDEX).write_text(f'{{"metadata": {{"total_size": {size}}}}}')
    with pytest.raises(CheckpointError, match="total_size") as error:
        hub._total(tmp_path / INDEX)
    assert len(str(error.value)) < 1000


def test_a_split_of_none(tmp_path: Path):
    """The name alone is enough to find the others."""
    folder = copied(tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00000.gguf")
    refused(folder, "0 splits")
    refused(folder / "model-00001-of-00000.gguf", "0 splits")


def test_the_hub_takes_no_other_file(tmp_path: Path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"is a file; .* \.gguf"):
        hub.resolve(str(tmp_path / "weights.bin"), lambda config, size: None)
