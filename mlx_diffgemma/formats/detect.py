"""Which format a checkpoint is in, from its files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..json_file import read_json
from . import compressed_tensors, fp8_block, mlx, modelopt
from .assemble import Dialect
from .hf import HuggingFace
from .schemes import SOURCE

METHODS: dict[str, Callable[[Mapping[str, Any]], Dialect]] = {
    "compressed-tensors": compressed_tensors.dialect,
    "fp8": fp8_block.dialect,
    "modelopt": modelopt.dialect,
    "modelopt_fp4": modelopt.dialect,  # vLLM's names of the same
    "modelopt_mixed": modelopt.dialect,
}
MLX_BANKS = ("gate_up_proj", "switch_glu.gate_proj", "switch_mlp.gate_proj")
REFUSED = {  # what people have, by quant_method, and how it is called
    "auto-round": "AutoRound",
    "auto_round": "AutoRound",
    "awq": "AutoAWQ",
    "bitsandbytes": "bitsandbytes",
    "fbgemm_fp8": "FBGEMM's FP8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "transformers' own MXFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "torchao": "torchao",
}


def detect(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> Dialect:
    """The dialect of the safetensors files in ``folder``, whose tensors are called ``names``.

    Raises:
        CheckpointError: quantized in a way that this library does not read; the message says what to convert instead.
        ConfigError: a quantization that config.json describes wrongly.
    """
    if config.get("quantization"):
        return mlx.dialect(config)
    method = quantization(folder, config)
    kind = str(method.get("quant_method") or ("modelopt" if "quant_algo" in method else ""))
    if kind in METHODS:
        return METHODS[kind](method)
    if not method:
        mlx_names = tuple(f".experts.{name}.weight" for name in MLX_BANKS)
        return mlx.MLX() if any(name.endswith(mlx_names) for name in names) else HuggingFace()
    if not kind and "bits" in method:
        return mlx.dialect(config)
    known = REFUSED.get(kind, f"quant_method {kind!r:.80}")
    raise CheckpointError(
        f"{folder} is quantized with {known}, which this library does not read; convert from {SOURCE} instead, "
        "or use a compressed-tensors, ModelOpt, MLX or GGUF checkpoint"
    )


def quantization(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the files say of quantization: in config.json, or in ModelOpt's file beside it; empty for none."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None  # some exporters put it there
    found = config.get("quantization_config") or config.get("compression_config") or inner or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{folder / 'config.json'}: quantization_config is {found!r:.80}, expected an object")
    aside = folder / "hf_quant_config.json"
    if not found and aside.is_file():
        inner = read_json(aside).get("quantization")
        return {"quant_method": "modelopt", **(inner if isinstance(inner, Mapping) else {})}
    return found
