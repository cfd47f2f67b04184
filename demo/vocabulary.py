"""The demo's character vocabulary: 128 ids, the control tokens of DiffusionGemma's chat format first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

SPECIAL = "<pad> <eos> <bos> <unk> <|turn> <turn|> <|image|> <|image> <image|>".split()
ROLES = ["user", "model"]
VOCABULARY = SPECIAL + ROLES + ["\n"] + [chr(c) for c in range(32, 127)]
VOCABULARY += [f"<unused{i}>" for i in range(128 - len(VOCABULARY))]
ID = {token: i for i, token in enumerate(VOCABULARY)}
PAD, EOS, BOS, TURN, END_OF_TURN = (ID[t] for t in ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>"))

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def encode(text: str) -> list[int]:
    return [ID[c] for c in text]


def chat(user: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
    """The ids that the chat template gives for a question, and the (question, answer) turns before it."""
    newline, ids = ID["\n"], [BOS]
    texts = [text for turn in history for text in turn] + [user]
    for i, text in enumerate(texts):
        ids += [TURN, ID[ROLES[i % 2]], newline, *encode(text), END_OF_TURN, newline]
    return [*ids, TURN, ID["model"], newline]


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja beside the weights."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab=ID, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in ROLES])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<turn|>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
