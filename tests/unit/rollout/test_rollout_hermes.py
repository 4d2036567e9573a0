"""Calls as small models really write them."""

import json

import pytest

from agentrl.errors import ConfigError
from agentrl.rollout.tool_parsers import FoundCall, ParseFailure, get_tool_parser
from agentrl.types import ToolCall


def find(text: str, *, is_cut: bool = False) -> list[FoundCall]:
    return get_tool_parser("hermes").find_calls(text, is_cut=is_cut)


def call(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def only_call(text: str) -> ToolCall:
    (found,) = find(text)
    assert isinstance(found, ToolCall), found
    return found


def only_failure(text: str, *, is_cut: bool = False) -> ParseFailure:
    (found,) = find(text, is_cut=is_cut)
    assert isinstance(found, ParseFailure), found
    return found


def test_a_call_has_its_name_arguments_and_text() -> None:
    found = only_call("Let me see.\n" + call('{"name": "calculator", "arguments": {"expression": "2*(8+9)"}}'))
    assert (found.name, dict(found.arguments)) == ("calculator", {"expression": "2*(8+9)"})
    assert json.loads(found.raw)["name"] == "calculator"


def test_text_without_calls_has_none() -> None:
    assert find("#### 42") == []
    assert find("") == []


def test_several_calls_keep_their_order_and_a_bad_one_does_not_hide_the_next() -> None:
    text = call('{"name": "a", "arguments": {}}') + call("{oops}") + "and" + call('{"name": "b", "arguments": {"x": 1}}')
    first, bad, last = find(text)
    assert isinstance(first, ToolCall)
    assert first.name == "a"
    assert isinstance(bad, ParseFailure)
    assert bad.raw == "{oops}"
    assert isinstance(last, ToolCall)
    assert last.name == "b"


def test_brackets_and_close_tags_inside_strings_are_text() -> None:
    code = 'print("}</tool_call>{", {"a": [1]})'
    found = only_call(call(json.dumps({"name": "run", "arguments": {"code": code}})))
    assert found.arguments["code"] == code


def test_raw_newlines_and_tabs_in_code_are_accepted() -> None:
    found = only_call(call('{"name": "run", "arguments": {"code": "for i in x:\n\tprint(i)"}}'))
    assert found.arguments["code"] == "for i in x:\n\tprint(i)"


def test_arguments_given_as_a_json_string_are_read() -> None:
    assert only_call(call(r'{"name": "f", "arguments": "{\"x\": 1}"}')).arguments == {"x": 1}
    assert "not a JSON object" in only_failure(call('{"name": "f", "arguments": "3 + 4"}')).reason


def test_missing_null_and_empty_arguments_are_no_arguments() -> None:
    assert only_call(call('{"name": "f"}')).arguments == {}
    assert only_call(call('{"name": "f", "arguments": null}')).arguments == {}
    assert only_call(call('{"name": "f", "arguments": ""}')).arguments == {}


def test_a_missing_close_tag_after_complete_json_is_forgiven() -> None:
    assert only_call('<tool_call>\n{"name": "f", "arguments": {"x": 1}}').arguments == {"x": 1}
    first, second = find('<tool_call>{"name": "a"}<tool_call>{"name": "b"}</tool_call>')
    assert isinstance(first, ToolCall)
    assert isinstance(second, ToolCall)
    assert (first.name, second.name) == ("a", "b")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{'name': 'f', 'arguments': {'x': 1}}", "double quotes"),
        ('{"name": "f", "arguments": {"x": 1,}}', "remove the comma"),
        ('{"name": "f", "arguments": {"x": True}}', "Python"),
        ('{"name": "f", "arguments": {"x": None, "y": oops}}', "Python's True, False and None"),
        ('{"name": "f", "arguments": {"x": 1}', "closing brace is missing"),
        ('{"name": "f", "arguments": {"x": NaN}}', "NaN is not JSON"),
        ('```json\n{"name": "f"}\n```', "code fence"),
        ("", "empty"),
        ("calculator(3 + 4)", "invalid JSON"),
        ('[{"name": "f"}]', "one <tool_call> block per call"),
        ('"f"', "found a string"),
        ("null", "found null"),
        ('{"arguments": {}}', '"name" is missing'),
        ('{"name": 3, "arguments": {}}', "non-empty string"),
        ('{"name": "f", "parameters": {"x": 1}}', '"arguments" is missing (found "parameters")'),
        ('{"name": "f", "arguments": [1]}', "must be an object, not a list"),
        ('{"name": "f", "arguments": {}} and more', "extra text"),
        (r'{"name": "f", "arguments": {"x": "\ud800"}}', "surrogate"),
        ("[" * 200_000, "nested too deeply"),
        ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "invalid JSON"),
    ],
)
def test_a_malformed_call_says_what_to_change(body: str, reason: str) -> None:
    failure = only_failure(call(body))
    assert reason in failure.reason
    assert len(failure.raw) <= 2000


def test_a_call_cut_by_the_token_limit_says_so() -> None:
    assert "cut off by the token limit" in only_failure('<tool_call>\n{"name": "f", "argum', is_cut=True).reason
    assert "closing brace is missing" in only_failure('<tool_call>\n{"name": "f", "x": "', is_cut=False).reason


def test_a_number_that_no_json_can_hold_is_malformed() -> None:
    assert "1e400 is too large a number" in only_failure(call('{"name": "f", "arguments": {"a": 1e400}}')).reason


def test_a_close_tag_alone_is_a_failure() -> None:
    assert "without <tool_call>" in only_failure('{"name": "f", "arguments": {}}\n</tool_call>').reason


def test_calls_in_thoughts_are_not_calls() -> None:
    thought = "<think>maybe " + call('{"name": "a"}') + "</think>"
    assert only_call(thought + call('{"name": "b"}')).name == "b"
    assert find(thought + "No.") == []
    assert find("<think>still thinking " + call('{"name": "a"}')) == []


def test_a_turn_that_repeats_itself_is_not_read_to_the_end() -> None:
    assert len(find("<tool_call>" * 20_000)) == 64
    assert len(find("</tool_call>" * 20_000)) == 64
    assert len(find(call('{"name": "a"}') * 20_000)) == 64


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Did you mean `hermes`"):
        get_tool_parser("herms")
