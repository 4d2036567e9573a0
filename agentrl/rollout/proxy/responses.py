"""``/v1/responses`` on the wire: text, function tools, ``previous_response_id`` and streaming; the rest is refused by name."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, cast
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from agentrl.rollout.proxy.chat import refuse_prefill, refuse_what_forces
from agentrl.rollout.proxy.messages import MessageError, template_messages
from agentrl.rollout.proxy.session import Answer, Ask
from agentrl.rollout.proxy.streaming import EventWriter, Refused
from agentrl.rollout.proxy.turn_stream import Delta
from agentrl.types import Message


class ResponsesRequest(BaseModel):
    """A Responses request. What only shapes sampling is read and left out, as for chat completions."""

    model_config = ConfigDict(extra="ignore")

    input: str | list[Any]
    model: str = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: Any = None
    stream: bool | None = None

    def ask(self, known: Mapping[str, Sequence[Message]]) -> Ask:
        """The request as the session takes it.

        Args:
            known: conversations by response id.

        Raises:
            MessageError: something that would change the answer and is not supported; ``param`` names it.
        """
        wanted = self.text.get("format") if isinstance(self.text, Mapping) else None
        refuse_what_forces(self.tool_choice, wanted)
        earlier: Sequence[Message] = ()
        if self.previous_response_id is not None:
            if self.previous_response_id not in known:
                raise MessageError("previous_response_id", f"{self.previous_response_id!r} is no response of this session")
            earlier = known[self.previous_response_id]
        new = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else _chat_items(self.input)
        # Instructions are of this request alone, as OpenAI has it; what came before keeps its own messages.
        opening = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages = template_messages([*opening, *earlier, *new])
        if not messages:
            raise MessageError("input", "is empty; give the model something to answer")
        refuse_prefill(messages)
        return Ask(
            messages=messages,
            tools=[_chat_tool(t, f"tools[{i}]") for i, t in enumerate(self.tools)] if self.tools else None,
            parses_calls=self.tool_choice != "none",
            max_calls=1 if self.parallel_tool_calls is False else None,
            max_new_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )

    def kept(self, ask: Ask, answer: Answer) -> list[Message]:
        """The conversation that ``previous_response_id`` will name: without this request's instructions."""
        return [*ask.messages[1 if self.instructions else 0 :], answer.message]


def _chat_tool(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise MessageError(param, f"type {tool.get('type')!r} is not served here; only functions are")
    function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _chat_items(items: Sequence[Any]) -> list[Message]:
    """Input items as chat messages. Calls of one turn are one assistant message, with the text before them."""
    messages: list[Message] = []
    for index, raw in enumerate(items):
        if not isinstance(raw, Mapping):
            raise MessageError(f"input[{index}]", "must be an object")
        item = cast("Mapping[str, Any]", raw)
        kind = item.get("type") or "message"
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages[-1] = {**messages[-1], "tool_calls": [*(messages[-1].get("tool_calls") or ()), call]}
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "reasoning":
            raise MessageError(f"input[{index}].type", f"{kind!r} is not served here; messages and function calls are")
    return messages


def opened(request: ResponsesRequest, *, model: str) -> dict[str, Any]:
    """The body of a response before its first token."""
    return {
        "id": f"resp_{uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "status": "in_progress",
        "incomplete_details": None,
        "error": None,
        "instructions": request.instructions,
        "metadata": {},
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "usage": None,
    }


def response(base: Mapping[str, Any], answer: Answer, *, message_id: str | None = None) -> dict[str, Any]:
    """The body of a whole response that `opened` began; ``message_id`` names its message where that was told already."""
    output: list[dict[str, Any]] = []
    if answer.content or not answer.calls:
        output.append(_message(message_id or f"msg_{uuid4().hex}", answer.content))
    output += map(_call, answer.calls)
    is_cut = answer.finish == "length"
    completed = len(answer.generation.ids)
    return {
        **base,
        "status": "incomplete" if is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": output,
        "usage": {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.generation.cached_tokens},
            "output_tokens": completed,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + completed,
        },
    }


def _message(identity: str, text: str) -> dict[str, Any]:
    return {"id": identity, "type": "message", "status": "completed", "role": "assistant", "content": [_part(text)]}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {
        "id": f"fc_{call['id']}", "type": "function_call", "status": "completed", "call_id": call["id"],
        "name": function["name"], "arguments": function["arguments"],
    }  # fmt: skip


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class Events(EventWriter):
    """The events of a streamed response: the message as it grows, then each call whole.

    Args:
        base: what `opened` gave.
    """

    last_line = b""

    def __init__(self, base: Mapping[str, Any]) -> None:
        self._base = base
        self._message_id = f"msg_{uuid4().hex}"
        self._number = 0
        self._text: str | None = None
        """Of the message, where there is one."""
        self._num_calls = 0

    def grown(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """The opening the first time, then text, then calls, before which the message ends."""
        if not self._number:
            yield self._event("response.created", response=self._base)
            yield self._event("response.in_progress", response=self._base)
        if delta.text:
            if self._text is None:
                yield from self._open_message()
            self._text = (self._text or "") + delta.text
            yield self._event("response.output_text.delta", **self._part_at(), delta=delta.text, logprobs=[])
        for call in delta.calls:
            if self._text is not None and not self._num_calls:
                yield from self._end_message(self._text)
            yield from self._whole_call(_call(call))

    def ended(self, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """The message's end, where no call ended it, and the whole response."""
        (answer,) = answers
        body = response(self._base, answer, message_id=self._message_id)
        if not self._num_calls:
            if self._text is None:
                yield from self._open_message()
            yield from self._end_message(answer.content)
        yield self._event("response.incomplete" if body["status"] == "incomplete" else "response.completed", response=body)

    def failed(self, error: Refused) -> Iterator[dict[str, Any]]:
        """The failed response."""
        found = {"code": error.error["code"] or "server_error", "message": error.error["message"]}
        yield self._event("response.failed", response={**self._base, "status": "failed", "error": found})

    def _open_message(self) -> Iterator[dict[str, Any]]:
        self._text = ""
        item = {**_message(self._message_id, ""), "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._part_at(), part=_part(""))

    def _end_message(self, text: str) -> Iterator[dict[str, Any]]:
        item = _message(self._message_id, text)
        yield self._event("response.output_text.done", **self._part_at(), text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._part_at(), part=item["content"][0])
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _whole_call(self, item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        index = (self._text is not None) + self._num_calls
        self._num_calls += 1
        at = {"item_id": item["id"], "output_index": index}
        opening = {**item, "status": "in_progress", "arguments": ""}
        yield self._event("response.output_item.added", output_index=index, item=opening)
        yield self._event("response.function_call_arguments.delta", **at, delta=item["arguments"])
        yield self._event("response.function_call_arguments.done", **at, arguments=item["arguments"], name=item["name"])
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _part_at(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}
