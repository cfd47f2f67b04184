"""transformers' own FP8 (quant_method "fp8"): e4m3 weights with one scale for each block of 128 x 128.

Despite its name ``weight_scale_inv`` multiplies. Banks of experts are parameters without ``.weight``, and their scales
are glued to the name: ``gate_up_proj`` and ``gate_up_proj_scale_inv``; some files cut them into one module per expert.
The last blocks of a matrix may be partial. Without ``weight_block_size`` a matrix has one scale. A module without a
scale is dense. Source: transformers 5.23, ``integrations/finegrained_fp8.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, ConfigError
from .assemble import Parts
from .hf import dense_part
from .schemes import E4M3, EDGES, SOURCE, fp8, take
from .stored import Stored

SCALE = "weight_scale_inv"
UNUSED = frozenset({"activation_scale", "weight_activation_scale", "input_scale"})


@dataclass(frozen=True)
class FineGrainedFP8:
    """``block`` is the edge of a block, 0 for one scale per matrix."""

    block: int = 128
    name: str = "fine-grained FP8"
    suffixes: frozenset[str] = UNUSED | {"weight", SCALE, "_scale_inv", "_activation_scale"}
    partial: bool = True

    def stored(self, shape: tuple[int, ...], parts: Parts) -> Stored:
        used = {kind: part for kind, part in parts.items() if kind not in UNUSED} or parts
        if set(used) == {"weight"} and used["weight"].dtype != E4M3:
            return dense_part(shape, used["weight"])
        weight, scale = take(used, "weight", SCALE)
        return fp8(shape, weight, scale, self.block)

    def ignored(self, name: str) -> bool:
        return False


def dialect(method: Mapping[str, Any]) -> FineGrainedFP8:
    """The dialect of one ``quantization_config``.

    Raises:
        CheckpointError: blocks that are not square.
        ConfigError: sizes that are none.
    """
    size = method.get("weight_block_size")
    if size is None:
        return FineGrainedFP8(0)
    if not isinstance(size, list) or len(size) != 2 or not all(type(edge) is int and edge in EDGES for edge in size):
        raise ConfigError(f"config.json: weight_block_size is {size!r:.80}, expected two sizes")
    if size[0] != size[1]:
        raise CheckpointError(
            f"config.json: FP8 in blocks of {size} is not read by this library, only in square ones; "
            f"convert from {SOURCE} instead"
        )
    return FineGrainedFP8(size[0])
