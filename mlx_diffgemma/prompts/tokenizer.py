"""Text to ids and back, from ``tokenizer.json`` (tokenizers) or ``tokenizer.model`` (sentencepiece)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..errors import CheckpointError


class Tokenizer(Protocol):
    """Ids are plain ints. No start token is ever added: the chat template writes its own."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Control tokens written out in ``text`` become their ids."""
        ...

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """``special`` keeps control tokens in the text."""
        ...

    def id_of(self, token: str) -> int | None: ...

    def token_of(self, id: int) -> str: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer; ``tokenizer.json`` wins when both are there.

    Raises:
        FileNotFoundError: neither file exists. CheckpointError: the file is damaged.
    """
    if (folder / "tokenizer.json").is_file():
        return FastTokenizer(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder / "tokenizer.model")
    raise FileNotFoundError(f"{folder} has neither tokenizer.json nor tokenizer.model; download it again")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({' '.join(str(error).split()):.200}); download it again")


class FastTokenizer:
    def __init__(self, path: Path):
        import tokenizers

        try:
            self._inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises a bare Exception for a damaged file
            raise _damaged(path, error) from error
        self.vocab_size = self._inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=not special)

    def id_of(self, token: str) -> int | None:
        return self._inner.token_to_id(token)

    def token_of(self, id: int) -> str:
        return self._inner.id_to_token(id) or f"<{id}>"


class SentencePieceTokenizer:
    def __init__(self, path: Path):
        import sentencepiece

        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise _damaged(path, error) from error
        self.vocab_size = self._inner.vocab_size()
        control = [self._inner.id_to_piece(i) for i in range(self.vocab_size) if self._control(i)]
        longest_first = sorted(map(re.escape, filter(None, control)), key=len, reverse=True)
        self._written_out = re.compile(f"({'|'.join(longest_first)})" if longest_first else r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Piece by piece between control tokens, which sentencepiece itself would spell out."""
        ids: list[int] = []
        for i, part in enumerate(self._written_out.split(text)):
            if i % 2:
                ids.append(self._inner.piece_to_id(part))
            elif part:
                ids += self._inner.encode(part)
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        ids = [int(i) for i in ids if 0 <= i < self.vocab_size]  # as tokenizers drops what it does not know
        if not special:
            return self._inner.decode([i for i in ids if not self._control(i)])
        parts: list[str] = []
        run: list[int] = []
        for i in ids:
            if self._control(i):  # sentencepiece itself drops control tokens from text
                parts += [self._inner.decode(run), self._inner.id_to_piece(i)]
                run = []
            else:
                run.append(i)
        return "".join([*parts, self._inner.decode(run)])

    def _control(self, id: int) -> bool:
        return self._inner.is_control(id) or self._inner.is_unknown(id)

    def id_of(self, token: str) -> int | None:
        found = self._inner.piece_to_id(token)
        return found if self._inner.id_to_piece(found) == token else None

    def token_of(self, id: int) -> str:
        return self._inner.id_to_piece(id) if 0 <= id < self.vocab_size else f"<{id}>"
