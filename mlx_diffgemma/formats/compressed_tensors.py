"""compressed-tensors, the format of llm-compressor and vLLM: RedHatAI's FP8 and NVFP4, int4 and int8 of others.

Names are Hugging Face's, with one module per expert. How a module is stored is told by its parts; config.json's
``ignore`` and ``targets`` are advice for other loaders and are not consulted. Activations are not quantized here, so
their scales are not used. Formulas: compressed-tensors 0.20, ``quantization/lifecycle/forward_helpers.py``.

=====================  ==========================================================================  ================
format                 parts                                                                       read as
=====================  ==========================================================================  ================
float-quantized        weight e4m3; weight_scale [1], [out, 1] or one per block                    fp8
nvfp4-pack-quantized   weight_packed uint8; weight_scale e4m3; weight_global_scale, divides        nvfp4
mxfp4-pack-quantized   weight_packed uint8; weight_scale uint8                                     mxfp4
mxfp8-quantized        weight e4m3; weight_scale uint8                                             mxfp8
pack-quantized         weight_packed int32; weight_scale [out, groups]; weight_zero_point          affine, exact
int-quantized          weight int8; weight_scale [out, 1] or [out, groups]                         affine, exact
=====================  ==========================================================================  ================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, ConfigError
from .assemble import Parts
from .hf import dense_part
from .integers import integers
from .mlx import BITS
from .schemes import E4M3, E8M0, EDGES, I8, I32, SOURCE, U8, expect, fp8, microscaled, nvfp4, refuse, take
from .stored import Part, Stored

FORMATS = {
    "dense",
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
}
WEIGHTS = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape")
ORDER = "weight_g_idx"
UNUSED = frozenset(
    f"{of}_{what}" for of in "input output q k v".split() for what in ("scale", "zero_point", "global_scale")
)


@dataclass(frozen=True)
class CompressedTensors:
    """``block`` is the edge of FP8's blocks, 0 for none; ``bits`` are the widths of integers that config.json names."""

    block: int = 0
    bits: frozenset[int] = frozenset()
    name: str = "compressed-tensors"
    suffixes: frozenset[str] = UNUSED | {*WEIGHTS, ORDER}
    partial: bool = True

    def stored(self, shape: tuple[int, ...], parts: Parts) -> Stored:
        used = {kind: part for kind, part in parts.items() if kind not in UNUSED} or parts
        if set(used) == {"weight"} and used["weight"].dtype not in (E4M3, I8):
            return dense_part(shape, used["weight"])
        if ORDER in used:
            refuse(used[ORDER], "orders columns by activation, which this library does not read")
        if "weight_packed" in used:
            return self._packed(shape, used)
        weight, scale = take(used, "weight", "weight_scale", optional=("weight_zero_point",))
        if weight.dtype == I8:
            expect(weight, shape, I8)
            return integers(shape, weight, scale, used.get("weight_zero_point"), 8)
        take(used, "weight", "weight_scale")
        if weight.dtype != E4M3:
            refuse(weight, f"is {weight.dtype} and has a weight_scale: its quantization was not finished")
        if scale.dtype in (U8, E8M0):
            return microscaled(shape, "mxfp8", weight, scale)
        return fp8(shape, weight, scale, self.block)

    def ignored(self, name: str) -> bool:
        return name.rpartition(".")[2] in UNUSED  # scales of attention and of its cache

    def _packed(self, shape: tuple[int, ...], parts: Parts) -> Stored:
        packed = parts["weight_packed"]
        expect(packed, None, U8, I32)
        if packed.dtype == I32:
            packed, scale = take(parts, "weight_packed", "weight_scale", optional=("weight_zero_point", "weight_shape"))
            bits = self._width(packed, shape)
            return integers(shape, packed, scale, parts.get("weight_zero_point"), bits)
        if "weight_global_scale" in parts:
            packed, scale, divisor = take(parts, "weight_packed", "weight_scale", "weight_global_scale")
            return nvfp4(shape, packed, scale, divisor, divides=True)
        packed, scale = take(parts, "weight_packed", "weight_scale")
        if scale.dtype == E4M3:
            take(parts, "weight_packed", "weight_scale", "weight_global_scale")
        return microscaled(shape, "mxfp4", packed, scale)

    def _width(self, packed: Part, shape: tuple[int, ...]) -> int:
        """Bits of a code: what config.json says, or where it says several, what the number of words in a row says."""
        words = packed.shape[-1] if packed.shape else 0
        bits = min(self.bits) if len(self.bits) == 1 else words * 32 // shape[-1]
        if bits not in BITS or shape[-1] * bits % 32 or (self.bits and bits not in self.bits):
            refuse(packed, f"of shape {packed.shape} packs integers of {bits} bits for {shape}, which is not read")
        expect(packed, (*shape[:-1], shape[-1] * bits // 32), I32)
        return bits


def dialect(method: Mapping[str, Any]) -> CompressedTensors:
    """The dialect of one ``quantization_config``.

    Raises:
        CheckpointError: a format that this library does not read.
        ConfigError: something that is no such description.
    """
    schemes = [_object(_object(method, "config_groups"), name) for name in _object(method, "config_groups")]
    formats = {str(row["format"]) for row in (method, *schemes) if row.get("format")} - FORMATS
    sparsity = _object(method, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        formats.add(f"sparsity {sparsity}")
    if _object(method, "transform_config").get("config_groups"):
        formats.add("transforms of activations")
    if formats:
        raise CheckpointError(
            f"config.json: compressed-tensors with {_quoted(formats)} is not read by this library; "
            f"convert from {SOURCE} instead, or use FP8, NVFP4, int4 or int8"
        )
    weights = [_object(scheme, "weights") for scheme in schemes]
    widths = [row.get("num_bits") for row in weights if row.get("type") == "int"]
    return CompressedTensors(_edge(weights), frozenset(width for width in widths if type(width) is int))


def _quoted(words: set[str]) -> str:
    return f"{', '.join(map(repr, sorted(words))):.80}"


def _object(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = row.get(key) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"config.json: quantization_config has {key} {found!r:.80}, expected an object")
    return found


def _edge(weights: list[Mapping[str, Any]]) -> int:
    """The edge of FP8's blocks, written [128, 128] or "128x128"; 0 where there are none."""
    found = {str(row["block_structure"]) for row in weights if row.get("block_structure")}
    edges = {number for text in found for number in re.findall("[0-9]+", text)}
    if found and (len(edges) != 1 or len(min(edges)) > 4 or int(min(edges)) not in EDGES):
        raise CheckpointError(
            f"config.json: blocks of {_quoted(found)} are not read by this library, only square ones of one size; "
            f"convert from {SOURCE} instead"
        )
    return int(edges.pop()) if edges else 0
