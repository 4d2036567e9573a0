"""Filling the compiled template gives what ``apply_chat_template`` gives."""

from typing import Any

import pytest
from tool_families import FAMILIES, family_tokenizer

from agentrl.rollout.template_render import TemplateRender
from agentrl.types import Message

TOOLS = [{"type": "function", "function": {"name": "f", "description": "Añade.", "parameters": {"type": "object"}}}]
CALL = {"id": "abc123XYZ", "type": "function", "function": {"name": "f", "arguments": {"a": "é", "b": [1, None, True]}}}
DIALOGUES: list[list[Message]] = [
    [{"role": "user", "content": "q <b>"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "thinking": "r", "reasoning_content": "r"},
        {"role": "tool", "name": "f", "tool_call_id": "abc123XYZ", "content": "7\n"},
    ],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "under another name"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}],
]


def outcome(render: Any, messages: list[Message], generation_prompt: bool) -> str:
    try:
        return str(render(messages, generation_prompt))
    except Exception as error:  # noqa: BLE001  # a template raises what it likes
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_every_familys_template_is_filled_directly_and_gives_the_same_text(name: str, tools: list[dict[str, Any]] | None) -> None:
    tokenizer = family_tokenizer(name)
    render = TemplateRender(tokenizer, tools=tools, template_kwargs={})
    assert render._compiled is not None  # pyright: ignore[reportPrivateUsage]
    for messages in DIALOGUES:
        for generation_prompt in (False, True):
            given = outcome(lambda m, p: render(m, generation_prompt=p), messages, generation_prompt)
            wanted = outcome(
                lambda m, p: tokenizer.apply_chat_template(m, tools=tools, tokenize=False, add_generation_prompt=p),
                messages,
                generation_prompt,
            )
            assert given == wanted


def test_settings_reach_the_template_and_those_of_transformers_itself_go_through_it() -> None:
    tokenizer = family_tokenizer("qwen3")
    template = "{{ greeting }} {{ messages[0].content }}"
    given = {"greeting": "hello"}
    question: list[Message] = [{"role": "user", "content": "q"}]
    own: dict[str, Any] = {**given, "chat_template": template}
    assert TemplateRender(tokenizer, tools=None, template_kwargs=own)(question, generation_prompt=True) == "hello q"
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        render = TemplateRender(tokenizer, tools=None, template_kwargs=given)
    finally:
        tokenizer.chat_template = before
    assert render._compiled is not None  # pyright: ignore[reportPrivateUsage]
    assert render(question, generation_prompt=True) == "hello q"


@pytest.mark.parametrize(
    "template",
    [
        "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}",
        "{{ (tools + tools) | tojson }}{{ tools[0].function | tojson(ensure_ascii=True) }}{{ messages[0].content | tojson }}",
        "{% for m in messages %}{{ m.role }}{{ m['content'] }}{{ m.nothing }}{{ m.nothing is defined }}{{ m.get('role') }}{% endfor %}",
        "{% for m in messages %}{{ m.items is callable }}{{ m.get('content') }}{% endfor %}",  # a field hides no method of a dict
        "{{ messages[0].__class__ }}",
        "{{ messages[0].pop('role') }}",
    ],
)
def test_tools_and_fields_look_to_a_template_as_they_do_through_transformers(template: str) -> None:
    tokenizer = family_tokenizer("qwen3")
    messages: list[Message] = [{"role": "user", "content": "é", "items": "a field", "pop": "another", "__class__": "a third"}]
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        render = TemplateRender(tokenizer, tools=TOOLS, template_kwargs={})
        assert render._compiled is not None  # pyright: ignore[reportPrivateUsage]
        wanted = outcome(
            lambda m, p: tokenizer.apply_chat_template(m, tools=TOOLS, tokenize=False, add_generation_prompt=p), messages, False
        )
    finally:
        tokenizer.chat_template = before
    for _ in range(2):  # what was made once is given again
        given = outcome(lambda m, p: render(m, generation_prompt=p), messages, False)
        assert given == wanted
