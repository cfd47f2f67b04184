"""Hugging Face's implementation on the very tensors that ours runs on: one copy of 51 GB, not two.

Its module is built without storage, and our matrices are put into it as views: a range of a joined matrix's rows is a
matrix. It is then timed through its public ``generate``, sampler and all: (many steps - few) / the difference, so that
what a call costs once cancels. ``generate`` compiles by itself where the cache is static.

Its experts are told to use ``grouped_mm``: a generation loop may otherwise choose ``batched_mm``, which gathers a copy
of an expert's weights for every token that visits it, 2,048 of them. What was in force is written down.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cuda_backend.linear import Dense, Weight
from cuda_backend.weights import GatedMlp, Layer, Weights
from mlx_diffgemma.config import ModelConfig

from .gpu_clock import Clock, wall
from .gpu_ours import PROTOCOL_PROMPT, PROTOCOL_STEPS, PROTOCOL_TOKENS, prompt

EXPERTS = "grouped_mm"
NEVER = 1e-30  # a confidence that no canvas reaches; 0 is refused


def tensors(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Ours by their names in the official module, of the decoder and of what the encoder shares with it.

    Only norm weights are copied: there they are in the model's dtype, here in float32.
    """
    dtype = weights.embed_tokens.dtype
    encoder, decoder = "model.encoder.language_model", "model.decoder"
    yield "lm_head.weight", weights.embed_tokens
    yield f"{decoder}.self_conditioning.pre_norm.weight", weights.pre_norm.to(dtype)
    for name, tensor in gated(weights.self_conditioning):
        yield f"{decoder}.self_conditioning.{name}", tensor
    for at in (encoder, decoder):
        yield f"{at}.embed_tokens.weight", weights.embed_tokens
        yield f"{at}.norm.weight", weights.norm.to(dtype)
    for i, layer in enumerate(weights.layers):
        for name, tensor in of_layer(config, i, layer, dtype):
            yield f"{encoder}.layers.{i}.{name}", tensor
            yield f"{decoder}.layers.{i}.{name}", tensor
        yield f"{encoder}.layers.{i}.layer_scalar", layer.encoder_layer_scalar
        yield f"{decoder}.layers.{i}.layer_scalar", layer.layer_scalar


def of_layer(config: ModelConfig, i: int, layer: Layer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    text, attention = config.text, layer.self_attn
    keys = text.num_key_value_heads[i] * text.head_dims[i]
    sizes = {"q_proj": text.num_attention_heads * text.head_dims[i], "k_proj": keys}
    if not text.full(i):
        sizes["v_proj"] = keys
    for name, matrix in zip(sizes, dense(attention.qkv_proj).split(list(sizes.values())), strict=True):
        yield f"self_attn.{name}.weight", matrix
    yield "self_attn.o_proj.weight", dense(attention.o_proj)
    yield "self_attn.q_norm.weight", attention.q_norm.to(dtype)
    yield "self_attn.k_norm.weight", attention.k_norm.to(dtype)
    for name, tensor in gated(layer.mlp):
        yield f"mlp.{name}", tensor
    yield "router.proj.weight", dense(layer.router.proj)
    yield "router.scale", layer.router.scale
    yield "router.per_expert_scale", layer.router.per_expert_scale
    yield "experts.gate_up_proj", dense(layer.experts.gate_up_proj)
    yield "experts.down_proj", dense(layer.experts.down_proj)
    for name, tensor in layer.norms.items():
        yield f"{name}.weight", tensor.to(dtype)


def gated(mlp: GatedMlp) -> Iterator[tuple[str, Tensor]]:
    gate, up = dense(mlp.gate_up_proj).chunk(2)
    yield "gate_proj.weight", gate
    yield "up_proj.weight", up
    yield "down_proj.weight", dense(mlp.down_proj)


def dense(weight: Weight) -> Tensor:
    assert isinstance(weight, Dense), "the peer shares dense weights only"
    return weight.values


def official(data: dict[str, Any], config: ModelConfig, weights: Weights, device: torch.device) -> Any:
    """A ``DiffusionGemmaForBlockDiffusion`` of config.json's ``data`` around ``weights``, without its vision tower."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

    official_config = DiffusionGemmaConfig.from_dict(data)
    official_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(official_config)
    encoder = model.model.encoder
    encoder.vision_tower = encoder.embed_vision = None
    for name, tensor in tensors(config, weights):
        put(model, name, tensor)
    for path, module in list(model.named_modules()):
        if hasattr(module, "rope_init_fns"):  # its tables are made in the constructor
            owner, _, leaf = path.rpartition(".")
            with torch.device(device):
                setattr(model.get_submodule(owner), leaf, type(module)(module.config))
        elif hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
    left = [name for name, x in [*model.named_parameters(), *model.named_buffers()] if x.is_meta]
    if left:
        raise RuntimeError(f"transformers has tensors that were not given: {', '.join(left[:5])}")
    model.set_experts_implementation(EXPERTS)
    model.generation_config = DiffusionGemmaGenerationConfig()
    return model.eval()


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer ``name``.

    Raises:
        AttributeError: the module has none of that name and shape.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    there = getattr(module, leaf)
    if there.shape != tensor.shape:
        raise AttributeError(f"{name} has shape {tuple(there.shape)}, not {tuple(tensor.shape)}")
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def in_force(model: Any) -> dict[str, Any]:
    """What the module will really run with."""
    experts = model.get_experts_implementation()
    return {
        "experts": sorted({str(value) for value in experts.values()}),
        "attention": model.config._attn_implementation,
    }


def generate(model: Any, config: ModelConfig, ids: Tensor, *, steps: int, tokens: int, static: bool) -> Any:
    """One call of its public function that takes ``steps`` steps for every block."""
    options = {"cache_implementation": "static"} if static else {}
    return model.generate(
        ids,
        max_new_tokens=tokens,
        max_denoising_steps=steps,
        confidence_threshold=NEVER,
        pad_token_id=config.pad_token_id,
        **options,
    )


def prompt_ids(config: ModelConfig, batch: int, tokens: int, device: torch.device) -> Tensor:
    return torch.tensor([prompt(config, tokens, row) for row in range(batch)], device=device)


def step_ms(
    clock: Clock,
    model: Any,
    config: ModelConfig,
    *,
    prompt_tokens: int,
    static: bool,
    few: int = 2,
    many: int = 10,
    rounds: int = 3,
) -> float:
    """Milliseconds of one denoising step at batch 1, the median of several differences.

    Raises:
        RuntimeError: more steps took less time.
    """
    ids = prompt_ids(config, 1, prompt_tokens, clock.device)

    def seconds(steps: int) -> float:
        options = {"steps": steps, "tokens": config.canvas_length, "static": static}
        return wall(clock, lambda: generate(model, config, ids, **options))

    seconds(few)  # compiles, warms up
    seconds(few)
    found = statistics.median((seconds(many) - seconds(few)) / (many - few) for _ in range(rounds))
    if found <= 0:
        raise RuntimeError("more steps took less time: something else is running")
    return 1000 * found


def protocol(
    clock: Clock,
    model: Any,
    config: ModelConfig,
    *,
    static: bool,
    prompt_tokens: int = PROTOCOL_PROMPT,
    tokens: int = PROTOCOL_TOKENS,
) -> float:
    """Tokens per second of the fixed protocol, at batch 1, after a call with few steps that warms everything up."""
    ids = prompt_ids(config, 1, prompt_tokens, clock.device)
    options = {"tokens": tokens, "static": static}
    wall(clock, lambda: generate(model, config, ids, steps=2, **options))
    return tokens / wall(clock, lambda: generate(model, config, ids, steps=PROTOCOL_STEPS, **options))
