"""Conversations read back as chat templates want them, and a broken line is named."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentrl.data.conversations import Conversation, read_conversations, write_conversations
from agentrl.errors import DataError

SCHEMA = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}}}


def dialogue(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "calculator", "arguments": arguments}}
    return [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": "4"},
        {"role": "assistant", "content": "#### 4"},
    ]


def line(tmp_path: Path, row: Any) -> Path:
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps({"messages": dialogue({})}) + "\n" + json.dumps(row) + "\n")
    return path


def test_written_conversations_read_back_equal(tmp_path: Path) -> None:
    one = Conversation(messages=dialogue({"expression": "2+2", "digits": None}), tools=[SCHEMA])
    two = Conversation(messages=[{"role": "assistant", "content": "Hello, 世界."}], tools=[])
    assert write_conversations([one, two], tmp_path / "new" / "sft.jsonl") == 2
    assert list(read_conversations(tmp_path / "new" / "sft.jsonl")) == [one, two]


def test_arguments_in_wire_form_become_objects(tmp_path: Path) -> None:
    wire = dialogue('{"expression": "2+2"}')
    wire[1]["content"] = None
    wire[1]["tool_calls"][0]["id"] = "call_1"
    _, read = read_conversations(line(tmp_path, {"messages": wire, "tools": json.dumps([SCHEMA])}))
    assert read.messages[1]["content"] == ""
    function = {"name": "calculator", "arguments": {"expression": "2+2"}}
    assert read.messages[1]["tool_calls"] == [{"id": "call_1", "type": "function", "function": function}]
    assert read.tools == [SCHEMA]


def test_parquet_rows_lose_the_nulls_that_arrow_added(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"messages": dialogue({"expression": "2+2"})}]), tmp_path / "sft.parquet")
    (read,) = read_conversations(tmp_path / "sft.parquet")
    assert list(read.messages) == dialogue({"expression": "2+2"})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "messages is NoneType"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "have no assistant message"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "message 0 (assistant) has content of type int"),
        ({"messages": dialogue("{")}, "have a call of calculator whose arguments are not JSON"),
        ({"messages": dialogue([1])}, "have a call of calculator whose arguments are list, expected an object"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "have a tool call without a function name"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]}, "have tool_calls in a user message"),
        ({"messages": dialogue({}), "tools": "["}, "tools are not JSON"),
        ({"messages": dialogue({}), "tools": {"a": 1}}, "tools must be a list of schemas"),
    ],
)
def test_a_malformed_conversation_names_file_and_line(tmp_path: Path, row: Any, problem: str) -> None:
    path = line(tmp_path, row)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:2: .*{re.escape(problem)}"):
        list(read_conversations(path))
