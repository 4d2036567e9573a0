"""``/v1/responses`` on the wire: text, function tools, ``previous_response_id`` and streaming; the rest is refused by name."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, cast
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from agentrl.rollout.proxy.chat import pieces, refuse_prefill, refuse_what_forces
from agentrl.rollout.proxy.messages import MessageError, template_messages
from agentrl.rollout.proxy.session import Answer, Ask
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


def response(answer: Answer, *, model: str, request: ResponsesRequest) -> dict[str, Any]:
    """The body of a whole response."""
    output: list[dict[str, Any]] = []
    if answer.content or not answer.calls:
        part = {"type": "output_text", "text": answer.content, "annotations": [], "logprobs": []}
        output.append(
            {"id": f"msg_{uuid4().hex}", "type": "message", "status": "completed", "role": "assistant", "content": [part]}
        )
    for call in answer.calls:
        function = call["function"]
        output.append(
            {
                "id": f"fc_{uuid4().hex}", "type": "function_call", "status": "completed", "call_id": call["id"],
                "name": function["name"], "arguments": function["arguments"],
            }
        )  # fmt: skip
    is_cut = answer.finish == "length"
    completed = len(answer.generation.ids)
    return {
        "id": f"resp_{uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "status": "incomplete" if is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "error": None,
        "instructions": request.instructions,
        "metadata": {},
        "output": output,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "usage": {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.generation.cached_tokens},
            "output_tokens": completed,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + completed,
        },
    }


def events(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same response as the events of a stream."""
    number = 0

    def event(kind: str, **fields: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"type": kind, "sequence_number": number - 1, **fields}

    opened = {**body, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield event("response.created", response=opened)
    yield event("response.in_progress", response=opened)
    for index, item in enumerate(body["output"]):
        at = {"item_id": item["id"], "output_index": index}
        if item["type"] == "message":
            part = item["content"][0]
            yield event("response.output_item.added", output_index=index, item={**item, "status": "in_progress", "content": []})
            yield event("response.content_part.added", **at, content_index=0, part={**part, "text": ""})
            for piece in pieces(part["text"]):
                yield event("response.output_text.delta", **at, content_index=0, delta=piece, logprobs=[])
            yield event("response.output_text.done", **at, content_index=0, text=part["text"], logprobs=[])
            yield event("response.content_part.done", **at, content_index=0, part=part)
        else:
            yield event("response.output_item.added", output_index=index, item={**item, "status": "in_progress", "arguments": ""})
            for piece in pieces(item["arguments"]):
                yield event("response.function_call_arguments.delta", **at, delta=piece)
            yield event("response.function_call_arguments.done", **at, arguments=item["arguments"], name=item["name"])
        yield event("response.output_item.done", output_index=index, item=item)
    yield event("response.incomplete" if body["status"] == "incomplete" else "response.completed", response=dict(body))
