"""The GPU benchmark's arithmetic and its weights, which need no GPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks import gpu_floor
from benchmarks.gpu_floor import GPUS, PARTS, Load, costs, floors, load_of, published
from benchmarks.gpu_weights import expected_bytes, random_weights
from convert.recipes import RECIPES
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.formats.encoding import Encoded, grouped
from tests.tiny import official_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_dict(official_config(16).to_dict())


# ---- floors


@pytest.mark.parametrize(
    ("card", "precision", "head", "milliseconds"),
    [
        ("H200", "fp8", "bf16", 6.15),
        ("H200", "fp8", "fp8", 5.76),
        ("H200", "bf16", "bf16", 11.3),
        ("H100 SXM", "fp8", "bf16", 8.4),
        ("H100 SXM", "bf16", "bf16", 15.7),
        ("RTX 5090", "fp8", "bf16", 19.3),
    ],
)
def test_floors_are_those_of_the_plan(card: str, precision: str, head: str, milliseconds: float):
    found = floors(load_of(published(), precision, head), GPUS[card])
    assert list(found) == list(PARTS)
    assert sum(found.values()) == pytest.approx(milliseconds, rel=0.005)


def test_the_floor_of_4_bit_is_lower_than_planned_because_the_rest_is_multiplied_in_fp8():
    """The plan's 3.97 ms are of 4.25 bits everywhere, multiplied in bfloat16; the recipe has FP8 beside the experts."""
    four = dataclasses.replace(
        RECIPES["bf16"],
        roles=dict(RECIPES["bf16"].roles) | dict.fromkeys(("experts", "attention", "mlp"), grouped("mxfp4")),
    )
    load = Load(published(), four, gpu_floor.HEADS["fp8"])
    assert sum(floors(load, GPUS["H200"]).values()) == pytest.approx(3.97, abs=0.02)
    assert sum(floors(load_of(published(), "4bit", "fp8"), GPUS["H200"]).values()) == pytest.approx(3.70, abs=0.01)


def test_bytes_and_operations_of_a_step():
    found = costs(load_of(published(), "fp8", "bf16"))
    assert sum(cost.nbytes for cost in found.values()) == pytest.approx(27.72e9, rel=0.003)
    assert sum(cost.bf16 + cost.fp8 for cost in found.values()) == pytest.approx(2.53e12, rel=0.01)
    assert found["attention"].nbytes == 25 * 1023 * 2 * 8 * 256 * 2 + 5 * 1024 * 2 * 2 * 512 * 2
    longer = costs(load_of(published(), "fp8", "bf16", prompt=131_072))["attention"]
    assert longer.bf16 == pytest.approx(5.6e12, rel=0.02)
    many = costs(load_of(published(), "fp8", "bf16", batch=16))
    assert (
        many["experts"].nbytes == pytest.approx(found["experts"].nbytes)
        and many["experts"].fp8 > 3 * found["experts"].fp8
    )


def test_without_fp8_units_codes_are_multiplied_in_bfloat16():
    load = load_of(published(), "fp8", "bf16", batch=16)
    one, other = (floors(load, GPUS[name])["linears"] for name in ("A100 80GB", "H100 SXM"))
    assert one == pytest.approx(1000 * 16 * 0.843e12 / 312e12, rel=0.02) and other < one / 5


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_a_card_is_known_by_its_drivers_name(name: str, row: str | None):
    assert gpu_floor.gpu_named(name) == row


# ---- weights


@pytest.mark.parametrize("precision", gpu_floor.PRECISIONS)
def test_weights_are_those_of_a_checkpoint_in_layout_and_size(config: ModelConfig, precision: str):
    weights = random_weights(config, precision, CPU, fp8=False)  # for activations in FP8, scales become float32
    assert weights.nbytes == expected_bytes(config, precision)
    layer = weights.layers[0]
    for weight, width in (
        (layer.experts.gate_up_proj, 64),
        (layer.experts.down_proj, 32),
        (layer.self_attn.o_proj, 64),
    ):
        if precision != "bf16":
            parts = weight.encoding.parts(weight.shape)
            for name, (shape, dtype) in parts.items():
                assert tuple(weight.parts[name].shape) == shape, name
                assert weight.parts[name].dtype == TORCH[str(dtype)], name
            arrays = {name: as_array(part, parts[name][1]) for name, part in weight.parts.items()}
            decoded = Encoded(weight.encoding, weight.shape, arrays).decode()
            np.testing.assert_array_equal(decoded, weight.dense(torch.float32).numpy())
        values = weight.dense(torch.float32)
        assert values.isfinite().all() and values.std().item() == pytest.approx(width**-0.5, rel=0.15)


TORCH = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "uint32": torch.uint32,
    "uint8": torch.uint8,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


def as_array(part: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    return part.contiguous().view(torch.uint8).numpy().view(dtype).reshape(part.shape)


def test_which_products_are_in_fp8(config: ModelConfig):
    def taken(precision: str, **options: bool) -> list[bool]:
        layer = random_weights(config, precision, CPU, **options).layers[0]
        pair = (layer.experts.gate_up_proj, layer.mlp.gate_up_proj, layer.router.proj)
        return [getattr(weight, "fp8_activations", False) for weight in pair]

    assert taken("fp8") == [True, True, False]
    assert taken("4bit") == [False, True, False]
    assert taken("fp8", fp8=False) == [False] * 3


def test_the_published_model_has_the_sizes_of_its_checkpoints():
    sizes = [expected_bytes(published(), precision) / 1e9 for precision in ("bf16", "fp8", "4bit")]
    assert sizes == pytest.approx([50.5, 26.05, 16.09], abs=0.01)
