"""config.json in the dialect that Google published, whichever it was read in.

transformers 5.23 writes ``per_layer_config`` where Google's file has ``global_head_dim`` and
``num_global_key_value_heads``, and calls the tower's positions ``axial``. mlx-vlm reads Google's only; transformers
reads both. Every other key is kept as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mlx_diffgemma.config import FULL, MODEL_TYPES, SLIDING, ModelConfig, TextConfig
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.formats.encoding import Encoding
from mlx_diffgemma.tensors import DECODER

DROPPED = ("quantization", "quantization_config", "compression_config", "torch_dtype", "_name_or_path")
ARCHITECTURE = "DiffusionGemmaForBlockDiffusion"


def norm_dtype(encodings: Mapping[str, Encoding]) -> str:
    """What a model computes in: the dtype of its norms, which nobody quantizes."""
    return encodings[f"{DECODER}.norm.weight"].dtype


def googles(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """``config`` in Google's dialect, without a word of quantization, for a model that computes in ``dtype``.

    Raises:
        ConfigError: layers of one kind that differ, which this dialect cannot say.
    """
    parsed = ModelConfig.from_dict(config)
    found = {key: value for key, value in config.items() if key not in DROPPED}
    found |= {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPES[0], "dtype": dtype}
    found["text_config"] = _text(config["text_config"], parsed.text, dtype)
    if parsed.vision:
        found["vision_config"] = _vision(config["vision_config"], dtype)
    assert ModelConfig.from_dict(found) == dataclasses.replace(parsed, dtype=dtype), "the dialect says something else"
    return found


def _text(given: Mapping[str, Any], text: TextConfig, dtype: str) -> dict[str, Any]:
    found = {key: value for key, value in given.items() if key not in (*DROPPED, "per_layer_config")}
    found |= _heads(text) | {"layer_types": list(text.layer_types)}
    found["final_logit_softcapping"] = text.final_logit_softcapping
    if "dtype" in given or "torch_dtype" in given:
        found["dtype"] = dtype
    return found


def _heads(text: TextConfig) -> dict[str, int]:
    names = {SLIDING: ("head_dim", "num_key_value_heads"), FULL: ("global_head_dim", "num_global_key_value_heads")}
    found: dict[str, int] = {}
    for layer, kind in enumerate(text.layer_types):
        for name, value in zip(names[kind], (text.head_dims[layer], text.num_key_value_heads[layer]), strict=True):
            if found.setdefault(name, value) != value:
                raise ConfigError(
                    f"config.json: layer {layer} has another {name} ({value}) than the {kind} layers before it "
                    f"({found[name]}); no other format can say so"
                )
    for short, long in zip(names[SLIDING], names[FULL], strict=True):
        found.setdefault(short, found[long])  # a model without sliding layers
    return found


def _vision(given: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    found = dict(given)
    rope = given.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("rope_type") == "axial":
        found["rope_parameters"] = {**rope, "rope_type": "default"}
    if "dtype" in given or "torch_dtype" in given:
        found["dtype"] = dtype
    found.pop("torch_dtype", None)
    return found
