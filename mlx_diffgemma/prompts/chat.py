"""Messages to prompt text, by the checkpoint's own Jinja template. Nothing about the format is hard-coded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config import read_json
from ..errors import CheckpointError, OptionError

Message = Mapping[str, Any]


def load_template(folder: Path) -> str | None:
    """chat_template.jinja, or the template inside tokenizer_config.json; ``None`` where there is neither."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    return read_json(settings).get("chat_template") if settings.is_file() else None


def special_tokens(folder: Path) -> dict[str, str]:
    """The ``bos_token`` etc. that templates refer to, as text."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    found = {name: settings[name] for name in names if settings.get(name)}
    return {name: value["content"] if isinstance(value, dict) else value for name, value in found.items()}


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ``OptionError`` for anything but a list of {"role", "content"} with text content."""
    if not messages:
        raise OptionError("messages is empty; give at least one {'role': 'user', 'content': ...}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise OptionError(f"messages[{i}] is {message!r}; each needs 'role' and 'content'")
        content = message["content"]
        parts = [] if isinstance(content, str) else content
        kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in parts or []]
        if content is None or any(kind != "text" for kind in kinds):
            raise OptionError(f"messages[{i}] has content of type {kinds or None}; only text is read by this version")


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tokens: Mapping[str, str],
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt text. ``enable_thinking`` ``None`` leaves the choice to the template.

    Raises:
        OptionError: malformed messages, or thinking asked of a template that has no such switch.
        CheckpointError: the template itself fails.
    """
    import jinja2

    check_messages(messages)
    if enable_thinking and "enable_thinking" not in template:
        raise OptionError("enable_thinking=True: this checkpoint's chat template has no thinking mode")
    switches = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    try:
        return _compiled(template).render(
            messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt, **tokens, **switches
        )
    except jinja2.TemplateError as error:
        raise CheckpointError(f"the chat template refuses these messages: {error}") from error


def _compiled(template: str) -> Any:
    """The environment of transformers' ``apply_chat_template``: sandboxed, trimmed blocks, its helpers."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
