"""Messages to prompt text, by the checkpoint's own Jinja template. Nothing about the format is hard-coded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OptionError
from ..json_file import read_json

Message = Mapping[str, Any]


def load_template(folder: Path) -> str | None:
    """chat_template.jinja, or the template inside tokenizer_config.json; ``None`` where there is neither."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not UTF-8 text ({error.reason}); download it again") from error
    settings = folder / "tokenizer_config.json"
    found = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(found, list):  # several by name, as transformers once wrote them
        found = next(
            (row.get("template") for row in found if isinstance(row, dict) and row.get("name") == "default"), 0
        )
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{settings}: chat_template is {found!r:.80}, expected a text; download it again")
    return found


def special_tokens(folder: Path) -> dict[str, str]:
    """The ``bos_token`` etc. that templates refer to, as text."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    texts: dict[str, str] = {}
    for name in names:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if value and not isinstance(text, str):
            raise CheckpointError(f"{path}: {name} is {value!r:.80}, expected a text; download it again")
        if text:
            texts[name] = text
    return texts


def checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as plain dicts; ``OptionError`` for anything but {"role", "content"} with text content."""
    rows = [] if messages is None or isinstance(messages, str | bytes | Mapping) else _listed("messages", messages)
    if not rows:
        raise OptionError(
            f"messages is {messages!r:.80}; give a list of at least one {{'role': 'user', 'content': ...}}"
        )
    for i, message in enumerate(rows):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise OptionError(f"messages[{i}] is {message!r:.200}; each needs 'role' and 'content'")
        if not isinstance(message["role"], str):
            raise OptionError(f"messages[{i}] has role {message['role']!r:.80}; give a text such as 'user'")
        _check_content(f"messages[{i}]", message["content"])
    return [dict(message) for message in rows]


def _listed(name: str, value: Any) -> list[Any]:
    try:
        return list(value)
    except TypeError:
        raise OptionError(f"{name} is {value!r:.80}; give a list") from None


def _check_content(where: str, content: Any) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise OptionError(f"{where} has content {content!r:.80}; give a text, or a list of parts of type 'text'")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text":
            raise OptionError(f"{where} has content of type {kind!r:.80}; only text is read by this version")
        if not isinstance(part.get("text"), str):
            raise OptionError(f"{where} has a text part without text: {part!r:.80}; put it under 'text'")


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

    rows = checked(messages)
    if not isinstance(enable_thinking, bool | None):
        raise OptionError(f"enable_thinking={enable_thinking!r:.80} must be True, False or None")
    if enable_thinking and "enable_thinking" not in template:
        raise OptionError("enable_thinking=True: this checkpoint's chat template has no thinking mode; leave it out")
    switches = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    if not READS_PARTS.search(template):
        rows = [row | {"content": _joined(row["content"])} for row in rows]
    names = {"messages": rows, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    try:
        return _compiled(template).render(**{**tokens, **names, **switches})
    except (jinja2.TemplateError, *FAULTS) as error:  # the template is code, the checkpoint's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"the checkpoint's chat template refuses these messages: {reason}") from error


FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
READS_PARTS = re.compile(r"""\[\s*['"]type['"]\s*\]|\.type\b|\.get\(\s*['"]type['"]""")


def _joined(content: str | Sequence[Message]) -> str:
    """Content for a template that never looks at a part's type: it would print the list itself."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _compiled(template: str) -> Any:
    """The environment of transformers' ``apply_chat_template``: sandboxed, trimmed blocks, its helpers."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what a model wrote, for training; the text is its body."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
