"""The tensor table against what transformers saves, and against the figures of the published checkpoint."""

from __future__ import annotations

from collections import Counter

import pytest
from safetensors import safe_open

from mlx_diffgemma.config import FULL, SLIDING, ModelConfig
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.tensors import item_bytes, tensor_table
from tests.core.test_config import PUBLISHED
from tests.tiny import checkpoint

IRREGULAR = (("num_hidden_layers", 4), ("layer_types", (FULL, SLIDING, SLIDING, FULL)), ("num_key_value_heads", 4))


@pytest.mark.parametrize("shape", [(), IRREGULAR], ids=["regular", "irregular"])
def test_the_table_is_what_transformers_saves(shape: tuple):
    """A name or shape of our own making would refuse every real checkpoint."""
    folder = checkpoint(shape=shape)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    table = tensor_table(ModelConfig.from_folder(folder))
    assert {name: row.shape for name, row in table.items()} == saved


def test_the_published_checkpoint_has_1047_tensors_and_51647562456_bytes():
    table = tensor_table(config := ModelConfig.from_dict(read_json(PUBLISHED)))
    assert len(table) == 1047
    assert item_bytes(config) * sum(row.size for row in table.values()) == 51_647_562_456


def test_the_published_checkpoint_by_role():
    """A role decides how a tensor is quantized; a wrong one shows up only in quality."""
    table = tensor_table(ModelConfig.from_dict(read_json(PUBLISHED)))
    roles = Counter(row.role for row in table.values())
    assert roles == {
        "embedding": 1, "norm": 30 * 9 + 2, "attention": 115, "mlp": 90, "experts": 60, "router": 90,
        "scalar": 60, "self_conditioning": 3, "vision": 355, "projector": 1,
    }  # fmt: skip
    assert sum(2 * row.size for row in table.values() if row.role == "experts") == 2 * 30 * 128 * 3 * 704 * 2816


def test_full_layers_have_no_values_of_their_own():
    table = tensor_table(ModelConfig.from_dict(read_json(PUBLISHED)))
    without = [i for i in range(30) if f"model.decoder.layers.{i}.self_attn.v_proj.weight" not in table]
    assert without == [5, 11, 17, 23, 29]


def test_ties_are_other_names_and_layer_scalars_have_none():
    """A folded layer scalar gives the encoder the decoder's: close, and wrong."""
    table = tensor_table(ModelConfig.from_dict(read_json(PUBLISHED)))
    ties = [tie for row in table.values() for tie in row.ties]
    assert len(ties) == len(set(ties)) and not set(ties) & set(table)
    assert not any(row.ties for row in table.values() if row.role == "scalar")
    assert "lm_head.weight" in table["model.decoder.embed_tokens.weight"].ties
