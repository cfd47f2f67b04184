"""Chat prompts by the checkpoint's own template: the text that transformers renders, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import CheckpointError, OptionError, UserError
from mlx_diffgemma.hub import DEMO
from mlx_diffgemma.prompts.chat import load_template, render, special_tokens
from mlx_diffgemma.prompts.processor import Processor

GEMMA = """\
{%- macro strip_thinking(text) -%}
    {%- set ns = namespace(result='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- if '<|channel>' in part -%}
            {%- set ns.result = ns.result + part.split('<|channel>')[0] -%}
        {%- else -%}
            {%- set ns.result = ns.result + part -%}
        {%- endif -%}
    {%- endfor -%}
    {{- ns.result | trim -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set loop_messages = messages -%}
{%- set leading = messages[0]['role'] in ['system', 'developer'] -%}
{%- if enable_thinking is defined and enable_thinking or tools is not none or leading -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking is defined and enable_thinking -%}
        {{- '<|think|>\\n' -}}
    {%- endif -%}
    {%- if leading -%}
        {{- messages[0]['content'] | trim -}}
        {%- set loop_messages = messages[1:] -%}
    {%- endif -%}
    {%- if tools is not none -%}
        {{- tools | tojson(separators=(',', ':')) -}}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {%- if role not in ['user', 'model'] -%}
        {{- raise_exception('Unknown role: ' ~ message['role']) -}}
    {%- endif -%}
    {%- if message['content'] == 'SKIP' -%}{%- continue -%}{%- endif -%}
    {%- if message['content'] == 'END' -%}{%- break -%}{%- endif -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if message['content'] is string -%}
        {%- if role == 'model' -%}
            {%- generation -%}{{- strip_thinking(message['content']) -}}{%- endgeneration -%}
        {%- else -%}
            {{- message['content'] | trim -}}
        {%- endif -%}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{- item['text'] | trim -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message.get('data') is not none and message.get('data') is defined -%}
        {{- message['data'] | tojson -}}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
    {%- if not (enable_thinking is defined and enable_thinking) -%}
        {{- '<|channel>thought\\n<channel|>' -}}
    {%- endif -%}
{%- endif -%}
"""
TOKENS = {"bos_token": "<bos>", "eos_token": "<turn|>", "pad_token": "<pad>", "unk_token": "<unk>"}
USER = {"role": "user", "content": "  Why is the sky blue?\n"}
ANSWER = {"role": "assistant", "content": "<|channel>thought\nwaves<channel|>Blue. "}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "system": [{"role": "system", "content": " Be brief. "}, USER],
    "developer": [{"role": "developer", "content": "Be brief."}, USER],
    "several turns": [USER, ANSWER, {"role": "user", "content": "And at night?"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " one "}, {"type": "text", "text": "two\n"}]}],
    "continue and break": [{"role": "user", "content": "SKIP"}, USER, {"role": "user", "content": "END"}, ANSWER],
    "other fields": [USER | {"data": {"name": "Zoë <b> & 'c'", "n": [1, True, None]}}],
    "marked-up text": [{"role": "user", "content": "<b> & {{ 1 + 1 }} {% x %} 'q' \"r\" 🌍"}],
}
THINKING = [None, False, True]


@pytest.fixture(scope="module")
def official() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(DEMO)


@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_prompts_are_those_of_transformers(conversation: str, thinking: bool | None, official: PreTrainedTokenizerFast):
    messages = CONVERSATIONS[conversation]
    switch = {} if thinking is None else {"enable_thinking": thinking}
    for prompt in (True, False):
        theirs = official.apply_chat_template(
            messages, chat_template=GEMMA, tokenize=False, add_generation_prompt=prompt, **switch
        )
        ours = render(GEMMA, messages, tokens=TOKENS, enable_thinking=thinking, add_generation_prompt=prompt)
        assert ours == theirs


def test_the_format_itself():
    """Against the written specification, so that both sides being wrong is noticed."""
    messages = [CONVERSATIONS["system"][0], USER, ANSWER, USER]
    turns = "<|turn>user\nWhy is the sky blue?<turn|>\n"
    rest = f"{turns}<|turn>model\nBlue.<turn|>\n{turns}<|turn>model\n"
    plain = render(GEMMA, messages, tokens=TOKENS)
    assert plain == f"<bos><|turn>system\nBe brief.<turn|>\n{rest}<|channel>thought\n<channel|>"
    thinking = render(GEMMA, messages, tokens=TOKENS, enable_thinking=True)
    assert thinking == f"<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n{rest}"


def test_the_whitespace_around_blocks_is_that_of_transformers(official: PreTrainedTokenizerFast):
    """Templates without dashes rely on trimmed and stripped blocks; each stray line break is a token."""
    template = (
        "{{ bos_token }}\n{% for m in messages %}\n  {% if m.role %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n"
    )
    ours = render(template, [USER, ANSWER], tokens=TOKENS)
    assert ours == official.apply_chat_template([USER, ANSWER], chat_template=template, tokenize=False)


def test_the_demo_template_renders_as_in_transformers(official: PreTrainedTokenizerFast):
    messages = [USER, ANSWER, USER]
    ours = render(load_template(DEMO), messages, tokens=special_tokens(DEMO))
    theirs = official.apply_chat_template(
        messages, chat_template=load_template(DEMO), tokenize=False, add_generation_prompt=True
    )
    assert ours == theirs


def test_a_template_that_knows_only_texts_gets_a_text():
    """It would print the list as Python writes it: [{'type': 'text' ...}] reaches the model, and nothing complains."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    messages = [{"role": "user", "content": content} for content in ("a", parts, tuple(parts))]
    assert render(template, messages, tokens={}) == "a|a b|a b|"


MESSAGES: dict[str, tuple[Any, str]] = {
    "none": (None, "messages is None"),
    "empty": ([], "messages is []"),
    "a text": ("hello", "'hello'"),
    "a number": (3, "messages is 3"),
    "a single message": ({"role": "user", "content": "x"}, "'role': 'user'"),
    "a list of texts": (["hello"], "messages[0] is 'hello'"),
    "no role": ([{"content": "x"}], "messages[0]"),
    "no content": ([USER, {"role": "user"}], "messages[1]"),
    "role a number": ([{"role": 1, "content": "x"}], "role 1"),
    "content null": ([{"role": "user", "content": None}], "content None"),
    "content a number": ([{"role": "user", "content": 3}], "content 3"),
    "content an object": ([{"role": "user", "content": {"type": "text", "text": "x"}}], "content {"),
    "an image": ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "'image'"),
    "an image after a text": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "audio"}]}],
        "audio",
    ),
    "a bare text as part": ([{"role": "user", "content": ["x"]}], "'str'"),
    "a part without type": ([{"role": "user", "content": [{"text": "x"}]}], "None"),
    "a text part without text": ([{"role": "user", "content": [{"type": "text"}]}], "text part"),
    "a text part of number": ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "text part"),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_malformed_messages(kind: str):
    messages, part = MESSAGES[kind]
    with pytest.raises(OptionError) as error:
        render(GEMMA, messages, tokens=TOKENS)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_messages_may_be_any_sequence_and_are_left_as_they_are():
    """A generator consumed by the check would render an empty conversation."""
    expected = render(GEMMA, [USER], tokens=TOKENS)
    assert render(GEMMA, (USER,), tokens=TOKENS) == render(GEMMA, (m for m in [USER]), tokens=TOKENS) == expected
    assert USER == {"role": "user", "content": "  Why is the sky blue?\n"}


FAILING = {
    "its own refusal": ("{{ raise_exception('only\nuser turns') }}", "only user turns"),
    "syntax": ("{% if %}", "Expected"),
    "an undefined name": ("{{ nothing.at.all }}", "undefined"),
    "an operation": ("{{ messages + 1 }}", "list"),
    "a division": ("{{ 1 / 0 }}", "division"),
    "a filter": ("{{ 1 | no_such_filter }}", "no_such_filter"),
    "a huge range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range"),
    "a forbidden attribute": ("{{ ''.__class__.__mro__ }}", "__class__"),
    "endless recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
}


@pytest.mark.parametrize("kind", FAILING)
def test_a_template_that_fails_is_one_line(kind: str):
    """A template is the checkpoint's code: whatever it raises is the checkpoint's fault, in one line."""
    template, part = FAILING[kind]
    with pytest.raises(CheckpointError) as error:
        render(template, [USER], tokens=TOKENS)
    assert "chat template" in str(error.value) and part in str(error.value) and "\n" not in str(error.value)


def test_thinking_asked_of_a_template_without_it():
    """Silently answering without thoughts is the swallowed option."""
    template = "{{ messages[0].content }}"
    with pytest.raises(OptionError, match="enable_thinking=True"):
        render(template, [USER], tokens=TOKENS, enable_thinking=True)
    assert render(template, [USER], tokens=TOKENS, enable_thinking=False) == USER["content"]
    with pytest.raises(OptionError, match="enable_thinking='no'"):
        render(GEMMA, [USER], tokens=TOKENS, enable_thinking="no")


def folder_with(folder: Path, template: Any = None, file: bytes | None = None, **settings: Any) -> Path:
    for name in ("tokenizer.json",):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if file is not None:
        (folder / "chat_template.jinja").write_bytes(file)
    return folder


def test_where_the_template_comes_from(tmp_path: Path):
    """Older repositories keep it in tokenizer_config.json, once even several by name; the file wins."""
    assert load_template(folder_with(tmp_path)) is None
    assert load_template(folder_with(tmp_path, template="from settings")) == "from settings"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert load_template(folder_with(tmp_path, template=named)) == "d"
    assert load_template(folder_with(tmp_path, template="from settings", file=b"from file")) == "from file"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_template(tmp_path) is None and special_tokens(tmp_path) == {}


@pytest.mark.parametrize("template", [3, {"default": 1}, [{"name": "other", "template": "t"}], [1]], ids=repr)
def test_a_template_that_is_no_text(template: Any, tmp_path: Path):
    with pytest.raises(CheckpointError, match="chat_template is"):
        load_template(folder_with(tmp_path, template=template))
    with pytest.raises(CheckpointError, match="not UTF-8"):
        load_template(folder_with(tmp_path, file=b"\xff\xfe"))


def test_special_tokens_as_texts_and_as_objects(tmp_path: Path):
    folder = folder_with(tmp_path, bos_token={"content": "<bos>", "lstrip": False}, eos_token="<eos>", pad_token=None)
    assert special_tokens(folder) == {"bos_token": "<bos>", "eos_token": "<eos>"}
    with pytest.raises(CheckpointError, match="bos_token is 3"):
        special_tokens(folder_with(tmp_path, bos_token=3))


def test_no_template_at_all_is_one_line(tmp_path: Path):
    processor = Processor.from_folder(folder_with(tmp_path), GenerationConfig())
    with pytest.raises(UserError) as error:
        processor.prompt_ids("hello")
    assert "chat_template.jinja" in str(error.value) and "\n" not in str(error.value)


def test_prompts_of_the_processor():
    """A text is one user message; ``system`` goes before it; blank prompts are refused."""
    processor = Processor.from_folder(DEMO, GenerationConfig())
    text = processor.tokenizer.decode(processor.prompt_ids("Hi"), special=True)
    assert text == "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"
    assert processor.prompt_ids([{"role": "user", "content": "Hi"}]) == processor.prompt_ids("Hi")
    with_system = processor.prompt_ids("Hi", system="Be brief.")
    both = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert with_system == processor.prompt_ids(both) != processor.prompt_ids("Hi")
    for blank in ("", " \n"):
        with pytest.raises(OptionError, match="empty"):
            processor.prompt_ids(blank)
    for wrong in (None, 3, [3], b"Hi"):
        with pytest.raises(OptionError):
            processor.prompt_ids(wrong, system="Be brief.")
