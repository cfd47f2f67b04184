"""Text to ids and back, the same through tokenizer.json and through a sentencepiece model trained here."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.hub import DEMO
from mlx_diffgemma.prompts.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

CONTROL = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|turn>>"]
DEFINED = ["<|think|>", "\n\n"]
CHAT = "<bos><|turn>user\nwhy is the sky blue?<turn|>\n<|turn>model\n"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte fallback, no prefix and no normalisation, as Gemma's own model has it."""
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=letters.randint(2, 6))) for _ in range(200)]
    lines = [" ".join(letters.choices(words, k=8)) + "?" for _ in range(300)] + [CHAT]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=file,
        model_type="bpe",
        vocab_size=400,
        control_symbols=CONTROL,
        user_defined_symbols=DEFINED,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(DEMO)


@pytest.fixture(params=["demo", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", ["hello world", "  two  spaces\nand a line\n\n", "", "a", " ", "1 + 2 = 3!"])
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str):
    """A prefix, a stripped space or a lost line break would change what the model reads."""
    ids = tokenizer.encode(text)
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text


def test_control_tokens_in_a_prompt_become_their_ids(tokenizer: Tokenizer):
    """sentencepiece by itself spells ``<bos>`` out in five letters."""
    ids = tokenizer.encode(CHAT)
    turns = [i for i, id in enumerate(ids) if id == tokenizer.id_of("<|turn>")]
    assert ids[0] == tokenizer.id_of("<bos>") == 2
    assert len(turns) == 2 and ids.count(tokenizer.id_of("<turn|>")) == 1
    assert ids[1] == tokenizer.id_of("<|turn>")
    assert tokenizer.decode(ids[2 : turns[1]]).startswith("user\nwhy is the sky blue?")


def test_no_start_token_is_added(tokenizer: Tokenizer):
    """The template writes its own; a second one is the classic mistake."""
    assert tokenizer.id_of("<bos>") not in tokenizer.encode("hello")
    assert tokenizer.encode(CHAT).count(tokenizer.id_of("<bos>")) == 1


def test_decoding_with_and_without_control_tokens(tokenizer: Tokenizer):
    ids = tokenizer.encode(CHAT)
    assert tokenizer.decode(ids, special=True) == CHAT
    assert tokenizer.decode(ids) == "user\nwhy is the sky blue?\nmodel\n"


def test_ids_and_tokens_look_each_other_up(tokenizer: Tokenizer):
    for token in ("<pad>", "<eos>", "<|turn>", "a"):
        assert tokenizer.token_of(tokenizer.id_of(token)) == token
    assert tokenizer.id_of("<no such token>") is None


def test_ids_beyond_the_vocabulary(tokenizer: Tokenizer):
    """A model's embedding has more rows than its tokenizer has words; a draft may hold any of them."""
    beyond = tokenizer.vocab_size
    assert tokenizer.token_of(beyond) == f"<{beyond}>"
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([*ids, beyond]) == tokenizer.decode([*ids, beyond], special=True) == "ab"


def test_bytes_of_a_character_join_across_pieces(pieces: Tokenizer):
    """Byte fallback: each piece alone is no text."""
    ids = pieces.encode("a 🌍 b")
    assert len(ids) >= 6 and pieces.decode(ids) == "a 🌍 b"
    assert "�" in pieces.decode(ids[:4])


def test_user_defined_symbols_are_one_id_and_stay_in_the_text(pieces: Tokenizer):
    for symbol in DEFINED:
        assert pieces.encode(symbol) == [pieces.id_of(symbol)]
        assert pieces.decode([pieces.id_of(symbol)]) == symbol


def test_the_longest_control_token_wins(pieces: Tokenizer):
    assert pieces.encode("<|turn>>") == [pieces.id_of("<|turn>>")]
    assert pieces.encode("<|turn><|turn>>") == [pieces.id_of("<|turn>"), pieces.id_of("<|turn>>")]


def test_the_demo_tokenizer_is_what_transformers_reads():
    theirs = PreTrainedTokenizerFast.from_pretrained(DEMO)
    ours = load_tokenizer(DEMO)
    text = "<bos><|turn>user\nSort 3 1 2, please: {x}~<turn|>\n<|turn>model\n"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_tokenizer_json_wins(pieces: Tokenizer, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"never read")
    assert load_tokenizer(tmp_path).vocab_size == 128
    assert isinstance(pieces, SentencePieceTokenizer)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\x00garbage\n" * 50], ids=["empty", "object", "garbage"])
def test_a_damaged_file_is_one_line(name: str, data: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_no_tokenizer_is_one_line(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as error:
        load_tokenizer(tmp_path)
    assert "tokenizer.json nor tokenizer.model" in str(error.value) and "\n" not in str(error.value)
