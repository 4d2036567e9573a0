"""Calls of every format as models really write them: well formed, nearly so, broken, cut, and mentioned without being meant."""

from typing import Any

import pytest

from agentrl.errors import ConfigError
from agentrl.rollout.tool_parsers import ParseFailure, get_tool_parser, tool_parsers
from agentrl.types import ToolCall

Expected = list[tuple[str, dict[str, Any]] | str]
"""Per call found: its name and arguments, or a part of the reason it is none."""
Case = tuple[str, Expected]


def check(name: str, text: str, expected: Expected, *, is_cut: bool = False) -> None:
    found = get_tool_parser(name).find_calls(text, is_cut=is_cut)
    shown = [(c.name, dict(c.arguments)) if isinstance(c, ToolCall) else c.reason for c in found]
    assert len(shown) == len(expected), shown
    for got, wanted in zip(shown, expected, strict=True):
        if isinstance(wanted, str):
            assert isinstance(got, str)
            assert wanted in got
        else:
            assert got == wanted
    assert all(len(c.raw) <= 2000 for c in found if isinstance(c, ParseFailure))


CUT = "cut off by the token limit"
CODE = 'print("<b>}")\nif a < b:\n\tpass'


def xml(name: str, **values: str) -> str:
    pairs = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function={name}>\n{pairs}</function>\n</tool_call>"


QWEN3_CODER: list[Case] = [
    (xml("f", a="1", b="x y"), [("f", {"a": "1", "b": "x y"})]),
    (xml("f"), [("f", {})]),
    ("Let me see.\n" + xml("f", code=CODE), [("f", {"code": CODE})]),
    (xml("f", a='{"b": [1, "漢字 🧮"]}'), [("f", {"a": '{"b": [1, "漢字 🧮"]}'})]),
    (xml("f", a="\nkept\n"), [("f", {"a": "\nkept\n"})]),
    (xml("f", a="") + "\n" + xml("g", b="2"), [("f", {"a": ""}), ("g", {"b": "2"})]),
    ("<tool_call><function=f><parameter=a>1</parameter></function></tool_call>", [("f", {"a": "1"})]),
    ('<tool_call>\n<function="f">\n<parameter="a">\n1\n</parameter>\n</function>\n</tool_call>', [("f", {"a": "1"})]),
    ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>", [("f", {"a": "1"})]),
    (xml("f", a="1").replace("</parameter>\n", "") + xml("g"), ["</parameter> is missing after the value of 'a'", ("g", {})]),
    ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</tool_call>" + xml("g"), ["belongs", ("g", {})]),
    (xml("f", a="1").replace("<tool_call>\n", ""), ["<tool_call> is missing before <function="]),
    (xml("f").replace("<function=f>", "<function=>"), ["no name"]),
    (xml("f").replace("<function=f>", "<function=f"), ["'>' is missing after <function="]),
    ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', ["where <function=tool> belongs"]),
    ("<tool_call></tool_call>", ["the call is empty"]),
    (xml("f", a="1").replace("</function>", "</function> done"), ["extra text after </function>"]),
    (xml("f", a="1").replace("</function>", "<parameter=a>\n2\n</parameter>\n</function>"), ["given twice"]),
    (xml("f").replace("</function>", "<param=a>1</param></function>"), ["where <parameter=key> or </function> belongs"]),
    ("</tool_call>", ["</tool_call> without <tool_call>"]),
    ("<think>" + xml("f") + "</think>No.", []),
    ("<think>still " + xml("f"), []),
    ("<think>hm " + xml("f") + "</think>" + xml("g"), [("g", {})]),
    ("hm</think>" + xml("f") + "<think>or " + xml("g") + "</think>" + xml("h"), [("f", {}), ("h", {})]),
    (xml("f") + "<think>or " + xml("g"), [("f", {})]),
    ("Use a tool, or not.", []),
    (xml("f", a="\ud800"), ["surrogate"]),
]


def glm(name: str, **values: str) -> str:
    return (
        f"<tool_call>{name}\n"
        + "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in values.items())
        + "</tool_call>"
    )


GLM: list[Case] = [
    (glm("f", a="1", b="x y"), [("f", {"a": "1", "b": "x y"})]),
    ("<think>hm</think>\n" + glm("f", code=CODE), [("f", {"code": CODE})]),
    ("<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>", [("f", {"a": "1"})]),
    ("<tool_call>f</tool_call>", [("f", {})]),
    (glm("f") + glm("g", b='{"x": [1, "漢"]}'), [("f", {}), ("g", {"b": '{"x": [1, "漢"]}'})]),
    (glm("f", a="1").removesuffix("</tool_call>"), [("f", {"a": "1"})]),
    (glm("f", a="1").replace("</arg_key>", ""), ["</arg_key> is missing"]),
    (glm("f", a="1").replace("</arg_value>", "") + glm("g"), ["</arg_value> is missing after the value of 'a'", ("g", {})]),
    (glm("f", a="1").replace("<arg_value>", "<value>"), ["<arg_value> is missing after the key 'a'"]),
    (glm("f", a="1").replace("</tool_call>", "<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"), ["given twice"]),
    ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', ["found JSON where the tool's name belongs"]),
    ("<tool_call>\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", ["the call has no name"]),
    ("<tool_call>call f please\n</tool_call>", ["the first line must be the tool's name alone"]),
    (glm("f", a="1").replace("</tool_call>", "done</tool_call>"), ["where <arg_key> or </tool_call> belongs"]),
    ("<tool_call>f", ["</tool_call> is missing"]),
    ("x</tool_call>", ["without <tool_call>"]),
    ("<think>" + glm("f"), []),
    (glm("f", a="\udfff"), ["surrogate"]),
]

LLAMA3: list[Case] = [
    ('{"name": "f", "parameters": {"a": "1"}}', [("f", {"a": "1"})]),
    ('<|python_tag|>{"name": "f", "parameters": {"a": {"b": [1]}}}', [("f", {"a": {"b": [1]}})]),
    ('{"type": "function", "name": "f", "parameters": {}}', [("f", {})]),
    ('{"name": "f", "arguments": {"a": 1}}', [("f", {"a": 1})]),
    ('{"name": "f", "parameters": "{\\"a\\": 1}"}', [("f", {"a": 1})]),
    ('{"name": "f", "parameters": {"a": ";{"}}; {"name": "g", "parameters": {}}', [("f", {"a": ";{"}), ("g", {})]),
    ('{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}', [("f", {}), ("g", {})]),
    ('<|python_tag|>{"name": "f", "parameters": {}}; <|python_tag|>{"name": "g", "parameters": {}}', [("f", {}), ("g", {})]),
    ("{'name': 'f', 'parameters': {}}; {\"name\": \"g\", \"parameters\": {}}", ["double quotes", ("g", {})]),
    ('I will call it.\n{"name": "f", "parameters": {"a": "é 🧮"}}', [("f", {"a": "é 🧮"})]),
    ('{"name": "f", "parameters": {"a": 1}} and so on', [("f", {"a": 1}), "extra text after the call"]),
    ('{"name": "f", "parameters": {"a": 1}', ["a closing brace is missing"]),
    ('{"name": "f", "parameters": {"a": True}}', ["this is a Python literal, not JSON"]),
    ('{"name": "f", "params": {"a": 1}}', ['the key "parameters" is missing (found "params")']),
    ('{"name": 3, "parameters": {}}', ["non-empty string"]),
    ('{"name": "f", "parameters": [1]}', ["must be an object, not a list"]),
    ('{"type": "function", "function": "f", "parameters": {}}', ['"name" is missing']),
    ('<|python_tag|>brave_search.call(query="x y")', [("brave_search", {"query": "x y"})]),
    ("<|python_tag|>import math\nprint(math.pi)", ["what follows <|python_tag|> is no call"]),
    ("<|python_tag|>", ["what follows <|python_tag|> is no call"]),
    ('{"answer": 7}', []),
    ('{"type": "circle", "radius": 2}', []),
    ('It is {"name": "f", "parameters": {}} that one writes.', []),
    ("#### 7", []),
]

MISTRAL: list[Case] = [
    ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', [("f", {"a": 1})]),
    (
        '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abc123XYZ"}, {"name": "g", "arguments": {"b": [1]}}]',
        [("f", {}), ("g", {"b": [1]})],
    ),
    ('Sure.[TOOL_CALLS]f[ARGS]{"a": "漢字"}', [("f", {"a": "漢字"})]),
    ('[TOOL_CALLS]f[ARGS]{"a": "[TOOL"}[TOOL_CALLS]g[CALL_ID]abc123XYZ[ARGS]{}', [("f", {"a": "[TOOL"}), ("g", {})]),
    ('f[ARGS]{"a": 1}', [("f", {"a": 1})]),
    ('[{"name": "f", "arguments": {"a": 1}}]', [("f", {"a": 1})]),
    ('[{"name": "f", "arguments": {"a": 1}}] is how one writes it', []),
    ('[TOOL_CALLS] [{"name": "f", "arguments": {}}', [("f", {})]),
    ('[TOOL_CALLS] [{"name": "f", "arguments": "{\\"a\\": 1}"}]', [("f", {"a": 1})]),
    ('[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": }}]', [("f", {}), "invalid JSON"]),
    ("[TOOL_CALLS] [{'name': 'f', 'arguments': {}}]", ["double quotes"]),
    ('[TOOL_CALLS]f[ARGS]{"a": 1,}[TOOL_CALLS]g[ARGS]{}', ["remove the comma", ("g", {})]),
    ('[TOOL_CALLS] {"name": "f", "arguments": {}}', ["must be a list"]),
    ('[TOOL_CALLS]f{"a": 1}', ["[ARGS]"]),
    ("[TOOL_CALLS]f[ARGS][1]", ["must be an object"]),
    ("[TOOL_CALLS]f[ARGS]", ["empty"]),
    ('[TOOL_CALLS]f[ARGS]{"a": 1} done', ["extra text after the arguments"]),
    ('[TOOL_CALLS] [{"name": "f", "arguments": {}}] done', [("f", {}), "extra text after the list"]),
    ('[TOOL_CALLS] [{"name": "f", "args": {}}]', ['"arguments" is missing (found "args")']),
    ("[TOOL_CALLS] []", ["empty"]),
    ("[TOOL_CALLS] [[1]]", ["lists do not nest"]),
    ("[TOOL_CALLS]", ["after [TOOL_CALLS]"]),
    ("[THINK]maybe [TOOL_CALLS]f[ARGS]{}[/THINK]No.", []),
    ("[THINK]hm[/THINK][TOOL_CALLS]f[ARGS]{}", [("f", {})]),
    ("[1, 2]", []),
]


def harmony(name: str, arguments: str) -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"


THOUGHT = "<|channel|>analysis<|message|>I could write to=functions.f<|end|><|start|>assistant"
GPT_OSS: list[Case] = [
    (harmony("f", '{"a": 1}'), [("f", {"a": 1})]),
    (THOUGHT + harmony("f", '{"a": "漢字"}') + "<|call|>", [("f", {"a": "漢字"})]),
    (' to=functions.f<|channel|>commentary json<|message|>{"a": 1}', [("f", {"a": 1})]),
    (harmony("ns.f-1", "{}"), [("ns.f-1", {})]),
    ("<|channel|>analysis to=functions.f <|constrain|>json<|message|>{}", [("f", {})]),
    (harmony("f", "{oops}") + "<|call|><|start|>assistant" + harmony("g", "{}"), ["invalid JSON", ("g", {})]),
    (harmony("f", "{'a': 1}"), ["double quotes"]),
    (harmony("f", '{"a": 1} ok'), ["extra text after the arguments"]),
    (harmony("f", "[1]"), ["must be one JSON object"]),
    (harmony("f", ""), ["empty"]),
    (harmony("f", '{"a": 1'), ["a closing brace is missing"]),
    (harmony("f", '{"a": 1}').replace("<|message|>", ""), ["<|message|> is missing"]),
    ("<|channel|>commentary to=python <|constrain|>code<|message|>print(1)", ["there is no recipient 'python'"]),
    (THOUGHT + "<|channel|>final<|message|>Use to=functions.f.", []),
    ("<|channel|>commentary<|message|>I will look that up.", []),
    ("<|channel|>analysis<|message|>" + "to=functions.f {}", []),
    ('analysisHm.assistantcommentary to=functions.f json{"a": 1}', [("f", {"a": 1})]),
    ("Plain text.", []),
]


def deepseek(*calls: str) -> str:
    return "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>"


def v3(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def v31(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


DEEPSEEK: list[Case] = [
    (deepseek(v3("f", '{"a": 1}')), [("f", {"a": 1})]),
    ("So:" + deepseek(v31("f", '{"a": "漢字"}'), v31("g", "{}")), [("f", {"a": "漢字"}), ("g", {})]),
    (deepseek(v3("f", "{}"), v3("g", '{"a": "```"}')), [("f", {}), ("g", {"a": "```"})]),
    (deepseek(v31("function", "{}")), [("function", {})]),
    (deepseek(v31("f", "{}")).removesuffix("<｜tool▁calls▁end｜>"), [("f", {})]),
    (deepseek(v31("f", "{}").removesuffix("<｜tool▁call▁end｜>"), v31("g", "{}")), [("f", {}), ("g", {})]),
    (deepseek(v31("f", "{'a': 1}"), v31("g", "{}")), ["double quotes", ("g", {})]),
    (deepseek(v3("f", '{"a": 1')), ["invalid JSON"]),
    (deepseek(v3("f", '{"a": 1} // done')), ["extra text after the arguments"]),
    (deepseek(v31("f", "[1]")), ["must be an object"]),
    (deepseek(v31("", "{}")), ["the call has no name"]),
    (deepseek(v31("f", "{}").replace("<｜tool▁sep｜>", "")), ["<｜tool▁sep｜> is missing"]),
    (deepseek("oops" + v31("f", "{}")), ["found 'oops' where", ("f", {})]),
    (deepseek(), ["no call follows"]),
    (v31("f", "{}"), ["<｜tool▁calls▁begin｜> is missing"]),
    (deepseek(v31("f", "{}")) + v31("g", "{}"), [("f", {}), "write all calls before it"]),
    ("<think>" + deepseek(v31("f", "{}")) + "</think>7", []),
    ("7", []),
]

PYTHONIC: list[Case] = [
    ('[f(a=1, b="x")]', [("f", {"a": 1, "b": "x"})]),
    ("[f(a=1), g()]", [("f", {"a": 1}), ("g", {})]),
    ('[f(a={"b": [1, 2.5, None, True]}, c=(1, -2))]', [("f", {"a": {"b": [1, 2.5, None, True]}, "c": [1, -2]})]),
    ("Let me look.\n[f(a='it\\'s [1] (2)')]", [("f", {"a": "it's [1] (2)"})]),
    ("<|python_start|>[f(a=1)]<|python_end|>", [("f", {"a": 1})]),
    ("<|tool_call_start|>[f(a=1), ns.g(b='漢字')]<|tool_call_end|>Done.", [("f", {"a": 1}), ("ns.g", {"b": "漢字"})]),
    ("<function_calls>\nf(a=1)\ng(b=2)\n</function_calls>", [("f", {"a": 1}), ("g", {"b": 2})]),
    ("[f(code='''a\nb''')]", [("f", {"code": "a\nb"})]),
    ("[f(1)]", ["arguments need names"]),
    ("[f(a=1, a=2)]", ["a is given twice"]),
    ("[f(a=1 b=2)]", ["not Python"]),
    ("[f(**{'a': 1})]", ["** is not possible"]),
    ("[f(a=g(1))]", ["a: only plain values are possible"]),
    ("[f(a=x), g(b=2)]", ["a: only plain values are possible", ("g", {"b": 2})]),
    ("[f(a=true)]", ["write True, False and None"]),
    ("[f(a=__import__('os').system('x'))]", ["only plain values"]),
    ("[f(a={1, 2})]", ["set is no string"]),
    ("[f(a={1: 2})]", ["keys of a dict must be strings"]),
    ("[f(a=1e999)]", ["float is no string"]),
    ("[f(a=b'x')]", ["bytes is no string"]),
    ("[f(a=1", ["is never closed"]),
    ("[f(a='x)]", ["a string is not closed"]),
    ("[f(a='''x)]", ["a string is not closed"]),
    ("[f(a=[1)]", ["found ')' where ']' belongs"]),
    ("[f(a=" + "[" * 50 + "]" * 50 + ")]", ["nested more than 20 levels"]),
    ("[f(a=1)] and more", [("f", {"a": 1}), "extra text after the calls"]),
    ("[f(a=1), oops]", [("f", {"a": 1}), "no call stands at 'oops]'"]),
    ("<function_calls></function_calls>", ["not complete"]),
    ("<|python_start|>[]<|python_end|>", ["the list of calls is empty"]),
    ("<|python_end|>", ["without <|python_start|>"]),
    ("[f(a='\ud800')]", ["surrogate"]),
    ("<think>[f(a=1)]</think>7", []),
    ("As [f(x)] shows, it is 7.", []),
    ("[1, 2, 3]", []),
    ("f(a=1)", []),
]

CASES = {
    "qwen3_coder": QWEN3_CODER, "glm": GLM, "llama3_json": LLAMA3, "mistral": MISTRAL, "gpt_oss": GPT_OSS, "deepseek": DEEPSEEK,
    "pythonic": PYTHONIC,
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), [(n, *case) for n, cases in CASES.items() for case in cases])
def test_calls_are_found_and_malformed_ones_say_what_to_change(name: str, text: str, expected: Expected) -> None:
    check(name, text, expected)


@pytest.mark.parametrize("said", ["</think>", "<think>", "<think>hm</think>", "</think> <think>"])
@pytest.mark.parametrize("before", ["", "<think>I could.</think>\n", "I could.</think>"])
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "%s"}}</tool_call>'),
        ("qwen3_coder", xml("f", a="%s")),
        ("glm", glm("f", a="%s")),
        ("llama3_json", '{"name": "f", "parameters": {"a": "%s"}}'),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": "%s"}'),
        ("deepseek", deepseek(v31("f", '{"a": "%s"}'))),
        ("pythonic", "[f(a='%s')]"),
    ],
)
def test_tags_of_reasoning_in_an_argument_are_part_of_it(name: str, written: str, before: str, said: str) -> None:
    check(name, before + written % said, [("f", {"a": said})])


def test_a_call_before_the_tag_of_another_is_not_lost() -> None:
    text = '{"name": "f", "parameters": {}}\n<|python_tag|>{"name": "g", "parameters": {}}'
    check("llama3_json", text, [("f", {}), ("g", {})])
    check("pythonic", "<function_calls>f(a='<|python_start|>')</function_calls>", [("f", {"a": "<|python_start|>"})])


@pytest.mark.parametrize(
    ("name", "text", "complete_at"),
    [
        ("qwen3_coder", xml("f", a="1"), "</function>"),
        ("glm", glm("f", a="1"), "</tool_call>"),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": "1"}}', "}}"),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "1"}}]', "}}"),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": "1"}', "}"),
        ("gpt_oss", harmony("f", '{"a": "1"}'), "}"),
        ("deepseek", deepseek(v3("f", '{"a": "1"}')), "}"),
        ("deepseek", deepseek(v31("f", '{"a": "1"}')), "}"),
        ("pythonic", "[f(a='1')]", ")"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "1"}}</tool_call>', "}}"),
    ],
)
def test_a_call_cut_anywhere_is_never_run_with_other_arguments(name: str, text: str, complete_at: str) -> None:
    parser = get_tool_parser(name)
    whole = text.rindex(complete_at) + len(complete_at)
    for end in range(1, len(text)):
        found = parser.find_calls(text[:end], is_cut=True)
        for call in found:
            if isinstance(call, ToolCall):
                assert end >= whole, text[:end]
                assert (call.name, call.arguments) == ("f", {"a": "1"})
            else:
                assert "cut off" in call.reason, (text[:end], call.reason)
    (call,) = parser.find_calls(text)
    assert isinstance(call, ToolCall)
    assert (call.name, call.arguments) == ("f", {"a": "1"})


def test_the_id_that_a_model_gives_its_call_is_kept() -> None:
    (listed,) = get_tool_parser("mistral").find_calls('[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abc123XYZ"}]')
    (named,) = get_tool_parser("mistral").find_calls("[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{}")
    assert isinstance(listed, ToolCall)
    assert isinstance(named, ToolCall)
    assert (listed.id, named.id) == ("abc123XYZ", "abc123XYZ")


def test_every_format_is_reachable_by_its_name_and_by_the_names_of_other_servers() -> None:
    assert list(tool_parsers()) == [
        "deepseek", "glm", "gpt_oss", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder"
    ]  # fmt: skip
    assert all(get_tool_parser(name).name == name for name in tool_parsers())
    assert get_tool_parser("gpt-oss").name == "gpt_oss"
    with pytest.raises(ConfigError, match="Did you mean `qwen3_coder`"):
        get_tool_parser("qwen3_codr")


@pytest.mark.parametrize("name", list(CASES))
def test_a_turn_that_repeats_itself_is_read_to_a_bound(name: str) -> None:
    first = next(text for text, expected in CASES[name] if len(expected) == 1 and not isinstance(expected[0], str))
    assert len(get_tool_parser(name).find_calls(first * 5000)) <= 64
