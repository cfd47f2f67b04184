"""A checkpoint folder: exactly the tensors of the table, from one file or many, or one line that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DiffusionGemmaForBlockDiffusion

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.formats import open_checkpoint
from tests.formats.saved import EMBEDDING, ENCODER_SCALAR, SCALAR, Tensors, copied
from tests.tiny import checkpoint

NORM = "model.decoder.norm.weight"
EXPERTS = "model.decoder.layers.3.experts.gate_up_proj"


def encoder_name(name: str) -> str:
    return name.replace("model.decoder", "model.encoder.language_model")


def refused(folder: Path, *parts: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as error:
        open_checkpoint(folder)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


def equal(folder: Path) -> bool:
    """Whether every tensor reads as in the untouched tiny checkpoint."""
    ours, plain = open_checkpoint(folder), open_checkpoint(checkpoint())
    return ours.table == plain.table and all(np.array_equal(ours.read(n), plain.read(n)) for n in plain.table)


def test_tensors_are_what_transformers_saved():
    opened, saved = open_checkpoint(checkpoint()), load_file(checkpoint() / "model.safetensors")
    assert set(opened.tensors) == set(saved)
    assert all(np.array_equal(opened.read(name), tensor.numpy()) for name, tensor in saved.items())
    assert opened.nbytes == sum(tensor.nbytes for tensor in saved.values())
    assert opened.dtype == "float32"


def test_bfloat16_stays_bfloat16_bit_for_bit(tmp_path: Path):
    def halve(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()

    folder = copied(tmp_path / "half", halve)
    opened, saved = open_checkpoint(folder), load_file(folder / "model.safetensors")
    assert opened.dtype == "bfloat16"
    for name, tensor in saved.items():
        assert opened.read(name).dtype == ml_dtypes.bfloat16
        assert opened.read(name).tobytes() == tensor.view(torch.int16).numpy().tobytes()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint()).save_pretrained(folder, max_shard_size="400KB")
    return folder


def shard_copy(shards: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


INDEX = "model.safetensors.index.json"


def test_shards_with_an_index_equal_the_single_file(shards: Path):
    assert len(list(shards.glob("*.safetensors"))) > 2 and (shards / INDEX).is_file()
    assert equal(shards)


def test_a_file_that_the_index_does_not_name_is_left_alone(shards: Path, tmp_path: Path):
    """Repositories hold consolidated copies and adapters beside the shards."""
    folder = shard_copy(shards, tmp_path / "copy")
    save_file({"other": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert equal(folder)


def test_shards_without_an_index_are_all_read(shards: Path, tmp_path: Path):
    folder = shard_copy(shards, tmp_path / "copy")
    (folder / INDEX).unlink()
    assert equal(folder)


def test_an_absent_shard_is_named(shards: Path, tmp_path: Path):
    folder = shard_copy(shards, tmp_path / "copy")
    first = sorted(folder.glob("*.safetensors"))[0]
    first.unlink()
    refused(folder, first.name, "download it again", kind=FileNotFoundError)


def test_a_truncated_shard_is_named(shards: Path, tmp_path: Path):
    folder = shard_copy(shards, tmp_path / "copy")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    refused(folder, str(last), "truncated")


def test_a_tensor_in_two_shards(shards: Path, tmp_path: Path):
    """Which of the two would be taken is nobody's guess to make."""
    folder = shard_copy(shards, tmp_path / "copy")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name]}, second)
    refused(folder, name, "twice", first.name, second.name)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": []},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "../../secret.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": "pytorch_model.bin"}},
    ],
    ids=repr,
)
def test_a_hostile_index(index: dict, tmp_path: Path):
    """An index names files in its own folder and nothing else."""
    folder = copied(tmp_path / "copy")
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, INDEX, "weight_map")


def test_an_index_that_names_nothing(tmp_path: Path):
    folder = copied(tmp_path / "copy")
    (folder / INDEX).write_text('{"weight_map": {}}')
    refused(folder, "no .safetensors", kind=FileNotFoundError)


MISTAKES: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "missing": (lambda t: t.pop(EXPERTS), (EXPERTS, "lacks 1 tensor:")),
    "several missing": (lambda t: [t.pop(name) for name in list(t)[:5]], ("lacks 5 tensors:", "and 2 more")),
    "encoder scalar missing": (lambda t: t.pop(ENCODER_SCALAR), (ENCODER_SCALAR,)),
    "extra": (lambda t: t.update({"model.extra.weight": torch.zeros(2)}), ("model.extra.weight",)),
    "misshapen": (lambda t: t.update({NORM: torch.zeros(65)}), (NORM, "(65,)", "(64,)")),
    "transposed": (lambda t: t.update({EMBEDDING: t[EMBEDDING].T}), (EMBEDDING, "(64, 512)", "(512, 64)")),
    "quantized": (lambda t: t.update({NORM: torch.zeros(64, dtype=torch.uint8)}), (NORM, "uint8")),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_tensors_that_are_not_the_models(kind: str, tmp_path: Path):
    """transformers would fill in random numbers and print a warning."""
    change, parts = MISTAKES[kind]
    refused(copied(tmp_path / "copy", change), *parts)


def test_text_weights_under_the_encoders_name_are_the_decoders(tmp_path: Path):
    """Some tools keep the other side of a tie."""

    def rename(tensors: Tensors) -> None:
        tied = [n for n in tensors if "model.decoder." in n and "scalar" not in n and "self_conditioning" not in n]
        for name in tied:
            tensors[encoder_name(name)] = tensors.pop(name)

    folder = copied(tmp_path / "copy", rename)
    names = {part.name for stored in open_checkpoint(folder).tensors.values() for part in stored.parts}
    assert encoder_name(EXPERTS) in names and EXPERTS not in names
    assert equal(folder)


@pytest.mark.parametrize("name", [EMBEDDING, EXPERTS, NORM])
def test_a_tied_pair_may_be_stored_twice_if_equal(name: str, tmp_path: Path):
    assert equal(copied(tmp_path / "copy", lambda t: t.update({encoder_name(name): t[name].clone()})))


def test_a_stored_head_is_the_embedding(tmp_path: Path):
    assert equal(copied(tmp_path / "copy", lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()})))


def test_all_three_names_of_the_embedding_but_its_own(tmp_path: Path):
    """Both stand-ins without the canonical name: they are compared with each other."""

    def rename(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        tensors[encoder_name(EMBEDDING)] = tensors.pop(EMBEDDING)

    assert equal(copied(tmp_path / "same", rename))

    def differ(tensors: Tensors) -> None:
        rename(tensors)
        tensors["lm_head.weight"][0, 0] += 1

    refused(copied(tmp_path / "other", differ), "lm_head.weight", encoder_name(EMBEDDING), "differs")


@pytest.mark.parametrize("name", ["lm_head.weight", encoder_name(EMBEDDING)])
def test_a_tied_pair_that_differs(name: str, tmp_path: Path):
    """An untied fine-tune: dropping either side changes every answer."""
    refused(copied(tmp_path / "copy", lambda t: t.update({name: t[EMBEDDING] + 1})), name, EMBEDDING, "differs")


def test_layer_scalars_are_never_folded(tmp_path: Path):
    """Both sides exist and differ; neither stands in for the other."""
    opened = open_checkpoint(checkpoint())
    assert opened.read(SCALAR) != opened.read(ENCODER_SCALAR)
    refused(copied(tmp_path / "copy", lambda t: t.pop(SCALAR)), SCALAR)


def test_folders_that_hold_no_checkpoint(tmp_path: Path):
    refused(tmp_path / "absent", "absent", kind=FileNotFoundError)
    refused(tmp_path, "config.json", kind=FileNotFoundError)
    (tmp_path / "config.json").write_text((checkpoint() / "config.json").read_text())
    refused(tmp_path, ".safetensors", kind=FileNotFoundError)


def test_opening_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """51 GB must open in the time of their headers; only a tie stored twice is compared."""
    folder = copied(tmp_path / "copy")
    read: list[str] = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda path, *rest, **more: read.append(str(path)) or memmap(path, *rest, **more))
    opened = open_checkpoint(folder)
    assert read == []
    opened.read(NORM)
    assert read == [str(folder / "model.safetensors")]
