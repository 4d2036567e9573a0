"""``/v1/chat/completions`` on the wire: what a request may say, and the bodies of answers, whole or streamed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.proxy.messages import MessageError, template_messages
from agentrl.rollout.proxy.session import Answer, Ask
from agentrl.rollout.proxy.streaming import EventWriter, Refused
from agentrl.rollout.proxy.turn_stream import Delta


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A chat completion request. What only shapes sampling is read and left out: the run decides how the policy samples."""

    model_config = ConfigDict(extra="ignore")

    messages: Annotated[list[Any], Field(min_length=1)]
    model: str = ""
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    functions: Any = None
    """OpenAI's old name for tools; refused, because an agent that offers them waits for calls."""
    parallel_tool_calls: bool | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def ask(self) -> Ask:
        """The request as the session takes it.

        Raises:
            MessageError: something that would change the answer and is not supported; ``param`` names it.
        """
        refuse_what_forces(self.tool_choice, self.response_format)
        if self.functions:
            raise MessageError("functions", "is OpenAI's old form and not served here; give tools")
        for index, tool in enumerate(self.tools or ()):
            function = tool.get("function")
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise MessageError(
                    f"tools[{index}]", f"type {tool.get('type')!r} is not served here; only functions with a name are"
                )
        if self.top_logprobs:
            raise MessageError("top_logprobs", "engines record the sampled token's logprob only; leave it out")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        messages = template_messages(self.messages)
        refuse_prefill(messages)
        return Ask(
            messages=messages,
            tools=self.tools or None,
            parses_calls=self.tool_choice != "none",
            max_calls=1 if self.parallel_tool_calls is False else None,
            stop=[s for s in stops if s],
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )


def refuse_what_forces(tool_choice: Any, response_format: Any) -> None:
    """Raise `MessageError` for what would force the policy's hand: it samples freely, or its logprobs would be wrong."""
    if tool_choice not in (None, "auto", "none"):
        raise MessageError("tool_choice", f"{tool_choice!r} would force the policy to call; only auto and none are supported")
    kind = response_format.get("type") if isinstance(response_format, Mapping) else response_format
    if kind not in (None, "text"):
        raise MessageError("response_format", f"{kind!r} would constrain the policy's sampling; only text is supported")


def refuse_prefill(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise `MessageError` where the model is asked to go on with words that it did not sample."""
    if messages[-1]["role"] == "assistant":
        raise MessageError("messages", "the last message is the assistant's; give it something to answer")


def completion(
    answers: Sequence[Answer], *, model: str, template: ChatTemplate, with_logprobs: bool, kind: Literal["chat"] = "chat"
) -> dict[str, Any]:
    """The body of a whole answer."""
    choices = [
        {
            "index": index,
            "message": {
                "role": "assistant",
                "content": answer.content if answer.content or not answer.calls else None,
                "refusal": None,
                **({"tool_calls": list(answer.calls)} if answer.calls else {}),
            },
            "finish_reason": answer.finish,
            "logprobs": logprobs(answer.generation.ids, answer.generation.logprobs, template) if with_logprobs else None,
        }
        for index, answer in enumerate(answers)
    ]
    return {
        "id": f"{kind}cmpl-{uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage(answers),
    }


class Chunks(EventWriter):
    """Chat completion chunks.

    Args:
        model: the name to give.
        template: decodes tokens for their logprobs; None reports none.
        with_usage: end with a chunk of the token counts.
    """

    last_line = b"data: [DONE]\n\n"

    def __init__(self, *, model: str, template: ChatTemplate | None, with_usage: bool) -> None:
        self._base = {
            "id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model, "object": "chat.completion.chunk",
        }  # fmt: skip
        self._template, self._with_usage = template, with_usage
        self._num_calls: dict[int, int] = {}
        """Per answer that was opened."""

    def grown(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """The role the first time, then text, then calls."""
        if index not in self._num_calls:
            self._num_calls[index] = 0
            yield self._chunk(index, {"role": "assistant", "content": ""})
        found = None
        if self._template is not None and delta.ids:
            found = logprobs(delta.ids, delta.logprobs, self._template)
        if delta.text or found is not None:
            yield self._chunk(index, {"content": delta.text}, found=found)
        for position, call in enumerate(delta.calls, self._num_calls[index]):
            function = call["function"]
            opening = {**call, "index": position, "function": {"name": function["name"], "arguments": ""}}
            yield self._chunk(index, {"tool_calls": [opening]})
            yield self._chunk(index, {"tool_calls": [{"index": position, "function": {"arguments": function["arguments"]}}]})
        self._num_calls[index] += len(delta.calls)

    def ended(self, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """The finish reasons and the usage."""
        for index, answer in enumerate(answers):
            yield self._chunk(index, {}, finish=answer.finish)
        if self._with_usage:
            yield {**self._base, "choices": [], "usage": usage(answers)}

    def failed(self, error: Refused) -> Iterator[dict[str, Any]]:
        """The error, which the ``openai`` SDK raises."""
        yield error.body

    def _chunk(self, index: int, delta: Mapping[str, Any], *, finish: str | None = None, found: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "finish_reason": finish, "logprobs": found}
        return {**self._base, "choices": [choice], **({"usage": None} if self._with_usage else {})}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    prompt = answers[0].prompt_tokens
    completed = sum(len(answer.generation.ids) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completed, "total_tokens": prompt + completed}


def logprobs(ids: Sequence[int], values: Sequence[float], template: ChatTemplate) -> dict[str, Any]:
    """Sampled tokens with their logprobs, the end of the turn included: exactly what is recorded."""
    content: list[dict[str, Any]] = []
    for token, logprob in zip(ids, values, strict=True):
        text = template.decode_all([token])
        content.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": content, "refusal": None}
