"""MLX checkpoints as they are published: tiny imitations of every repository that differs from mlx-vlm's own layout.

The numbers must be those of the checkpoint that each is made from.
"""

from __future__ import annotations

import json
import resource
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlx_diffgemma.errors import CheckpointError, ConfigError
from mlx_diffgemma.formats import open_checkpoint
from tests.formats.foreign import foreign
from tests.formats.quantized import quantized

LAYER = "model.decoder.layers.2"
PROJECTOR = "model.encoder.embed_vision.embedding_projection"
INDEX = "model.safetensors.index.json"
Tensors, Config = dict[str, Tensor], dict[str, Any]


def made(
    folder: Path,
    kind: str,
    tensors: Callable[[Tensors], object] = lambda t: None,
    config: Callable[[Config], object] = lambda c: None,
) -> Path:
    """``quantized(kind)`` in ``folder``, changed in place by both."""
    shutil.copytree(quantized(kind), folder)
    arrays, described = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    tensors(arrays)
    config(described)
    save_file({name: array.contiguous() for name, array in arrays.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def same_text(folder: Path, kind: str) -> bool:
    opened, source = open_checkpoint(folder), open_checkpoint(quantized(kind))
    text = [name for name, row in source.table.items() if row.role not in ("vision", "projector")]
    assert set(text) <= set(opened.table)
    return all(np.array_equal(opened.read(name), source.read(name)) for name in text)


def without_vision(tensors: Tensors) -> None:
    for name in [n for n in tensors if "vision" in n]:
        del tensors[name]


@pytest.mark.parametrize("vision", ["kept", None, {}, "gone"], ids=str)
@pytest.mark.parametrize("orphans", [False, True])
def test_text_only(vision: object, orphans: bool, tmp_path: Path):
    """avneetsb's oQ: no tower, three quantized tensors of the projector left behind, vision_config taken out."""

    def cut(tensors: Tensors) -> None:
        kept = tensors[f"{PROJECTOR}.weight"]
        without_vision(tensors)
        if orphans:
            columns = np.random.default_rng(0).normal(size=(len(kept), 64)).astype(np.float32)
            packed = mx.quantize(mx.array(columns), group_size=64, bits=4)
            parts = zip(("weight", "scales", "biases"), packed, strict=True)
            tensors.update({f"{PROJECTOR}.{part}": torch.from_numpy(np.array(array)) for part, array in parts})

    def describe(config: Config) -> None:
        if vision == "gone":
            del config["vision_config"]
        elif vision != "kept":
            config["vision_config"] = vision
        if orphans and vision == "kept":
            config["vision_config"]["hidden_size"] = 64

    opened = open_checkpoint(made(tmp_path / "copy", "affine4", cut, describe))
    assert opened.config.vision is None and same_text(tmp_path / "copy", "affine4")
    assert any("not used" in note and PROJECTOR in note for note in opened.notes) == orphans or vision == "kept"


def split(middle: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            module, _, part = name.rpartition(".")
            experts, _, which = module.rpartition(".")
            array = tensors.pop(name)
            halves = {"gate_proj": 0, "up_proj": 1} if which == "gate_up_proj" else {"down_proj": 0}
            for half, array_of in zip(halves, array.chunk(len(halves), 1), strict=True):
                tensors[f"{experts}.{middle}.{half}.{part}"] = array_of.clone()

    return change


@pytest.mark.parametrize("middle", ["switch_glu", "switch_mlp"])
@pytest.mark.parametrize("kind", ["affine4", "mxfp4", "mixed"])
def test_banks_that_were_split(middle: str, kind: str, tmp_path: Path):
    """Before mlx-vlm 0.6: gate and up apart, each with the exceptions under its own name."""

    def rename(config: Config) -> None:
        block = config["quantization"]
        for name in [n for n in block if ".experts." in n]:
            row, (experts, _, which) = block.pop(name), name.rpartition(".")
            for half in ("gate_proj", "up_proj") if which == "gate_up_proj" else (which,):
                block[f"{experts}.{middle}.{half}"] = row
        config["quantization_config"] = block

    folder = made(tmp_path / "copy", kind, split(middle), rename)
    if kind == "mixed":
        assert any(middle in name for name in json.loads((folder / "config.json").read_text())["quantization"])
    assert same_text(folder, kind)


def test_a_split_bank_of_which_half_is_gone(tmp_path: Path):
    def lose(tensors: Tensors) -> None:
        split("switch_glu")(tensors)
        for name in [n for n in tensors if n.startswith(f"{LAYER}.experts.switch_glu.up_proj")]:
            del tensors[name]

    with pytest.raises(CheckpointError, match="lacks gate or up"):
        open_checkpoint(made(tmp_path / "copy", "affine4", lose))


def test_what_was_skipped_and_other_settings_may_be_listed(tmp_path: Path):
    """OsaurusAI's: the modules left in float16, and objects that are no modules at all."""

    def describe(config: Config) -> None:
        config["weight_format"] = "mxfp4"
        for name in (f"{LAYER}.input_layernorm", PROJECTOR, "model.encoder.vision_tower"):
            config["quantization"][name] = {"skip": True, "bits": 16}
        config["quantization"]["selective_passthrough"] = {"preserve_attention_fp16": True, "preserve_first_layers": 0}
        config["quantization"] |= {"method": "mxfp4", "tier_bits": {"attention": 8}, "empty": {}, "mtp": "none"}

    assert same_text(made(tmp_path / "copy", "mxfp4", config=describe), "mxfp4")


def test_an_exception_that_is_used_must_be_right(tmp_path: Path):
    def describe(config: Config) -> None:
        config["quantization"][f"{LAYER}.self_attn.q_proj"] = {"bits": 16}

    with pytest.raises(ConfigError, match=r"self_attn\.q_proj.*bits=16"):
        open_checkpoint(made(tmp_path / "copy", "affine4", config=describe))


def test_an_exception_may_leave_out_what_mlx_has_a_default_for(tmp_path: Path):
    def describe(config: Config) -> None:
        for row in config["quantization"].values():
            if isinstance(row, dict):
                del row["group_size"]

    assert same_text(made(tmp_path / "copy", "mxfp4", config=describe), "mxfp4")


def test_mlp_and_router_in_another_mode_and_the_rest_in_float16(tmp_path: Path):
    """OsaurusAI's MXFP4: experts and attention mxfp4, dense MLP and router mxfp8, all else float16."""
    modes = {"experts": "mxfp4", "self_attn": "mxfp4", "mlp": "mxfp8", "router": "mxfp8"}

    def recode(tensors: Tensors) -> None:
        source = open_checkpoint(quantized("affine8"))
        for name in [n for n in tensors if "vision" not in n]:
            del tensors[name]
        for name, row in source.table.items():
            if row.role in ("vision", "projector"):
                continue
            values, mode = mx.array(source.read(name).astype(np.float32)), mode_of(name, row.shape)
            module = name.removesuffix(".weight")
            if mode:
                packed = zip(("weight", "scales"), mx.quantize(values, mode=mode), strict=True)
                tensors.update({f"{module}.{part}": torch.from_numpy(np.array(array)) for part, array in packed})
            else:
                tensors[name] = torch.from_numpy(np.array(values)).half()

    def mode_of(name: str, shape: tuple[int, ...]) -> str:
        found = next((modes[part] for part in name.split(".") if part in modes), "")
        return found if len(shape) > 1 and shape[-1] % 32 == 0 else ""

    def describe(config: Config) -> None:
        block: Config = {"mode": "mxfp4", "bits": 4, "group_size": 32}
        for name, row in open_checkpoint(quantized("affine8")).table.items():
            if mode_of(name, row.shape) == "mxfp8":
                block[name.removesuffix(".weight")] = {"mode": "mxfp8", "bits": 8, "group_size": 32}
        config |= {"quantization": block, "quantization_config": block, "weight_format": "mxfp4", "dtype": "float16"}

    opened = open_checkpoint(made(tmp_path / "copy", "affine8", recode, describe))
    found = {name.removeprefix(f"{LAYER}."): str(stored.encoding) for name, stored in opened.tensors.items()}
    assert (found["self_attn.q_proj.weight"], found["experts.gate_up_proj"]) == ("mxfp4", "mxfp4")
    assert (found["mlp.up_proj.weight"], found["router.proj.weight"]) == ("mxfp8", "mxfp8")
    assert found["model.decoder.embed_tokens.weight"] == "float16" and opened.dtype == "bfloat16"


def test_a_vision_tower_in_a_folder_beside(tmp_path: Path):
    """OptiQ: the index may name the tower, which only its own loader reads."""
    tower: Tensors = {}

    def cut(tensors: Tensors) -> None:
        tower.update({name: array for name, array in tensors.items() if "vision" in name})
        without_vision(tensors)

    folder = made(tmp_path / "copy", "mixed", cut)
    (folder / "optiq").mkdir()
    save_file(tower, folder / "optiq" / "optiq_vision.safetensors")
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    names |= dict.fromkeys(tower, "optiq/optiq_vision.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    opened = open_checkpoint(folder)
    assert opened.config.vision is None and "text only" in opened.notes[0] and same_text(folder, "mixed")


@pytest.mark.parametrize("kind", ["ct-fp8", "ct-nvfp4", "ct-int4", "modelopt-nvfp4"])
def test_banks_of_experts_need_few_open_files(kind: str, tmp_path: Path):
    """A view of a file holds it open, and a process on macOS may have 256 files."""
    opened, expected = open_checkpoint(foreign(kind)), open_checkpoint(foreign(kind))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(list(Path("/dev/fd").iterdir()))
    for name in (f"{LAYER}.experts.down_proj", f"{LAYER}.experts.gate_up_proj"):
        values = expected.read(name)
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 8, hard))  # 8 experts of 2 or 3 parts each
        try:
            assert np.array_equal(opened.read(name), values)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_bank_is_put_together_without_a_second_copy():
    """Gate and up of one expert at a time: at 26B a bank has half a gigabyte."""
    stored = open_checkpoint(foreign("ct-fp8")).tensors[f"{LAYER}.experts.gate_up_proj"]
    size = stored.encoding.nbytes(stored.shape)
    stored.read()
    tracemalloc.start()
    kept = stored.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size <= peak < 1.4 * size and kept.shape == stored.shape
