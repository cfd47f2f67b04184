"""What a GGUF file says of the tokenizer, from tokenizer.json: tokens, merges, special ids, the chat template.

As llama.cpp's ``Gemma4Model.set_vocab`` writes it, with #24423's rule for control tokens: what stands in ``<|…>`` or
``<…|>`` is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.json_file import read_json

NORMAL, CONTROL, UNUSED, BYTE = 1, 3, 5, 6  # of tokens
SCORE = -1000.0  # BPE has none
SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}  # there -> in GGUF's keys


def tokenizer_pairs(folder: Path, vocabulary: int) -> dict[str, Any]:
    """The pairs for the tokenizer of ``folder`` and a model of ``vocabulary`` tokens.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        CheckpointError: it is no byte-pair tokenizer, or has more tokens than the model.
    """
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    data = read_json(path)
    model, added = data.get("model"), data.get("added_tokens") or []
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE" or not _ids(model.get("vocab")):
        raise CheckpointError(f"{path} holds no byte-pair vocabulary, which a GGUF file needs")
    if not isinstance(added, list) or not all(
        isinstance(t, Mapping) and _ids({t.get("content"): t.get("id")}) for t in added
    ):
        raise CheckpointError(f"{path}: added_tokens is damaged; download it again")
    ids: dict[str, int] = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
    special = {token["content"] for token in added if token.get("special")}
    tokens, config = _tokens(path, ids, vocabulary), read_json(settings) if settings.is_file() else {}
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [SCORE] * len(tokens),
        "tokenizer.ggml.token_type": [_type(text, ids, special) for text in tokens],
    }
    merges = [_merge(merge) for merge in model.get("merges") or []]
    found |= {"tokenizer.ggml.merges": merges} if merges else {}
    found |= _special_ids(ids, config)
    found |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": True}
    template = _template(folder, config)
    return found | ({"tokenizer.chat_template": template} if template else {})


def _ids(vocab: Any) -> bool:
    return (
        isinstance(vocab, Mapping)
        and bool(vocab)
        and all(type(text) is str and type(id) is int for text, id in vocab.items())
    )


def _tokens(path: Path, ids: Mapping[str, int], vocabulary: int) -> list[str]:
    """Every id's token; ids of the model that no token has are filled up."""
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    for text, id in ids.items():
        if not 0 <= id < vocabulary:
            raise CheckpointError(
                f"{path}: {text!r:.80} has id {id}, the model has {vocabulary:,} tokens; are they of one model?"
            )
        tokens[id] = text
    return tokens


def _type(text: str, ids: Mapping[str, int], special: set[str]) -> int:
    if text not in ids:
        return UNUSED
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
        return BYTE
    looks = text in ("<s>", "</s>") or (text.startswith("<|") and text.endswith(">"))
    looks = looks or (text.startswith("<") and text.endswith("|>"))
    return CONTROL if looks or text in special else NORMAL


def _merge(merge: Any) -> str:
    """``a b``; spaces within a or b are written as Ġ, as gguf's ``SpecialVocab`` does."""
    return merge if isinstance(merge, str) else " ".join(part.replace(" ", SPACE) for part in merge)


def _special_ids(ids: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, int]:
    found = {}
    for name, key in SPECIAL.items():
        token = config.get(f"{name}_token") or f"<{name}>"
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str) and text in ids:
            found[f"tokenizer.ggml.{key}_token_id"] = ids[text]
    return found


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    beside = folder / "chat_template.json"
    given = config.get("chat_template") or (read_json(beside).get("chat_template") if beside.is_file() else None)
    return given if isinstance(given, str) else None
