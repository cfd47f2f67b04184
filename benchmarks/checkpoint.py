"""The checkpoint that all implementations are timed on: random weights, fixed seed, official format, 110 M parameters.

Its config.json is Google's dialect (``global_head_dim``, ``num_global_key_value_heads``), which transformers, mlx-vlm
and this library all read; mlx-vlm does not read the ``per_layer_config`` that transformers writes. Two things make
every run take exactly the steps it is told to: a confidence threshold that no canvas can reach, and an end token whose
embedding is zero, so that it is never the argmax. All other sampler values are the published defaults.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CANVAS = 256
PROMPT_TOKENS = 128
END = 1
SEED = 0
SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 64,
    "global_head_dim": 128,
    "num_experts": 32,
    "top_k_experts": 4,
    "sliding_window": 1024,
}
GENERATION = {
    "max_new_tokens": CANVAS,
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 1e-30,
    "bos_token_id": 2,
    "eos_token_id": END,
    "pad_token_id": 0,
}
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def prompt_ids() -> list[int]:
    """The prompt, spread over the vocabulary; below 16 lie the special tokens."""
    return [16 + 251 * i % (SHAPE["vocab_size"] - 16) for i in range(PROMPT_TOKENS)]


def prompt_text() -> str:
    """The prompt as a chat message: the tokenizer has one word per id, and the template adds nothing."""
    return " ".join(word(id) for id in prompt_ids())


def word(id: int) -> str:
    return SPECIAL[id] if id < len(SPECIAL) else f"w{id}"


def write(folder: Path) -> Path:
    """The checkpoint in ``folder``, written unless this very one is there already. Needs transformers."""
    stamp, recipe = folder / "recipe.json", json.dumps([SEED, CANVAS, SHAPE, GENERATION])
    if stamp.is_file() and stamp.read_text() == recipe:
        return folder
    stamp.unlink(missing_ok=True)
    import torch
    from transformers import DiffusionGemmaForBlockDiffusion

    from tests.tiny import official_config, randomise

    model = DiffusionGemmaForBlockDiffusion(official_config(CANVAS, **SHAPE))
    randomise(model, SEED, calm=True)
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[END] = 0
    model.save_pretrained(folder)
    put(folder / "config.json", googles(json.loads((folder / "config.json").read_text()), SHAPE))
    put(folder / "generation_config.json", GENERATION)
    write_tokenizer(folder)
    stamp.write_text(recipe)
    return folder


def googles(config: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    """config.json as transformers writes it, in Google's dialect."""
    text = config["text_config"]
    del text["per_layer_config"]
    text["global_head_dim"] = shape["global_head_dim"]
    text["num_global_key_value_heads"] = shape["num_global_key_value_heads"]
    return config


def write_tokenizer(folder: Path, vocab_size: int = SHAPE["vocab_size"]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word(id): id for id in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    put(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def put(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1))
