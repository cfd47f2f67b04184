"""Tiny checkpoints in the formats of other tools, written from their formulas in torch and from none of our code.

``foreign("ct-fp8")`` is the checkpoint; ``dequantized("ct-fp8")`` is what its numbers stand for, as a plain one. The
formulas are those of compressed-tensors 0.20, ModelOpt and transformers 5.23. A matrix is [out, in], float32.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.formats import Checkpoint, open_checkpoint
from tests.tiny import checkpoint

SHAPE = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 192}
CUT = SHAPE | {"moe_intermediate_size": 192}  # gate ends inside a block of 128 rows, and down's last block is partial
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Coded:
    """The parts of one matrix as they lie in the file, and what they stand for in float32."""

    parts: dict[str, Tensor]
    value: Tensor


Coder = Callable[[Tensor], Coded]


def fp8_channel(weight: Tensor, dtype: torch.dtype = torch.bfloat16, flat: bool = False) -> Coded:
    scale = (weight.abs().amax(-1, keepdim=True) / 448).to(dtype)
    codes = (weight / scale.float()).clamp(-448, 448).to(E4M3)
    stored = scale[:, 0] if flat else scale
    return Coded({"weight": codes, "weight_scale": stored}, codes.float() * scale.float())


def fp8_tensor(weight: Tensor, shape: tuple[int, ...] = ()) -> Coded:
    """ModelOpt's has no axis, compressed-tensors' has one."""
    scale = weight.abs().amax() / 448
    codes = (weight / scale).clamp(-448, 448).to(E4M3)
    parts = {"weight": codes, "weight_scale": scale.reshape(shape), "input_scale": torch.tensor(0.01).reshape(shape)}
    return Coded(parts, codes.float() * scale)


def fp8_blocks(weight: Tensor, name: str = "weight_scale_inv", edge: int = 128) -> Coded:
    """One scale for each ``edge`` x ``edge``; the last ones are partial."""
    rows, columns = weight.shape
    grid = torch.ones(-(-rows // edge), -(-columns // edge))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            grid[i, j] = weight[i * edge : (i + 1) * edge, j * edge : (j + 1) * edge].abs().amax() / 448
    full = grid.repeat_interleave(edge, 0)[:rows].repeat_interleave(edge, 1)[:, :columns]
    codes = (weight / full).clamp(-448, 448).to(E4M3)
    return Coded({"weight": codes, name: grid}, codes.float() * full)


def e2m1(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the sixteen values, packed two to a byte with the first in the low half; and the values."""
    size = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    codes = size + 8 * (scaled < 0)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed, E2M1[size] * torch.where(scaled < 0, -1.0, 1.0)


def _nvfp4(weight: Tensor, multiply: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, scales and values for a global scale that multiplies."""
    groups = weight.unflatten(-1, (-1, 16))
    scales = (groups.abs().amax(-1) / 6 / multiply).clamp(2**-9, 448).to(E4M3)
    each = (scales.float() * multiply)[..., None]
    packed, values = e2m1((groups / each).flatten(-2))
    return packed, scales, (values.unflatten(-1, (-1, 16)) * each).flatten(-2)


def nvfp4_ct(weight: Tensor) -> Coded:
    """The global scale divides; vLLM takes its reciprocal in float32 and multiplies."""
    divide = (448 * 6 / weight.abs().amax()).reshape(1)
    packed, scales, value = _nvfp4(weight, 1 / divide)
    names = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": divide}
    return Coded(names | {"input_global_scale": torch.tensor([384.0])}, value)


def nvfp4_modelopt(weight: Tensor) -> Coded:
    """The second scale multiplies."""
    multiply = weight.abs().amax() / (6 * 448)
    packed, scales, value = _nvfp4(weight, multiply)
    names = {"weight": packed, "weight_scale": scales, "weight_scale_2": multiply}
    return Coded(names | {"input_scale": torch.tensor(0.0026)}, value)


def mxfp4_ct(weight: Tensor) -> Coded:
    exponents, scales = _powers(weight, 6)
    packed, values = e2m1((weight.unflatten(-1, (-1, 32)) / scales).flatten(-2))
    value = (values.unflatten(-1, (-1, 32)) * scales).flatten(-2)
    return Coded({"weight_packed": packed, "weight_scale": exponents}, value)


def mxfp8_ct(weight: Tensor) -> Coded:
    exponents, scales = _powers(weight, 448)
    codes = (weight.unflatten(-1, (-1, 32)) / scales).to(E4M3)
    return Coded({"weight": codes.flatten(-2), "weight_scale": exponents}, (codes.float() * scales).flatten(-2))


def _powers(weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """For each group of 32 the power of two that makes it fit: its exponent plus 127 as a byte, and itself."""
    exponents = (weight.unflatten(-1, (-1, 32)).abs().amax(-1) / largest).log2().ceil()
    return (exponents + 127).to(torch.uint8), torch.exp2(exponents)[..., None]


def packed_int32(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2**bits, 32 / bits of them in an int32, the first in the lowest bits."""
    per = 32 // bits
    lanes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    words = sum(lanes[..., i] << (bits * i) for i in range(per))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def int_packed(weight: Tensor, group: int = 32, bits: int = 4, symmetric: bool = True, dtype=torch.bfloat16) -> Coded:
    """``group`` 0 is one scale per row."""
    group, half = group or weight.shape[-1], 2 ** (bits - 1)
    groups = weight.unflatten(-1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        scale, zero = (torch.maximum(-low, high) / (half - 0.5)).to(dtype), torch.zeros_like(low)
    else:
        scale = ((high - low) / (2 * half - 1)).to(dtype)
        zero = (-half - low / scale.float()).round().clamp(-half, half - 1)
    codes = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(-half, half - 1)
    parts = {
        "weight_packed": packed_int32((codes + half).flatten(-2), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = packed_int32((zero + half).T, bits).T
    value = ((codes - zero[..., None]) * scale.float()[..., None]).flatten(-2)
    return Coded(parts, value)


def int8_channel(weight: Tensor) -> Coded:
    scale = (weight.abs().amax(-1, keepdim=True) / 127.5).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return Coded({"weight": codes, "weight_scale": scale}, codes.float() * scale.float())


def ct_group(targets: list[str], format: str, bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    shared = {"num_bits": bits, "type": kind, "symmetric": True, "group_size": None, "block_structure": None}
    weights = shared | {"strategy": strategy, "dynamic": False, "actorder": None, "observer": "minmax"} | more
    inputs = shared | {"strategy": "token", "dynamic": True} if strategy == "channel" else None
    return {"targets": targets, "format": format, "weights": weights, "input_activations": inputs}


def ct(*groups: dict[str, Any]) -> dict[str, Any]:
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": ["lm_head", "re:.*router.*"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.15.1",
    }


def modelopt(algorithm: str) -> dict[str, Any]:
    ignore = ["lm_head", "*embed_vision*", "*router*", "*vision_tower*"]
    ignore += ["*mlp*", "*self_attn*", "*self_conditioning*"] if algorithm == "NVFP4" else []
    producer = {"name": "modelopt", "version": "0.45.0"}
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ignore, "producer": producer}


@dataclass(frozen=True)
class Kind:
    """What is quantized how, by role (experts, attention, mlp, self_conditioning), and what config.json says."""

    coders: Mapping[str, Coder]
    config: dict[str, Any]
    shape: Mapping[str, int] = field(default_factory=lambda: SHAPE)
    fused: bool = False  # banks of experts stay whole


FP8 = ct_group(["Linear"], "float-quantized", 8, "float", "channel")
NVFP4 = ct_group(["Linear"], "nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=16)
INT4 = ct_group(["Linear"], "pack-quantized", 4, "int", "group", group_size=32)
INT8 = ct_group(["Linear"], "int-quantized", 8, "int", "channel")
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def everywhere(coder: Coder) -> dict[str, Coder]:
    return dict.fromkeys(("experts", "attention", "mlp"), coder)


KINDS = {
    "ct-fp8": Kind(everywhere(fp8_channel), ct(FP8)),
    "ct-nvfp4": Kind({"experts": nvfp4_ct, "mlp": nvfp4_ct}, ct(NVFP4)),
    "ct-int4": Kind(everywhere(int_packed), ct(INT4)),
    "ct-int8": Kind(everywhere(int8_channel), ct(INT8)),
    "ct-mixed": Kind(
        {"experts": nvfp4_ct, "attention": fp8_channel, "mlp": fp8_channel},
        ct(NVFP4 | {"targets": ["re:.*experts.*"]}, FP8 | {"targets": ["re:.*self_attn.*", "re:.*mlp.*"]}),
    ),
    "modelopt-nvfp4": Kind({"experts": nvfp4_modelopt}, modelopt("NVFP4")),
    "modelopt-fp8": Kind(everywhere(fp8_tensor), modelopt("FP8")),
    "fp8-block": Kind(everywhere(fp8_blocks) | {"self_conditioning": fp8_blocks}, BLOCKS, CUT, fused=True),
}


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="foreign-")


def foreign(kind: str, seed: int = 0) -> Path:
    """The folder of one checkpoint, written once per process."""
    return _both(kind, seed) / "foreign"


def dequantized(kind: str, seed: int = 0) -> Path:
    """The same weights as a plain checkpoint: float32 where they were quantized, else bfloat16 as in the other."""
    return _both(kind, seed) / "plain"


@functools.cache
def _both(kind: str, seed: int) -> Path:
    return write(Path(_home().name) / f"{kind}-{seed}", KINDS[kind], seed)


def write(folder: Path, how: Kind, seed: int = 0) -> Path:
    """Both checkpoints of any kind, in ``folder / "foreign"`` and ``folder / "plain"``."""
    dense = checkpoint(seed=seed, shape=tuple(how.shape.items()))
    stored, plain = coded(load_file(dense / "model.safetensors"), how)
    for name, tensors in (("foreign", stored), ("plain", plain)):
        shutil.copytree(dense, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
        save(folder / name, tensors)
    describe(folder / "foreign", how.config)
    return folder


def altered(kind: str, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of ``foreign(kind)`` whose tensors ``change`` has changed in place."""
    shutil.copytree(foreign(kind), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save(folder, tensors)
    return folder


def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def hollow(path: Path, rows: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A file of any size that takes no room on disk: dtypes and shapes by name in its header, then a hole."""
    items = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
    at, header = 0, {}
    for name, (dtype, shape) in rows.items():
        size = items[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)


def refused(folder: Path, *parts: str) -> None:
    """The checkpoint must not open, and one line must say why, with all of ``parts`` in it."""
    with pytest.raises(UserError) as error:
        open_checkpoint(folder)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same tensors with the same values."""
    a, b = open_checkpoint(one), open_checkpoint(other)
    return a.table == b.table and all(np.array_equal(*(_values(c, name) for c in (a, b))) for name in a.table)


def _values(opened: Checkpoint, name: str) -> np.ndarray:
    return opened.read(name).astype(np.float32)


def describe(folder: Path, quantization: dict[str, Any] | None) -> None:
    """Put ``quantization`` in config.json, or take it out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantization, "dtype": "bfloat16"}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def coded(tensors: Mapping[str, Tensor], how: Kind) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the foreign file holds, and the plain one."""
    stored, plain = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        coder = how.coders.get(role(name))
        if coder is None or tensor.ndim < 2:
            stored[name] = plain[name] = tensor.bfloat16()
        elif tensor.ndim == 2:
            one = coder(tensor)
            stored |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in one.parts.items()}
            plain[name] = one.value
        elif how.fused:
            every = [coder(matrix) for matrix in tensor]
            stored |= {fused_name(name, p): torch.stack([one.parts[p] for one in every]) for p in every[0].parts}
            plain[name] = torch.stack([one.value for one in every])
        else:
            every = [expert(name, e, matrix, coder) for e, matrix in enumerate(tensor)]
            stored |= {key: value for one in every for key, value in one.parts.items()}
            plain[name] = torch.stack([one.value for one in every])
    return stored, plain


def role(name: str) -> str:
    roles = {"experts": "experts", "self_attn": "attention", "mlp": "mlp", "self_conditioning": "self_conditioning"}
    return next((roles[part] for part in name.split(".") if part in roles and "vision" not in name), "")


def fused_name(bank: str, part: str) -> str:
    """transformers' parameters of a bank: ``gate_up_proj`` and ``gate_up_proj_scale_inv``."""
    return bank + part.removeprefix("weight")


def expert(bank: str, number: int, matrix: Tensor, coder: Coder) -> Coded:
    """One expert's matrix of a fused bank under its own names; gate and up are coded apart."""
    experts, _, which = bank.rpartition(".")
    names = ("gate_proj", "up_proj") if which == "gate_up_proj" else (which,)
    pieces = {name: coder(piece) for name, piece in zip(names, matrix.chunk(len(names)), strict=True)}
    parts = {f"{experts}.{number}.{n}.{p}": tensor for n, one in pieces.items() for p, tensor in one.parts.items()}
    return Coded(parts, torch.cat([one.value for one in pieces.values()]))
