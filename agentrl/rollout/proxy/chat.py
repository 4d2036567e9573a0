"""``/v1/chat/completions`` on the wire: what a request may say, and the bodies of answers, whole or streamed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.proxy.messages import MessageError, template_messages
from agentrl.rollout.proxy.session import Answer, Ask

PIECE_CHARS = 24
"""Characters of one streamed delta. An answer is sampled whole before it is streamed, so this is about form only."""


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
            "logprobs": logprobs(answer, template) if with_logprobs else None,
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


def chunks(body: Mapping[str, Any], *, with_usage: bool) -> Iterator[dict[str, Any]]:
    """The same answer as the deltas of a stream."""
    base = {key: body[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}

    def chunk(index: int, delta: Mapping[str, Any], finish: str | None = None, found: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "finish_reason": finish, "logprobs": found}
        return {**base, "choices": [choice], **({"usage": None} if with_usage else {})}

    for choice in body["choices"]:
        index, message = choice["index"], choice["message"]
        yield chunk(index, {"role": "assistant", "content": ""}, found=choice["logprobs"])
        for piece in pieces(message["content"] or ""):
            yield chunk(index, {"content": piece})
        for position, call in enumerate(message.get("tool_calls") or ()):
            function = call["function"]
            opening = {**call, "index": position, "function": {"name": function["name"], "arguments": ""}}
            yield chunk(index, {"tool_calls": [opening]})
            for piece in pieces(function["arguments"]):
                yield chunk(index, {"tool_calls": [{"index": position, "function": {"arguments": piece}}]})
        yield chunk(index, {}, choice["finish_reason"])
    if with_usage:
        yield {**base, "choices": [], "usage": body["usage"]}


def pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE_CHARS):
        yield text[start : start + PIECE_CHARS]


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    prompt = answers[0].prompt_tokens
    completed = sum(len(answer.generation.ids) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completed, "total_tokens": prompt + completed}


def logprobs(answer: Answer, template: ChatTemplate) -> dict[str, Any]:
    """Every sampled token with its logprob, the end of the turn included: exactly what is recorded."""
    content: list[dict[str, Any]] = []
    for token, logprob in zip(answer.generation.ids, answer.generation.logprobs, strict=True):
        text = template.decode_all([token])
        content.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": content, "refusal": None}
