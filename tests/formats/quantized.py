"""Tiny checkpoints in MLX's layout, quantized by MLX itself, as mlx-vlm writes them.

``quantized("affine4")`` follows mlx-vlm's recipe: experts and self-conditioning in the named format, everything else
affine 8-bit; ``quantized("all nvfp4+global")`` has that format everywhere, embedding included. Every second exception
in config.json leaves its ``mode`` out where it is affine.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file

from benchmarks.checkpoint import googles, put
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.tensors import Tensor, tensor_table
from tests.tiny import checkpoint

SHAPE = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 192}  # rows are whole groups of 64
ROLES = ("embedding", "attention", "mlp", "experts", "router", "self_conditioning")
LOW = ("experts", "self_conditioning")
GLOBAL = "+global"

Format = dict[str, Any]  # bits, group_size, mode
FORMATS: dict[str, Format] = {
    **{f"affine{bits}": {"group_size": 64, "bits": bits, "mode": "affine"} for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "nvfp4+global": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
EIGHT = FORMATS["affine8"]
KINDS = (*FORMATS, "mixed")
EVERYWHERE = tuple(f"all {kind}" for kind in ("affine4", "mxfp4", "mxfp8", "nvfp4", "nvfp4+global"))


def chosen(kind: str, row: Tensor) -> Format | None:
    """The format of one tensor; ``None`` leaves it dense, as mlx-vlm leaves rows that are not whole groups of 64."""
    if row.role not in ROLES or len(row.shape) < 2 or row.shape[-1] % 64:
        return None
    if kind == "mixed":
        if row.role in ("router", "self_conditioning"):
            return None
        return FORMATS[{"down_proj": "affine6", "gate_up_proj": "affine4"}.get(row.name.split(".")[-1], "affine8")]
    low = FORMATS[kind.removeprefix("all ")]
    return low if row.role in LOW or kind.startswith("all ") else EIGHT


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="quantized-")


@functools.cache
def quantized(kind: str, seed: int = 0, dtype: str = "bfloat16", calm: bool = False) -> Path:
    """The folder of one checkpoint, written once per process.

    Args:
        kind: one of ``KINDS`` or ``EVERYWHERE``.
        dtype: bfloat16, float16 or float32, of all that is dense and of affine scales and biases.
        calm: see ``tests.tiny.randomise``.
    """
    folder = Path(_home().name) / f"{kind.replace(' ', '-')}-{seed}-{dtype}-{calm}"
    return write(folder, source(seed, calm), kind, dtype)


def source(seed: int = 0, calm: bool = False) -> Path:
    """The dense checkpoint that ``quantized`` starts from: float32, Hugging Face's layout."""
    return checkpoint(seed=seed, shape=tuple(SHAPE.items()), calm=calm)


def write(folder: Path, dense: Path, kind: str, dtype: str = "bfloat16") -> Path:
    """The checkpoint ``dense``, of any size, quantized into ``folder``."""
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    table = tensor_table(ModelConfig.from_dict(config))
    arrays: dict[str, mx.array] = {}
    formats: dict[str, Format | None] = {}
    for path in sorted(dense.glob("*.safetensors")):
        for name, values in load_file(path).items():
            module, wanted = name.removesuffix(".weight"), chosen(kind, table[name])
            bank = table[name].role == "experts"
            array = mx.array(values.astype(np.float32)).astype(getattr(mx, dtype))
            if wanted:
                formats[module] = wanted
                halves = (2 if name.endswith("gate_up_proj") else 1) if kind.endswith(GLOBAL) else 0
                halves *= wanted["mode"] == "nvfp4"
                arrays |= {f"{module}.{part}": value for part, value in pack(array, wanted, halves).items()}
            else:
                formats[module] = None
                arrays[f"{module}.weight" if bank else name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    put(folder / "config.json", described(config, kind, formats, dtype))
    return folder


def pack(array: mx.array, wanted: Format, halves: int) -> dict[str, mx.array]:
    """The parts of one module as ``mx.quantize`` makes them. ``halves`` matrices in one have global scales, 0 none."""
    if not halves:
        return dict(zip(("weight", "scales", "biases"), mx.quantize(array, **wanted), strict=False))
    scale = global_scale(np.array(array.astype(mx.float32)), halves)  # [..., halves]
    rows = np.repeat(scale, array.shape[-2] // halves, -1)
    weight, scales = mx.quantize(array.astype(mx.float32) / mx.array(rows)[..., None], **wanted)[:2]
    kept = rows if halves > 1 else scale[..., 0]  # as mlx-vlm has it: one per row, per expert, or one
    return {"weight": weight, "scales": scales, "weight_scale_2": mx.array(kept)}


def global_scale(values: np.ndarray, halves: int) -> np.ndarray:
    """float32 [..., halves]: ModelOpt's amax / 2688, times an odd number, so that no two are alike."""
    parts = values.reshape(*values.shape[:-2], halves, -1)
    odd = np.random.default_rng(values.shape[-1]).uniform(1, 5, parts.shape[:-1])
    return (np.abs(parts).max(-1) / 2688 * odd).astype(np.float32)


def described(config: dict[str, Any], kind: str, formats: dict[str, Format | None], dtype: str) -> dict[str, Any]:
    """config.json in Google's dialect, with the quantization under both of its names."""
    standard = EIGHT if kind == "mixed" else FORMATS[kind.removeprefix("all ")]
    block: dict[str, Any] = dict(standard)
    for index, (module, wanted) in enumerate(sorted(formats.items())):
        if wanted is None and "router.proj" in module and index % 2:
            block[module] = False
        elif wanted is not None and wanted != standard:
            silent = wanted["mode"] == "affine" and index % 2
            block[module] = {key: value for key, value in wanted.items() if not (silent and key == "mode")}
    if kind == "mixed":
        del block["mode"]
    config["dtype"] = dtype
    config["quantization"] = config["quantization_config"] = block
    if "per_layer_config" not in config["text_config"]:
        return config
    full = next(iter(config["text_config"]["per_layer_config"].values()))
    shape = {"global_head_dim": full["head_dim"], "num_global_key_value_heads": full["num_key_value_heads"]}
    return googles(config, shape)
