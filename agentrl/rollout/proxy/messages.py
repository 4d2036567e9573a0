"""OpenAI's messages as the chat template reads them, and when two of them are the same message.

A client sends the whole conversation with every request, usually after its own classes took it apart and put it together
again: ``null`` becomes ``""``, text becomes a list of parts, keys come and go. `fingerprints` names what is left when such
differences do not count, so that a conversation that was only extended is recognised as one.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from agentrl.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class MessageError(ValueError):
    """A message that cannot be shown to the model; ``param`` says where."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param}: {problem}")
        self.param = param


def template_messages(messages: Sequence[Any]) -> list[Message]:
    """Messages for the template: text as one string, a call's arguments as an object, results with the name of their call.

    Raises:
        MessageError: a role, a part or a call that has no text form.
    """
    names: dict[str, str] = {}
    return [_message(raw, f"messages[{index}]", names) for index, raw in enumerate(messages)]


def _message(raw: Any, param: str, names: dict[str, str]) -> Message:
    if not isinstance(raw, Mapping):
        raise MessageError(param, "must be an object with role and content")
    fields = cast("Mapping[str, Any]", raw)
    role = fields.get("role")
    if role not in ROLES:
        raise MessageError(f"{param}.role", f"{role!r} is none of {', '.join(ROLES)}")
    content = _text(fields.get("content"), f"{param}.content")
    if role in ("system", "developer"):
        return {"role": "system", "content": content}
    if role == "user":
        return {"role": "user", "content": content}
    if role in ("tool", "function"):
        call_id = str(fields.get("tool_call_id") or "")
        name = str(fields.get("name") or names.get(call_id, ""))
        return {"role": "tool", "content": content, "tool_call_id": call_id, **({"name": name} if name else {})}
    message: Message = {"role": "assistant", "content": content}
    calls = [_call(c, f"{param}.tool_calls[{i}]", names) for i, c in enumerate(fields.get("tool_calls") or ())]
    if calls:
        message["tool_calls"] = calls
    return message


def _call(raw: Any, param: str, names: dict[str, str]) -> dict[str, Any]:
    function = raw.get("function") if isinstance(raw, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MessageError(param, "must be {id, type: function, function: {name, arguments}}")
    arguments: Any = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON, or too deep, is shown as written
            arguments = json.loads(arguments) if arguments.strip() else {}
    identity = str(cast("Mapping[str, Any]", raw).get("id") or "")
    names[identity] = function["name"]
    return {"id": identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _text(content: Any, param: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MessageError(param, "must be a string, a list of text parts, or null")
    pieces: list[str] = []
    for index, part in enumerate(cast("list[Any]", content)):
        text = part if isinstance(part, str) else part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise MessageError(f"{param}[{index}]", f"a part of type {kind!r} is no text; this model reads text only")
        pieces.append(text)
    return "".join(pieces)


def fingerprints(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[bytes]:
    """One name per prefix of the conversation, the empty one included: equal names mean equal tools and messages so far."""
    name = hashlib.blake2b(_stable(list(tools) if tools else None), digest_size=16).digest()
    names = [name]
    for message in messages:
        name = hashlib.blake2b(name + _stable(_essence(message)), digest_size=16).digest()
        names.append(name)
    return names


def _essence(message: Message) -> list[Any]:
    role, content = message["role"], str(message["content"])
    if role != "assistant":
        return [role, content]
    # Agents trim what the model said; the call's id is theirs to change.
    calls = [[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls") or ()]
    return [role, content.strip(), calls]


def _stable(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()
