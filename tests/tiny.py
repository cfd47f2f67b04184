"""Tiny random checkpoints in the official format, saved by transformers from a config and a seed.

Every trap of the architecture is alive: five sliding layers to one full, other head sizes and key-value heads in the
full ones, no v_proj there, norm weights away from 1, two different sets of layer scalars, per-expert scales.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
import zlib
from pathlib import Path

import torch

SLIDING, FULL = "sliding_attention", "full_attention"
TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_experts": 8,
    "top_k_experts": 2,
    "sliding_window": 16,
    "layer_types": [SLIDING] * 5 + [FULL],
    "max_position_embeddings": 4096,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "use_bidirectional_attention": "vision",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "position_embedding_size": 32,
    "patch_size": 4,
    "pooling_kernel_size": 1,
}
ROPES = {"sliding": 1e4, "full": 1e6, "partial": 0.25}


def official_config(canvas_length: int = 16, ropes: dict | None = None, **text):
    """A transformers config. Keywords override ``TEXT``; sizes follow Google's names."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaTextConfig, Gemma4VisionConfig

    theta = ROPES | (ropes or {})
    rope = {
        SLIDING: {"rope_type": "default", "rope_theta": theta["sliding"]},
        FULL: {"rope_type": "proportional", "rope_theta": theta["full"], "partial_rotary_factor": theta["partial"]},
    }
    return DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**copy.deepcopy(TEXT | text), rope_parameters=rope),
        vision_config=Gemma4VisionConfig(**VISION),
        canvas_length=canvas_length,
        image_token_id=5,
        boi_token_id=6,
        eoi_token_id=7,
    )


def randomise(model, seed: int, calm: bool) -> None:
    """Weights of a size that makes logits of about 10, and nothing left at its neutral value.

    ``calm`` weakens the self-conditioning: at full strength, random weights multiply any difference tenfold a step, and
    no two implementations stay together for long.
    """
    draw = torch.Generator().manual_seed(seed)
    hidden = model.config.text_config.hidden_size
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or "embed_scale" in name:
                continue
            if name.endswith("layer_scalar"):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) * 0.4 + 0.7)
            elif tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
            elif "embed_tokens" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 3 / math.sqrt(hidden))
            elif "router.proj" in name:  # scores of about 1: neither ties everywhere nor one expert always
                tensor.copy_(torch.randn(tensor.shape, generator=draw))
            elif tensor.ndim >= 2:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) / math.sqrt(tensor.shape[-1]))
            if calm and "self_conditioning.down_proj" in name:
                tensor.mul_(0.03)


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tiny-")


@functools.cache
def checkpoint(
    seed: int = 0, canvas_length: int = 16, shape: tuple = (), ropes: tuple = (), calm: bool = False
) -> Path:
    """The folder of one tiny checkpoint, written once per process. ``shape`` and ``ropes`` are items of overrides."""
    from transformers import DiffusionGemmaForBlockDiffusion

    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in shape}
    config = official_config(canvas_length, dict(ropes), **listed)
    model = DiffusionGemmaForBlockDiffusion(config)
    randomise(model, seed, calm)
    folder = Path(_home().name) / f"{zlib.crc32(repr((seed, canvas_length, shape, ropes, calm)).encode()):08x}"
    model.save_pretrained(folder)
    return folder
