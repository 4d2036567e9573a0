"""One rollout of a black-box agent, recorded token by token from the requests it makes.

A request carries the whole conversation. Where it extends one that is on record, the recorded ids are extended by the ids of
the new messages, and sampled ids are never encoded again. Where it does not (the agent rewrote its history, asked the same
thing twice, or holds several conversations) a new segment begins: from the recorded ids as far as they go, else from a
render of the whole conversation. Ids of a segment's prompt are never trained on, so nothing is trained twice.
"""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias
from uuid import uuid4

from agentrl.errors import DeadlineExceeded, GenerationError, RolloutError, TemplateError
from agentrl.protocols import TokenListener
from agentrl.rollout.agent_loop import RolloutState
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.proxy.messages import fingerprints, template_messages
from agentrl.rollout.proxy.turn_reader import TurnReader
from agentrl.rollout.proxy.turn_stream import Delta, TurnStream
from agentrl.supervise import deadline, waiting
from agentrl.types import CallRecord, Generation, Message, SamplingParams, Score, Stop, ToolCall, Turn

STOP_SLICE = 64
"""Tokens sampled at a time where the agent gave stop strings, which the engine does not know."""

Show: TypeAlias = Callable[[int, Delta], None]
"""Takes what the nth answer grows by; it returns at once."""


class SessionClosed(RolloutError):
    """The rollout is over: its agent ended, or its deadline passed."""

    kind = "agent"


class LimitReached(RolloutError):
    """The rollout has used its turns or tokens; ``stop`` is how it ends."""

    def __init__(self, stop: Stop, message: str) -> None:
        super().__init__(message)
        self.stop = stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request, whatever API it came by."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None
    parses_calls: bool = True
    max_calls: int | None = None
    stop: Sequence[str] = ()
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said to one request."""

    content: str
    calls: Sequence[dict[str, Any]]
    """In OpenAI's form: ``{id, type, function: {name, arguments}}``, arguments as JSON text."""
    finish: str
    """``stop | length | tool_calls``."""
    prompt_tokens: int
    generation: Generation

    @property
    def message(self) -> Message:
        return _message(self.content, self.calls)


def _message(content: str, calls: Sequence[dict[str, Any]]) -> Message:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {})}


@dataclass(frozen=True, slots=True)
class _Point:
    """A place in a segment from which a conversation goes on."""

    segment: int
    length: int
    """Ids of the segment up to here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Where the next turn goes: behind ``start`` and ``observed``, or into a segment of its own."""

    template: ChatTemplate
    start: _Point | None
    observed: list[int]
    """Ids after ``start``; the whole prompt where there is none."""
    new_messages: Sequence[Message]


@dataclass(slots=True, kw_only=True, eq=False)
class _Request:
    """One request that is being answered."""

    ask: Ask
    names: Sequence[bytes]
    """Of the prefixes of its conversation (`fingerprints`)."""
    plan: _Plan
    reader: TurnReader
    context: list[int]
    """All ids that the model is shown."""
    started: float
    """Monotonic seconds."""
    streams: list[TurnStream]
    """One per answer where they are streamed; emptied once they are on record."""


@dataclass(slots=True, kw_only=True)
class Session:
    """See the module's docstring. All methods belong to one event loop.

    Args:
        state: of the rollout.
        dumps: JSON text of a call's arguments.
        follows_request: take temperature and top_p from requests instead of from the run; off in training, because the
            learner must know the distribution.
    """

    state: RolloutState
    key: str
    dumps: Callable[[Mapping[str, Any]], str]
    follows_request: bool = False
    id: str = field(default_factory=lambda: uuid4().hex)
    branches: int = 0
    """Segments after the first: how often a conversation did not extend a recorded one."""
    given: Score | None = None
    """The reward that came by API."""
    failure: RolloutError | None = None
    """The last request's failure, if it was not the agent's doing."""
    limit: Stop | None = None
    is_closed: bool = False
    responses: dict[str, list[Message]] = field(default_factory=dict[str, list[Message]])
    """Conversations by the id of the response that ended them (Responses API)."""
    _after_turn: dict[bytes, _Point] = field(default_factory=dict[bytes, _Point])
    _before_turn: dict[bytes, _Point] = field(default_factory=dict[bytes, _Point])
    _pending_calls: dict[str, ToolCall] = field(default_factory=dict[str, ToolCall])
    _scopes: set[asyncio.Timeout] = field(default_factory=set[asyncio.Timeout])
    _streamed: set[_Request] = field(default_factory=set[_Request])
    """Requests that are being answered piece by piece."""

    def close(self) -> None:
        """Refuse what comes from now on, and break off what runs. The record is complete when this returns."""
        self.is_closed = True
        for request in list(self._streamed):
            self._break_off(request)
        now = asyncio.get_running_loop().time()
        for scope in list(self._scopes):
            scope.reschedule(now)

    async def answer(self, ask: Ask, *, n: int = 1, show: Show | None = None) -> list[Answer]:
        """Sample ``n`` turns after the same messages; each goes on record.

        Args:
            ask: the request.
            n: answers to it.
            show: takes the answers while they are sampled; all the deltas of one make its content and its calls.

        Raises:
            SessionClosed: the rollout is over.
            LimitReached: it has no turns or tokens left.
            TemplateError: the template cannot print these messages.
            GenerationError, DeadlineExceeded: the engines failed.
        """
        try:
            async with self._until_closed():
                answers = await self._answers(ask, n, show)
        except RolloutError as error:
            self._note(error)
            raise
        self.failure = None
        return answers

    def _note(self, error: RolloutError) -> None:
        if isinstance(error, LimitReached):
            self.limit = error.stop
        elif isinstance(error, GenerationError | DeadlineExceeded):
            self.failure = error

    @asynccontextmanager
    async def _until_closed(self) -> AsyncGenerator[None]:
        if self.is_closed:
            raise SessionClosed("this rollout is over; its endpoint takes no more requests")
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._scopes.add(scope)
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise SessionClosed("the rollout ended while this request ran") from error
        finally:
            self._scopes.discard(scope)

    async def _answers(self, ask: Ask, n: int, show: Show | None) -> list[Answer]:
        state = self.state
        if state.num_turns >= state.limits.max_turns:
            raise LimitReached("max_turns", f"the rollout has used its {state.limits.max_turns} turns (serve.turns)")
        names = fingerprints(ask.messages, ask.tools)
        plan = self._plan(ask, names)
        prefix = [] if plan.start is None else state.builder.ids_of(plan.start.segment)[: plan.start.length]
        context = [*prefix, *plan.observed]
        left = state.tokens_left - (0 if plan.start is None else len(plan.observed))
        if left < 1:
            raise LimitReached("max_tokens", f"the rollout has used its {state.limits.max_tokens} response tokens (serve.tokens)")
        parser = self.state.parser if ask.tools and ask.parses_calls else None
        reader = TurnReader(parser, thinking=plan.template.opened_thinking, stops=ask.stop, max_calls=ask.max_calls)
        shows = [] if show is None else [partial(show, index) for index in range(n)]
        streams = [TurnStream(state.template, reader=reader, write=self._written, show=show) for show in shows]
        request = _Request(
            ask=ask, names=names, plan=plan, reader=reader, context=context, started=time.monotonic(), streams=streams
        )  # fmt: skip
        with self._recorded_if_broken_off(request):
            generations = [await self._sample(request, left)] if n == 1 else await self._sample_many(n, request, left)
            if self.is_closed:  # between the last token and here
                raise SessionClosed("the rollout ended while this request ran")
        # From here on nothing waits, so what was not streamed is on record whole or not at all.
        return [self._record(request, g, streams[index] if streams else None) for index, g in enumerate(generations)]

    # Streaming

    @contextmanager
    def _recorded_if_broken_off(self, request: _Request) -> Generator[None]:
        if not request.streams:
            yield
            return
        self._streamed.add(request)
        try:
            yield
        except BaseException:
            self._break_off(request)
            raise
        finally:
            self._streamed.discard(request)

    def _break_off(self, request: _Request) -> None:
        """Put what was sampled of a streamed request on record."""
        streams, request.streams = request.streams, []
        for stream in streams:
            generation = stream.so_far()
            if generation is None:
                continue
            at = _tokens_to_stop(self.state.template, generation.ids, 0, request.ask.stop)
            generation = generation if at is None else _cut(generation, at)
            segment, _ = self._append(request, generation)
            self._remember(request, _message(stream.shown, stream.calls), generation, segment)

    # Where the turn goes

    def _plan(self, ask: Ask, names: Sequence[bytes]) -> _Plan:
        template = self.state.template.with_tools(ask.tools)
        if (again := self._before_turn.get(names[-1])) is not None:  # the same question once more, or n > 1
            return _Plan(template=template, start=again, observed=[], new_messages=())
        last = max((i for i, m in enumerate(ask.messages) if m["role"] == "assistant"), default=-1)
        known = self._after_turn.get(names[last + 1]) if last >= 0 else None
        new = ask.messages[last + 1 :]
        if known is not None and new:
            ids = self.state.builder.ids_of(known.segment)
            try:
                observed = template.observation_ids(new, last_sampled=ids[known.length - 1])
            except TemplateError:
                pass  # the template prints this history in another way once these messages follow: a rewrite
            else:
                return _Plan(template=template, start=known, observed=observed, new_messages=new)
        return _Plan(template=template, start=None, observed=template.prompt_ids(ask.messages), new_messages=())

    # Sampling

    async def _sample_many(self, n: int, request: _Request, left: int) -> list[Generation]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._sample(request, left, index)) for index in range(n)]
        except BaseExceptionGroup as errors:
            first = next((e for e in errors.exceptions if isinstance(e, RolloutError)), None)
            if first is None:
                raise
            raise first from None
        return [task.result() for task in tasks]

    async def _sample(self, request: _Request, left: int, index: int = 0) -> Generation:
        state, ask, context = self.state, request.ask, request.context
        on_tokens = request.streams[index].take if request.streams else None
        timeout_s = max(0.0, min(state.limits.turn_timeout_s, state.ends_at - asyncio.get_running_loop().time()))
        asked = ask.max_new_tokens if ask.max_new_tokens is not None else left
        budget = max(1, min(state.sampling.max_new_tokens, state.limits.max_tokens_per_turn, left, asked))
        sampling = dataclasses.replace(state.sampling, max_new_tokens=budget)
        if self.follows_request:
            sampling = dataclasses.replace(
                sampling,
                temperature=sampling.temperature if ask.temperature is None else ask.temperature,
                top_p=sampling.top_p if ask.top_p is None else ask.top_p,
            )
        with waiting("server"):
            async with deadline(timeout_s, "turn"):
                if not ask.stop:
                    return await self._generate(context, sampling, timeout_s, on_tokens)
                return await self._sample_to_stop(context, sampling, ask.stop, timeout_s, on_tokens)

    async def _sample_to_stop(
        self,
        context: list[int],
        sampling: SamplingParams,
        stops: Sequence[str],
        timeout_s: float,
        on_tokens: TokenListener | None,
    ) -> Generation:
        """Slice by slice, until a stop string is complete; the tokens behind it are dropped, sampled or not."""
        whole: Generation | None = None
        while True:
            done = [] if whole is None else whole.ids
            step = min(STOP_SLICE, sampling.max_new_tokens - len(done))
            sampling_now = dataclasses.replace(sampling, max_new_tokens=step)
            piece = await self._generate([*context, *done], sampling_now, timeout_s, on_tokens)
            whole = piece if whole is None else _joined(whole, piece)
            at = _tokens_to_stop(self.state.template, whole.ids, len(whole.ids) - len(piece.ids), stops)
            if at is not None:
                return _cut(whole, at)
            if piece.finish != "length" or len(whole.ids) >= sampling.max_new_tokens:
                return whole

    async def _generate(
        self, ids: list[int], sampling: SamplingParams, timeout_s: float, on_tokens: TokenListener | None
    ) -> Generation:
        state = self.state
        generation = await state.generator.generate(
            ids,
            sampling,
            trajectory_id=state.trajectory_id,
            group_id=state.group_id,
            deadline=timeout_s,
            on_tokens=on_tokens,
        )
        if generation.finish == "abort":
            raise GenerationError(f"{generation.server} aborted the generation after {len(generation.ids)} tokens")
        if not generation.ids:
            raise GenerationError(f"{generation.server} returned no tokens (finish={generation.finish})")
        return generation

    # Recording

    def _record(self, request: _Request, generation: Generation, stream: TurnStream | None) -> Answer:
        segment, text = self._append(request, generation)
        answer = self._read(request, text, generation, stream)
        self._remember(request, answer.message, generation, segment)
        return answer

    def _append(self, request: _Request, generation: Generation) -> tuple[int, str]:
        """Put a turn where it belongs; returns its segment and text."""
        builder, start = self.state.builder, request.plan.start
        if start is not None and len(builder.ids_of(start.segment)) == start.length:
            segment = start.segment
            self._observe(request.plan, segment)
        else:  # nothing to extend, or another turn has extended it meanwhile
            self.branches += bool(builder.turns)
            builder.new_segment(request.context)
            segment = builder.segment
        ms = (time.monotonic() - request.started) * 1e3
        return segment, self.state.record(generation, ms=ms, segment=segment).text

    def _remember(self, request: _Request, said: Message, generation: Generation, segment: int) -> None:
        """Know the place again when the same question, or what follows this answer, comes."""
        ask, end = request.ask, len(self.state.builder.ids_of(segment))
        self._before_turn[request.names[-1]] = _Point(segment, end - len(generation.ids))
        said = template_messages([said])[0]  # as it will look when it comes back
        self._after_turn[fingerprints([*ask.messages, said], ask.tools)[-1]] = _Point(segment, end)

    def _observe(self, plan: _Plan, segment: int) -> None:
        if not plan.observed:
            return
        state = self.state
        start, end = state.builder.append_observed(plan.observed, segment=segment)
        for message in plan.new_messages:
            is_tool = message["role"] == "tool"
            call = self._pending_calls.pop(str(message.get("tool_call_id")), None) if is_tool else None
            name, text = str(message.get("name") or ""), str(message["content"])
            state.builder.add_turn(
                Turn(
                    kind="tool" if is_tool else "env",
                    segment=segment,
                    start=start,
                    end=end,
                    ms=0.0,
                    name=name or (call.name if call else ""),
                    arguments=self.dumps(call.arguments) if call else "",
                    text=text,
                )
            )
            if call is not None:
                state.calls.append(CallRecord(name=call.name, arguments=call.arguments, ok=True, error_kind="", result=text))
            if is_tool:
                state.final_from = len(state.texts)

    def _read(self, request: _Request, text: str, generation: Generation, stream: TurnStream | None) -> Answer:
        """The turn as the agent sees it. What it is shown need not be all that was sampled; the record is."""
        is_cut = generation.finish == "length"
        said = request.reader.read(text, is_cut=is_cut)
        if stream is None:
            content, calls = said.content, [self._written(call) for call in said.calls]
        else:
            stream.end(said, generation)
            content, calls = stream.shown, stream.calls
        finish = "tool_calls" if calls else "length" if is_cut else "stop"
        return Answer(content=content, calls=calls, finish=finish, prompt_tokens=len(request.context), generation=generation)

    def _written(self, call: ToolCall) -> dict[str, Any]:
        """In OpenAI's form; its result is expected from now on."""
        identity = f"call_{uuid4().hex[:24]}"
        self._pending_calls[identity] = call
        function = {"name": call.name, "arguments": self.dumps(call.arguments)}
        return {"id": identity, "type": "function", "function": function}


def _joined(left: Generation, right: Generation) -> Generation:
    return dataclasses.replace(
        right,
        ids=[*left.ids, *right.ids],
        logprobs=[*left.logprobs, *right.logprobs],
        versions=[*left.versions, *right.versions],
        cached_tokens=left.cached_tokens,
        ms=left.ms + right.ms,
    )


def _cut(generation: Generation, length: int) -> Generation:
    return dataclasses.replace(
        generation,
        ids=generation.ids[:length],
        logprobs=generation.logprobs[:length],
        versions=generation.versions[:length],
        finish="stop",
    )


def _tokens_to_stop(template: ChatTemplate, ids: Sequence[int], new_from: int, stops: Sequence[str]) -> int | None:
    """Tokens up to the end of the first stop string, or None; only looked for where the last slice could complete one."""
    if not any(stop in template.decode(ids) for stop in stops):
        return None
    for length in range(new_from + 1, len(ids) + 1):
        text = template.decode(ids[:length])
        if any(stop in text for stop in stops):
            return length
    return len(ids)
