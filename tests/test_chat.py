"""Chat templates against transformers' renderer, and templates that misbehave."""

import json
import re
from datetime import datetime
from typing import Any

import pytest

from moe_engine.chat import render_chat
from moe_engine.errors import ConfigError, ModelFormatError
from moe_engine.tokenizer import Tokenizer

Message = dict[str, Any]

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set state = namespace(last=messages|length - 1, search=true) %}
{%- for message in messages[::-1] %}
    {%- if state.search and message.role == 'user' and message.content is string %}
        {%- set state.search = false %}
        {%- set state.last = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and tools %}{% continue %}{% endif %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < state.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
        {{- call.arguments if call.arguments is string else call.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system='') %}"
    "{%- for m in messages %}{%- if m['role'] == 'system' %}{% set ns.system = m['content'] %}{%- endif %}"
    "{%- endfor %}{{ bos_token }}{{ ns.system }}"
    "{%- for m in messages %}"
    "{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{%- elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}{%- endif %}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

MISTRAL = """\
{{ bos_token }}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
 [INST] {{ message['content'] | trim }} [/INST]
    {% else %}
{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""

HI: list[Message] = [{"role": "user", "content": "Hi <b> & 'you' é漢🦙"}]
TALK: list[Message] = [
    *HI,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"},
    {"role": "user", "content": " And\nnow? "},
]
SYSTEM: list[Message] = [{"role": "system", "content": "Be brief."}, *TALK]
CALLS: list[Message] = [
    *SYSTEM,
    {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": "<é>", "y": [1]}}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "does <this> & \"that\" 'é'"}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        *((template, messages) for template in (CHATML, DEEPSEEK) for messages in (HI, TALK, SYSTEM, CALLS)),
        *((MISTRAL, messages) for messages in (HI, TALK)),
    ],
)
@pytest.mark.parametrize(
    "variables", [{}, {"tools": TOOLS}, {"enable_thinking": False}, {"add_generation_prompt": False}]
)
def test_same_text_as_transformers(template: str, messages: list[Message], variables: Message) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    given = {"add_generation_prompt": True, "tools": None, "documents": None, **TOKENS, **variables}
    theirs, _ = utils.render_jinja_template([messages], chat_template=template, **given)
    assert [render_chat(template, "m.gguf", messages, given)] == theirs


def render(template: str, messages: list[Message] = HI, **variables: Any) -> str:
    return render_chat(template, "m.gguf: tokenizer.chat_template", messages, variables)


def test_helpers() -> None:
    assert render("{{ messages[0].content | tojson }}") == json.dumps(HI[0]["content"], ensure_ascii=False)
    assert render("{{ x | tojson(indent=1, sort_keys=true) }}", x={"b": 1, "a": 2}) == '{\n "a": 2,\n "b": 1\n}'
    assert render("{{ x | tojson(separators=(',', ':')) }}", x={"a": [1, 2]}) == '{"a":[1,2]}'
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_refusal_is_the_users_to_fix() -> None:
    with pytest.raises(ConfigError, match=r"m.gguf.*does not accept.*roles must alternate"):
        render(MISTRAL, SYSTEM, **TOKENS)


@pytest.mark.parametrize("template", ["{% if %}", "{{ 'a' ", "{% endfor %}", "{% nonsense %}", "{{ x | no_such }}"])
def test_broken_template(template: str) -> None:
    with pytest.raises(ModelFormatError, match=r"m.gguf: tokenizer.chat_template: invalid Jinja, line 1"):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ ('%s' | attr('format')).__self__.__class__.mro() }}",
        "{{ 10 ** 10 ** 10 }}",
    ],
)
def test_forbidden_template(template: str) -> None:
    with pytest.raises(ModelFormatError, match=r"m.gguf: .*forbidden"):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].nothing.more }}",
        "{{ messages[0].content + 1 }}",
        "{{ range(10000000) | list }}",
        "{{ 1 / 0 }}",
        "{{ x | tojson }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_template_that_fails_on_these_messages(template: str) -> None:
    with pytest.raises(ConfigError, match=r"m.gguf: .*cannot render these messages"):
        render(template, x=object())


@pytest.mark.parametrize("messages", ["hi", ["hi"], [None], [("role", "user")]])
def test_messages_of_the_wrong_shape(messages: Any) -> None:
    with pytest.raises(ConfigError, match="list of mappings"):
        render(CHATML, messages)


# Through the tokenizer.

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def tokenizer(templates: dict[str, str], **changes: Any) -> Tokenizer:
    plain = [chr(byte) for byte in range(33, 127)] + ["Ġ", "Ċ"]
    metadata = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": [*CONTROL, *plain],
        "token_type": [3] * len(CONTROL) + [1] * len(plain),
        "merges": [],
        "bos_token_id": 0,
        "eos_token_id": 3,
        **changes,
    }
    keyed = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    keyed |= {f"tokenizer.chat_template{name}": text for name, text in templates.items()}
    return Tokenizer.from_metadata(keyed, "m.gguf")


def test_chat_prompt() -> None:
    chat = tokenizer({"": CHATML})
    user = [{"role": "user", "content": "Hi"}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = chat.chat_prompt(user)
    assert chat.decode(ids, skip_special=False) == text
    assert ids == chat.encode(text, parse_special=True)
    assert ids[0] == CONTROL.index("<|im_start|>")
    quiet = chat.decode(chat.chat_prompt(user, enable_thinking=False), skip_special=False)
    assert quiet == text + "<think>\n\n</think>\n\n"
    assert chat.decode(chat.chat_prompt(user, add_generation_prompt=False)) == "user\nHi\n"


@pytest.mark.parametrize("template", [DEEPSEEK, DEEPSEEK.replace("{{ bos_token }}", "")])
@pytest.mark.parametrize("add_bos", [True, False])
def test_one_bos_at_most(template: str, add_bos: bool) -> None:
    ids = tokenizer({"": template}, add_bos_token=add_bos).chat_prompt([{"role": "user", "content": "Hi"}])
    assert ids.count(0) == int(add_bos or template is DEEPSEEK)
    assert 0 not in ids[1:]


def test_template_for_tools() -> None:
    chat = tokenizer({"": "plain", ".tool_use": "{{ tools[0].function.name }}"})
    assert chat.decode(chat.chat_prompt(HI)) == "plain"
    assert chat.decode(chat.chat_prompt(HI, tools=TOOLS)) == "f"


def test_no_template() -> None:
    with pytest.raises(ConfigError, match=re.escape("m.gguf has no chat template; give a plain prompt")):
        tokenizer({}).chat_prompt(HI)


def test_errors_name_the_template() -> None:
    with pytest.raises(ModelFormatError, match=r"m\.gguf: tokenizer\.chat_template\.tool_use: invalid"):
        tokenizer({"": "", ".tool_use": "{% if %}"}).chat_prompt(HI, tools=TOOLS)
