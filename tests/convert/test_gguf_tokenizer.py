"""What a GGUF file says of the tokenizer, against what the gguf package finds in the same files."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from convert.gguf_tokenizer import tokenizer_pairs
from mlx_diffgemma.errors import UserError

VOCAB = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<0x0A>", "a", "b", "ab", "▁", "\n", "x y", "\n\n", "<turn|>"]
VOCAB += ["<|channel>", "<table>", "</s>"]
ADDED = {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>"}


def tokenizer(folder: Path, **changes) -> Path:
    data = {
        "added_tokens": [
            {"id": i, "content": text, "special": text in ADDED}
            for i, text in enumerate(VOCAB)
            if text in ADDED or (text.startswith("<") and len(text) > 4 and text != "<0x0A>")
        ],
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {text: i for i, text in enumerate(VOCAB)},
            "merges": [["a", "b"], ["x ", "y"], ["\n", "\n"]],
        },
    }
    data |= changes
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "<bos>", "eos_token": {"content": "<turn|>"}, "pad_token": "<pad>", "unk_token": "<unk>"}
        )
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_tokens_and_their_types(tmp_path: Path):
    pairs = tokenizer_pairs(tokenizer(tmp_path), len(VOCAB) + 2)
    tokens, types = pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"]
    assert tokens == [*VOCAB, f"[PAD{len(VOCAB)}]", f"[PAD{len(VOCAB) + 1}]"]
    kinds = {text: gguf.TokenType(kind).name for text, kind in zip(tokens, types, strict=True)}
    control = {text for text, kind in kinds.items() if kind == "CONTROL"}
    assert control == {*ADDED, "<turn|>", "<|channel>", "</s>"}
    assert kinds["<0x0A>"] == "BYTE" and kinds["a"] == kinds["<table>"] == kinds["\n\n"] == "NORMAL"
    assert kinds[tokens[-1]] == "UNUSED"
    assert pairs["tokenizer.ggml.scores"] == [-1000.0] * len(tokens)


def test_merges_special_ids_and_template_are_what_gguf_finds(tmp_path: Path):
    pairs, theirs = tokenizer_pairs(tokenizer(tmp_path), 512), gguf.SpecialVocab(tmp_path, load_merges=True)
    assert pairs["tokenizer.ggml.merges"] == theirs.merges and theirs.merges[1] == "xĠ y"
    assert pairs["tokenizer.chat_template"] == theirs.chat_template == "{{ messages }}"
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    assert {n: pairs[f"tokenizer.ggml.{key}_token_id"] for n, key in keys.items()} == theirs.special_token_ids
    assert pairs["tokenizer.ggml.mask_token_id"] == 4


def test_merges_of_the_old_form_and_templates_elsewhere(tmp_path: Path):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}
    folder = tokenizer(tmp_path, model=model, added_tokens=None)
    assert tokenizer_pairs(folder, 2)["tokenizer.ggml.merges"] == ["a b"]
    (folder / "chat_template.jinja").unlink()
    assert "tokenizer.chat_template" not in tokenizer_pairs(folder, 2)
    (folder / "chat_template.json").write_text('{"chat_template": "old"}')
    assert tokenizer_pairs(folder, 2)["tokenizer.chat_template"] == "old"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": {}}, "no byte-pair vocabulary"),
        ({"model": None}, "no byte-pair vocabulary"),
        ({"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}, "no byte-pair vocabulary"),
        ({"model": {"vocab": {"a": "0"}}}, "no byte-pair vocabulary"),
        ({"added_tokens": [{"content": "a"}]}, "added_tokens"),
        ({"added_tokens": {"a": 1}}, "added_tokens"),
        ({"added_tokens": [{"content": "far", "id": 512}]}, "'far' has id 512, the model has 512"),
        ({"added_tokens": [{"content": "far", "id": -1}]}, "has id -1"),
    ],
    ids=str,
)
def test_a_tokenizer_that_gguf_cannot_hold(changes: dict, part: str, tmp_path: Path):
    with pytest.raises(UserError, match=part) as error:
        tokenizer_pairs(tokenizer(tmp_path, **changes), 512)
    assert "\n" not in str(error.value)
