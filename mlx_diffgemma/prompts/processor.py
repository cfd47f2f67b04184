"""The processor that ``load`` returns beside the model: everything between text and ids, of one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import GenerationConfig
from ..errors import OptionError
from .chat import Message, checked, load_template, render, special_tokens
from .parse import CLOSE, OPEN, Parsed, parse
from .tokenizer import Tokenizer, load_tokenizer

Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Processor:
    """``generation`` is the checkpoint's generation_config.json; calls override it option by option."""

    tokenizer: Tokenizer
    template: str | None
    tokens: Mapping[str, str]
    generation: GenerationConfig

    @classmethod
    def from_folder(cls, folder: Path, generation: GenerationConfig) -> Processor:
        return cls(load_tokenizer(folder), load_template(folder), special_tokens(folder), generation)

    def prompt_ids(
        self, prompt: Prompt, *, enable_thinking: bool | None = None, system: str | None = None
    ) -> tuple[int, ...]:
        """Ids of a chat prompt. A string is one user message; a list of messages is a conversation.

        Raises:
            OptionError: an empty prompt, malformed messages, or no chat template to render them with.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise OptionError("the prompt is empty; write something to answer")
            prompt = [{"role": "user", "content": prompt}]
        if system is not None:
            prompt = [{"role": "system", "content": system}, *checked(prompt)]
        if self.template is None:
            raise OptionError("this checkpoint has no chat template; put its chat_template.jinja beside the weights")
        text = render(self.template, prompt, tokens=self.tokens, enable_thinking=enable_thinking)
        return tuple(self.tokenizer.encode(text))

    def parse(self, ids: Sequence[int]) -> Parsed:
        """The answer and the thoughts in visible ids."""
        if self.tokenizer.id_of(OPEN) is None:
            return Parsed(self.tokenizer.decode(ids), "")
        markers = {self.tokenizer.id_of(OPEN), self.tokenizer.id_of(CLOSE)}
        return parse(self._decode_keeping(ids, markers))

    def _decode_keeping(self, ids: Sequence[int], kept: set[int | None]) -> str:
        """Text with the control tokens of ``kept`` written out and all others dropped."""
        parts: list[str] = []
        start = 0
        for i, id in enumerate(ids):
            if id in kept:
                parts += [self.tokenizer.decode(ids[start:i]), self.tokenizer.token_of(id)]
                start = i + 1
        return "".join([*parts, self.tokenizer.decode(ids[start:])])
