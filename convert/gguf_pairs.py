"""The key-value pairs of a GGUF file and of its image projector, as llama.cpp's converters write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_diffgemma.config import FULL, GenerationConfig, ModelConfig, TextConfig
from mlx_diffgemma.formats.gguf_fields import CANVAS, network_fields
from mlx_diffgemma.formats.gguf_names import ARCHITECTURE, PROJECTOR, PROJECTOR_TYPE

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32, "MXFP4": 38}  # llama.cpp's LlamaFileType
QUANTIZATION_VERSION = 2
STILL = 1e30  # a frequency factor that leaves a pair where it is
IMAGE_SIZE = 224  # which gemma4v does not read and llama.cpp wants to find


def model_pairs(name: str, kind: str, config: ModelConfig, generation: GenerationConfig) -> dict[str, Any]:
    """All but the tokenizer's. ``kind`` is the type of most weights."""
    pairs: dict[str, Any] = _general(ARCHITECTURE, "model", name, kind)
    pairs |= {f"{ARCHITECTURE}.{key}": value for key, value in network_fields(config).items()}
    pairs |= {
        CANVAS: config.canvas_length,
        "diffusion.eb_max_steps": generation.max_denoising_steps,
        "diffusion.eb_t_min": float(generation.t_min),
        "diffusion.eb_t_max": float(generation.t_max),
        "diffusion.eb_entropy_bound": float(generation.entropy_bound),
    }
    if generation.stability_threshold is not None:
        pairs["diffusion.eb_stability_threshold"] = generation.stability_threshold
    if generation.confidence_threshold is not None:
        pairs["diffusion.eb_confidence_threshold"] = float(generation.confidence_threshold)
    return pairs


def projector_pairs(
    name: str, kind: str, config: ModelConfig, raw: Mapping[str, Any], processor: Mapping[str, Any]
) -> dict[str, Any]:
    """``raw`` is config.json and ``processor`` is processor_config.json, for what ``ModelConfig`` does not keep."""
    vision, given = config.vision, raw.get("vision_config") or {}
    assert vision, "a model without a vision tower has no projector"
    images = processor.get("image_processor") or processor
    return _general(PROJECTOR, "mmproj", name, kind) | {
        "clip.has_vision_encoder": True,
        "clip.vision.projector_type": PROJECTOR_TYPE,
        "clip.vision.projection_dim": config.text.hidden_size,
        "clip.vision.image_size": IMAGE_SIZE,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": vision.num_hidden_layers,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(given.get("rms_norm_eps", 1e-6)),
        "clip.vision.image_mean": _channels(images.get("image_mean"), 0.0),
        "clip.vision.image_std": _channels(images.get("image_std"), 1.0),
    }


def rope_frequencies(text: TextConfig) -> np.ndarray:
    """float32 [head_dim / 2] of a full layer: what each pair's angle is divided by."""
    layer = text.layer_types.index(FULL)
    rope, half = text.ropes[layer], text.head_dims[layer] // 2
    turning = rope.turning(text.head_dims[layer])
    return np.array([rope.factor] * turning + [STILL] * (half - turning), np.float32)


def _general(architecture: str, kind: str, name: str, weights: str) -> dict[str, Any]:
    found = {
        "general.architecture": architecture,
        "general.type": kind,
        "general.name": name,
        "general.file_type": FILE_TYPES[weights],
    }
    return found | ({"general.quantization_version": QUANTIZATION_VERSION} if weights in ("Q8_0", "MXFP4") else {})


def _channels(values: Any, default: float) -> list[float]:
    fine = isinstance(values, Sequence) and len(values) == 3 and all(isinstance(value, int | float) for value in values)
    return [float(value) for value in values] if fine else [default] * 3
