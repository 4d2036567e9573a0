"""Tool parsers on junk: they never raise, never hang, and give what a format's own writer wrote."""

import json
import string
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentrl.rollout.tool_parsers import ParseFailure, tool_parsers
from agentrl.types import ToolCall

PARSERS = tool_parsers()
FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>", "<arg_key>", "</arg_key>",
    "<arg_value>", "</arg_value>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|channel|>", "commentary",
    "to=functions.f", "<|constrain|>", "<|message|>", "<|call|>", "<|end|>", "<|start|>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "```json", "```", "<|python_start|>",
    "<|python_end|>", "<function_calls>", "</function_calls>", "<think>", "</think>", "[THINK]", "[/THINK]", '{"name": "f"',
    '"arguments": ', '"parameters": ', "{", "}", "[", "]", "(", ")", ",", ":", ";", '"', "'", "'''", '"""', "\\", "f(", "a=", "f",
    ">", "\n", " ", "1", "-", "é", "\ud800", "\x00", "lambda: ", "not ", "*", "#", "f'{", "1e999", "9" * 5000,
)  # fmt: skip
JUNK = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=6), max_size=40).map("".join)
names = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=12).map(lambda s: "f" + s)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=12).filter(lambda s: "\r" not in s),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.sampled_from(["a", "b", "code"]), values, max_size=3)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=JUNK, is_cut=st.booleans())
def test_no_text_makes_a_parser_raise(text: str, is_cut: bool) -> None:
    for name, parser in PARSERS.items():
        found = parser.find_calls(text, is_cut=is_cut)
        assert len(found) <= 64, name
        for call in found:
            if isinstance(call, ParseFailure):
                assert call.reason, name
            else:
                assert call.name, name
                json.dumps(dict(call.arguments), allow_nan=True).encode()


def _written(name: str, tool: str, given_: dict[str, Any]) -> str:
    text = json.dumps(given_, ensure_ascii=False)
    literal = ", ".join(f"{k}={v!r}" for k, v in given_.items())
    return {
        "hermes": f'<tool_call>\n{{"name": "{tool}", "arguments": {text}}}\n</tool_call>',
        "llama3_json": f'{{"name": "{tool}", "parameters": {text}}}',
        "mistral": f'[TOOL_CALLS] [{{"name": "{tool}", "arguments": {text}}}]',
        "gpt_oss": f"<|channel|>commentary to=functions.{tool} <|constrain|>json<|message|>{text}",
        "deepseek": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{tool}<｜tool▁sep｜>{text}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "pythonic": f"[{tool}({literal})]",
    }[name]


@settings(max_examples=60, deadline=None)
@given(tool=names, given_=arguments)
@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "gpt_oss", "deepseek", "pythonic"])
def test_a_well_formed_call_comes_back_as_it_was_written(name: str, tool: str, given_: dict[str, Any]) -> None:
    (call,) = PARSERS[name].find_calls(_written(name, tool, given_))
    assert isinstance(call, ToolCall), call
    assert (call.name, call.arguments) == (tool, given_)


texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="<>"), max_size=20)


@settings(max_examples=60, deadline=None)
@given(tool=names, given_=st.dictionaries(st.sampled_from(["a", "b", "code"]), texts, max_size=3))
def test_values_between_tags_come_back_as_text(tool: str, given_: dict[str, str]) -> None:
    pairs = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in given_.items())
    xml = f"<tool_call>\n<function={tool}>\n{pairs}</function>\n</tool_call>"
    glm = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in given_.items())
    for name, text in (("qwen3_coder", xml), ("glm", f"<tool_call>{tool}\n{glm}</tool_call>")):
        (call,) = PARSERS[name].find_calls(text)
        assert isinstance(call, ToolCall), call
        assert (call.name, call.arguments) == (tool, given_)


STARTS = (
    "", "[f(", "[f(a=", "<|python_start|>[f(a=(", "[TOOL_CALLS] [", "[TOOL_CALLS]f[ARGS]{", '{"name": "f", "parameters": ', "<tool_call>",
    "<tool_call>\n<function=f>\n", "<tool_call>f\n", "<｜tool▁calls▁begin｜>", "<|channel|>commentary to=functions.f<|message|>{",
)  # fmt: skip


def test_long_junk_takes_time_in_proportion_to_its_length() -> None:
    """The longest text that a turn can hold, of every fragment repeated: far below a second each, or it is not linear."""
    slow: list[tuple[str, str, str, float]] = []
    for fragment in FRAGMENTS[:-1]:
        for start in STARTS:
            text = start + fragment * (40_000 // len(fragment))
            for name, parser in PARSERS.items():
                began = time.process_time()
                parser.find_calls(text)
                took = time.process_time() - began
                if took > 5.0:
                    slow.append((name, start, fragment, took))
    assert slow == []
