"""Turn trained weights into the packaged checkpoint: official format, bf16, checked against the official model.

    python demo/export.py build/demo/weights.safetensors mlx_diffgemma/demo_checkpoint

The vision tower is there because the format calls for one; it is tiny and untrained.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import network as n
import torch
from safetensors.torch import load_file
from tasks import NAMES_OF_TASKS, draw
from vocabulary import BOS, END_OF_TURN, EOS, ID, PAD, chat, write_tokenizer


def official_config():
    from transformers import DiffusionGemmaConfig, DiffusionGemmaTextConfig, Gemma4VisionConfig

    sliding, full = "sliding_attention", "full_attention"
    text = DiffusionGemmaTextConfig(
        vocab_size=n.VOCAB,
        hidden_size=n.HIDDEN,
        intermediate_size=n.MLP,
        moe_intermediate_size=n.MOE,
        num_hidden_layers=n.LAYERS,
        num_attention_heads=n.HEADS,
        num_key_value_heads=n.KV_HEADS,
        num_global_key_value_heads=n.GLOBAL_KV_HEADS,
        head_dim=n.HEAD_DIM,
        global_head_dim=n.GLOBAL_HEAD_DIM,
        num_experts=n.EXPERTS,
        top_k_experts=n.TOP_K,
        sliding_window=n.WINDOW,
        max_position_embeddings=1024,
        layer_types=[sliding] * (n.LAYERS - 1) + [full],
        rope_parameters={
            sliding: {"rope_type": "default", "rope_theta": n.SLIDING_THETA},
            full: {"rope_type": "proportional", "rope_theta": n.FULL_THETA, "partial_rotary_factor": n.PARTIAL},
        },
        use_bidirectional_attention="vision",
        pad_token_id=PAD,
        eos_token_id=END_OF_TURN,
        bos_token_id=BOS,
    )
    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        position_embedding_size=32,
        patch_size=4,
        pooling_kernel_size=1,
    )
    ids = {"image_token_id": ID["<|image|>"], "boi_token_id": ID["<|image>"], "eoi_token_id": ID["<image|>"]}
    return DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=n.CANVAS, **ids)


def official_model(weights: dict[str, torch.Tensor]):
    """The transformers model with these text weights; every one must find its place."""
    from transformers import DiffusionGemmaForBlockDiffusion
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )

    torch.manual_seed(0)  # for the untrained vision tower
    model = DiffusionGemmaForBlockDiffusion(official_config())
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, unexpected
    model.tie_weights()
    model.generation_config = DiffusionGemmaGenerationConfig(
        max_new_tokens=4 * n.CANVAS,
        max_denoising_steps=48,
        t_min=0.4,
        t_max=0.8,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        stability_threshold=1,
        confidence_threshold=0.005,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=[EOS, END_OF_TURN],
    )
    return model.eval()


@torch.no_grad()
def largest_difference(net: n.Network, model) -> float:
    """Between the training network's canvas logits and the official ones, one example per task."""
    rng, worst = random.Random(1), 0.0
    for task in NAMES_OF_TASKS:
        example = draw(task, rng, held=True)
        tokens = torch.tensor([chat(example.prompt, example.history)])
        canvas = torch.randint(n.VOCAB, (1, n.CANVAS))
        prefix, _ = net.encode(tokens, torch.ones_like(tokens, dtype=torch.bool))
        ours, _ = net.decode(
            canvas, prefix, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(1, n.CANVAS, n.HIDDEN)
        )
        worst = max(worst, float((model(input_ids=tokens, decoder_input_ids=canvas).logits - ours).abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    weights = load_file(options.weights)
    net = n.Network()
    net.load_state_dict(weights)
    model = official_model(weights)
    difference = largest_difference(net, model)
    assert difference < 1e-2, f"the training network and the official one differ by {difference}"
    model.to(torch.bfloat16).save_pretrained(options.out)
    write_tokenizer(options.out)
    total = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {total / 1e6:.2f} MB; largest difference to the official model {difference:.1e}")


if __name__ == "__main__":
    main()
