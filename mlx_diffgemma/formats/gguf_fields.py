"""GGUF's key-value pairs about the network: what a config.json comes to there, and whether a file agrees with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import FULL, SLIDING, ModelConfig, TextConfig
from ..errors import CheckpointError, ConfigError
from .gguf_file import GGUFFile

CANVAS = "diffusion.canvas_length"  # without the architecture's name, as #24423 has it
NOT_COMPARED = ("context_length", "attention.causal", "rope.dimension_count", "rope.dimension_count_swa")


def network_fields(config: ModelConfig) -> dict[str, Any]:
    """The pairs of one model without the architecture's name before them. Lists have an entry per layer.

    Source: llama.cpp #24423, ``conversion/diffusion_gemma.py`` over ``Gemma4Model.set_gguf_parameters``.

    Raises:
        ConfigError: layers of one kind that differ, which GGUF cannot say.
    """
    text = config.text
    full, sliding = _layer(text, FULL), _layer(text, SLIDING)
    found: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "block_count": text.num_hidden_layers,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": list(text.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "attention.sliding_window": text.sliding_window,
        "attention.sliding_window_pattern": [kind == SLIDING for kind in text.layer_types],
        "attention.shared_kv_layers": 0,
        "attention.causal": False,
        "expert_count": text.num_experts,
        "expert_used_count": text.top_k_experts,
        "expert_feed_forward_length": text.moe_intermediate_size,
        "embedding_length_per_layer_input": 0,
    }
    for suffix, layer in (("", full), ("_swa", sliding)):
        found |= {
            f"attention.key_length{suffix}": text.head_dims[layer],
            f"attention.value_length{suffix}": text.head_dims[layer],
            f"rope.freq_base{suffix}": text.ropes[layer].theta,
            f"rope.dimension_count{suffix}": text.head_dims[layer],
        }
    if text.final_logit_softcapping is not None:
        found["final_logit_softcapping"] = float(text.final_logit_softcapping)
    return found


def _layer(text: TextConfig, kind: str) -> int:
    """The first layer of a kind, which speaks for all of it; the last layer, which is full, where there is none."""
    layers = [layer for layer, other in enumerate(text.layer_types) if other == kind]
    for layer in layers:
        if text.head_dims[layer] != text.head_dims[layers[0]]:
            raise ConfigError(
                f"config.json: layer {layer} has another head_dim ({text.head_dims[layer]}) than the {kind} layers "
                f"before it ({text.head_dims[layers[0]]}), which GGUF cannot say"
            )
    return layers[0] if layers else text.num_hidden_layers - 1


def check_fields(file: GGUFFile, config: ModelConfig) -> None:
    """Compare what the file says of its network with config.json; it may leave things out.

    Raises:
        CheckpointError: they are not of one model; names the first difference.
    """
    wanted = {
        f"{file.architecture}.{key}": value for key, value in network_fields(config).items() if key not in NOT_COMPARED
    }
    wanted[CANVAS] = config.canvas_length
    for key, value in wanted.items():
        if not _agree(file.fields, key, value):
            raise CheckpointError(
                f"{file.path}: {key} is {_short(file.fields[key])}, config.json calls for {_short(value)}; "
                "are they of one model?"
            )


def _agree(fields: Mapping[str, Any], key: str, wanted: Any) -> bool:
    if key not in fields or (key.endswith("_pattern") and not isinstance(fields[key], tuple)):
        return True  # a pattern of one number is a period, which llama.cpp itself reads in two ways
    found = fields[key]
    left = list(found) if isinstance(found, tuple) else [found]
    right = wanted if isinstance(wanted, list) else [wanted]
    if len(left) == 1 or len(right) == 1:  # one number for all layers
        left, right = left * len(right) if len(left) == 1 else left, right * len(left) if len(right) == 1 else right
    return len(left) == len(right) and all(map(_same, left, right))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return math.isclose(one, other, rel_tol=1e-5)  # the file's numbers are float32


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{list(value) if isinstance(value, tuple) else value!r:.80}"
