"""Conversations for the supervised cold start: JSONL or parquet rows of ``{messages, tools}``."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from agentrl.data.rows import checked_messages, raw_rows, write_jsonl
from agentrl.errors import DataError
from agentrl.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A finished dialogue. Tool calls carry their arguments as objects, the form that chat templates read."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = field(default_factory=tuple[Mapping[str, Any], ...])
    """OpenAI-style schemas of the tools that were offered."""


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The conversations of a file, in order. Arguments in wire form (JSON text) become objects.

    Raises:
        DataError: a line is malformed, or holds nothing to learn (no assistant message); names ``file:line`` (parquet: the row, from 1).
    """
    path = Path(path)
    for number, row in raw_rows(path):
        where = f"{path}:{number + 1}"

        def error(problem: str, where: str = where) -> DataError:
            return DataError(f"{where}: messages {problem}")

        messages = [_with_parsed_calls(message, error) for message in checked_messages(row.get("messages"), error)]
        if not any(message["role"] == "assistant" for message in messages):
            raise error("have no assistant message: there is nothing to learn from")
        yield Conversation(messages=messages, tools=_tools(row.get("tools"), where))


def write_conversations(conversations: Iterable[Conversation], path: Path) -> int:
    """Write JSONL; returns how many. The file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    rows = [{"messages": list(one.messages), "tools": list(one.tools)} for one in conversations]
    write_jsonl(rows, part)
    os.replace(part, path)
    return len(rows)


def _with_parsed_calls(message: Message, error: Any) -> Message:
    if not message.get("tool_calls"):
        return {key: value for key, value in message.items() if key != "tool_calls"}
    if message["role"] != "assistant" or not isinstance(message["tool_calls"], list):
        raise error(f"have tool_calls in a {message['role']} message, or not as a list")
    return {**message, "tool_calls": [_parsed_call(call, error) for call in message["tool_calls"]]}


def _parsed_call(call: Any, error: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise error("have a tool call without a function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as problem:
            raise error(f"have a call of {function['name']} whose arguments are not JSON ({problem})") from problem
    if not isinstance(arguments, dict):
        raise error(f"have a call of {function['name']} whose arguments are {type(arguments).__name__}, expected an object")
    kept = {key: call[key] for key in ("id",) if key in call}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value else []
        except ValueError as problem:
            raise DataError(f"{where}: tools are not JSON ({problem})") from problem
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in cast("list[Any]", value)):
        raise DataError(f"{where}: tools must be a list of schemas")
    return cast("list[dict[str, Any]]", value)
