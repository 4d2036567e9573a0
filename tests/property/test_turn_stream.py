"""A streamed turn, put together, is the turn as it is read in one piece, whatever was sampled and however it came."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.proxy.turn_reader import TurnReader
from agentrl.rollout.proxy.turn_stream import Delta, TurnStream
from agentrl.rollout.tool_parsers import get_tool_parser
from agentrl.testing.tiny_model import make_tiny_tokenizer
from agentrl.types import Generation, SampledTokens, ToolCall

TOKENIZER = make_tiny_tokenizer()
TEMPLATE = ChatTemplate(TOKENIZER, tools=None)
OPEN, CLOSE = "<tool_call>", "</tool_call>"
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
SHARED = ("<think>", "</think>", "I see. ", "x < y {1} [2]", "\n", " ", "é 🧮", "STOP", "{", "}", "[", "]", '"', ";")
PIECES = {
    "hermes": (
        OPEN, CLOSE, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', '{"name": "g", "arguments": {}}',
        '<tool_call>{"name": "h", "arguments": {"a": "</tool_call><tool_call></think>"}}</tool_call>', "<tool_call>{'name': 'f'}</tool_call>",
    ),
    "qwen3_coder": (
        OPEN, CLOSE, "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", "<function=g>", "</function>",
        "<parameter=b>", "</parameter>", "<tool_call><function=h></function></tool_call>",
        "<tool_call><function=i><parameter=a></tool_call><tool_call><function=j></function></tool_call></parameter></function></tool_call>",
    ),
    "glm": (
        OPEN, CLOSE, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", "<tool_call>g</tool_call>", "<arg_key>",
        "</arg_key>", "<arg_value>", "</arg_value>",
        "<tool_call>h<arg_key>a</arg_key><arg_value></tool_call><tool_call>i</tool_call></arg_value></tool_call>",
    ),
    "llama3_json": (
        "<|python_tag|>", '{"name": "f", "parameters": {"a": {"b": 1}}}', '{"name": ', '"parameters": {}}', '{"type": "circle"}',
        '{"name": "g", "parameters": {"a": "<|python_tag|>};"}}', "{'name': 'h'}", "f.call(a=1)", "; ",
    ),
    "mistral": (
        "[TOOL_CALLS]", "[ARGS]", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}]', '[TOOL_CALLS]g[ARGS]{"a": [{}]}', "h[ARGS]{}",
        '[{"name": "i", "arguments": {}}]', ", ", "[THINK]", "[/THINK]",
    ),
    "gpt_oss": (
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}", "<|call|>", "<|end|>", "<|start|>assistant", "<|message|>", "{}",
        "<|channel|>analysis<|message|>hm", " to=functions.g", "<|channel|>final<|message|>",
    ),
    "deepseek": (
        BEGIN, END, CALL, SEPARATOR, END_CALL, f"{BEGIN}{CALL}f{SEPARATOR}{{}}{END_CALL}", f"{CALL}g{SEPARATOR}{{}}{END_CALL}",
        f"{CALL}function{SEPARATOR}h\n```json\n{{}}\n```{END_CALL}", "{}", "i",
    ),
    "pythonic": (
        "[f(a=1)]", "<|python_start|>", "<|python_end|>", "<function_calls>", "</function_calls>", "<|tool_call_start|>[g(a='</think>')]<|tool_call_end|>",
        "h(", "a=1", ")", "'",
    ),
}  # fmt: skip


@st.composite
def turns(draw: st.DrawFn, name: str) -> tuple[list[int], list[int]]:
    """Ids, and the sizes of the pieces in which they come."""
    pieces = draw(st.lists(st.sampled_from(PIECES[name]) | st.sampled_from(SHARED), max_size=9))
    ids = TOKENIZER.encode("".join(pieces), add_special_tokens=False)
    return ids, draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("name", sorted(PIECES))
def test_what_was_streamed_is_what_is_read_in_one_piece(name: str, data: st.DataObject) -> None:
    ids, sizes = data.draw(turns(name))
    reader = TurnReader(
        get_tool_parser(name),
        thinking=data.draw(st.sampled_from(["", "<think>"])),
        stops=data.draw(st.sampled_from([(), ("STOP",), ("\n", "é ")])),
        max_calls=data.draw(st.sampled_from([None, 1])),
    )
    stopped = (n for n in range(len(ids) + 1) if any(stop in TEMPLATE.decode(ids[:n]) for stop in reader.stops))
    end = next(stopped, len(ids))  # as the session cuts the turn; what follows was sampled nevertheless
    shown: list[Delta] = []

    def write(call: ToolCall) -> dict[str, Any]:
        return {"name": call.name, "arguments": dict(call.arguments)}

    stream = TurnStream(TEMPLATE, reader=reader, write=write, show=shown.append)
    start = turn = 0
    while start < len(ids):
        part = ids[start : start + sizes[turn % len(sizes)]]
        stream.take(SampledTokens(part, [0.0] * len(part), [1] * len(part), "s"))
        start, turn = start + len(part), turn + 1
    is_cut = data.draw(st.booleans()) and end == len(ids)
    said = reader.read(TEMPLATE.decode(ids[:end]), is_cut=is_cut)
    stream.end(said, Generation(ids=ids[:end], logprobs=[0.0] * end, versions=[1] * end, finish="stop", server="s"))
    calls = [call for delta in shown for call in delta.calls]
    whole = TEMPLATE.decode(ids)
    streamed = ("".join(delta.text for delta in shown), calls)
    assert streamed == (said.content, [write(call) for call in said.calls]), whole
    assert (stream.shown, stream.calls) == (said.content, calls)
    texts_after_calls = [d.text for i, d in enumerate(shown) if any(earlier.calls for earlier in shown[:i])]
    assert not any(texts_after_calls)
