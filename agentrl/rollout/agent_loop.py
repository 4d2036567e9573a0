"""One rollout: generate, call tools, repeat, score. The registry of agent loops is here too.

Waits for: a server (``server``), a tool (``tool:<name>``), an environment (``env:<name>``), an agent (``agent``), the scorer
(``reward``), each under a deadline that is owned here. How a rollout ends:

- ``answered``: the model ended its turn and called nothing, and no environment replied.
- ``max_turns``: it called tools in its last allowed turn; they are not run, since it could not read their results.
- ``max_tokens``: the response budget is used up, a tool's result no longer fits (it is then left out), or a turn without
  calls was cut by the per-turn limit. A cut turn *with* calls goes on: the missing end of the turn is appended as
  observation, and a half-written call is answered with the reason.
- ``tool_limit``: too many calls were malformed, unknown or invalid.
- ``deadline``: the rollout's own deadline passed; what was in progress is left out, unless an agent was reading it. Where that was
  a generation of which nothing had been heard for long, the server stalled: that is ``error:deadline``.
- ``aborted`` and ``error:<kind>``: nothing to train on; raised as ``RolloutError`` with the partial record attached.

All but the last are scored on what the assistant wrote.
"""

import asyncio
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from agentrl.errors import ConfigError, DeadlineExceeded, EnvError, GenerationError, RolloutError
from agentrl.protocols import Env, Generator
from agentrl.rollout.chat_template import ChatTemplate, call_id
from agentrl.rollout.context import NOTE, ContextPolicy, ResultSpan, drop_oldest_results
from agentrl.rollout.partial import PartialRollouts, Progress, snapshot
from agentrl.rollout.reward import Scorer
from agentrl.rollout.tool_parsers import FoundCall, ToolParser, get_tool_parser
from agentrl.rollout.toolbox import Observation, Toolbox, ToolSession
from agentrl.rollout.trajectory_builder import TrajectoryBuilder
from agentrl.supervise import deadline, waiting
from agentrl.types import CallRecord, Episode, Generation, Message, SamplingParams, Score, Stop, Task, ToolCall, Trajectory, Turn

_LATE_S = 0.05
"""A generation that fails this close to the rollout's end failed because of it."""

_CALLEE_FIRST_S = 0.2
"""How long the generator may be late before it is cut off: given the chance, it says what it waited for."""

_STALL_S = 10.0
"""A generation that is silent for so long, or for half of a shorter rollout, is not what used up the rollout's time."""

_as_json = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` makes an encoder at each call


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one rollout may use."""

    max_turns: int = 8
    """Generations."""
    max_tokens: int = 1024
    """Response tokens: everything after the prompt, tool results included."""
    max_tokens_per_turn: int = 512
    """Sampled tokens of one generation."""
    max_tool_tokens: int = 256
    """Tokens of one tool result; longer ones are cut. A tool's own, smaller limit wins."""
    max_calls_per_turn: int = 4
    """Calls run per turn; the others are answered with this limit."""
    max_invalid_calls: int = 4
    """Malformed, unknown or invalid calls after which the rollout stops."""
    max_reply_tokens: int = 512
    """Tokens of one reply of an environment; longer ones are cut."""
    turn_timeout_s: float = 300.0
    """Of one generation."""
    env_timeout_s: float = 60.0
    """Of one reply of an environment, and of its ``open``."""
    rollout_timeout_s: float = 1200.0
    """Of the whole rollout, without scoring."""
    context: ContextPolicy | None = None
    """When and how a long context is rewritten; None never does."""


class Rollout(NamedTuple):
    """A finished rollout: what is trained on, and what scoring saw."""

    trajectory: Trajectory
    episode: Episode


@dataclass(frozen=True, slots=True)
class SampledTurn:
    """One generation, as a loop sees it."""

    text: str
    """Decoded for parsing; never encoded again."""
    is_cut: bool
    """It ended at a token limit rather than with the end of a turn."""


class AgentHost(Protocol):
    """Runs black-box agents for the loop ``proxy``; ``agentrl.rollout.proxy.host.ProxyHost`` is the real one."""

    async def play(self, state: "RolloutState") -> Stop:
        """Run one agent to its end; everything it samples is recorded on the state."""
        ...


@dataclass(slots=True, kw_only=True)
class RolloutState:
    """What an agent loop works with."""

    task: Task
    template: ChatTemplate
    generator: Generator
    tools: ToolSession
    has_tools: bool
    parser: ToolParser
    limits: Limits
    sampling: SamplingParams
    """Of every turn; stops where the template's turns end."""
    builder: TrajectoryBuilder
    trajectory_id: str
    group_id: str
    ends_at: float
    """Loop time at which the rollout's deadline passes."""
    cleanup: AsyncExitStack
    """What a loop pushes here runs after scoring, whatever happened."""
    env: Env | None = None
    host: AgentHost | None = None
    partials: PartialRollouts | None = None
    created: float = 0.0
    env_state: Any = None
    score: Score | None = None
    """Set by a loop that knows the score by itself; the scorer is then not asked."""
    turn_rewards: list[tuple[int, int, float]] = field(default_factory=list[tuple[int, int, float]])
    """(segment, token, value), as the trajectory has them."""
    num_turns: int = 0
    num_invalid: int = 0
    tool_rewards: float = 0.0
    texts: list[str] = field(default_factory=list[str])
    """What the assistant wrote, one entry a turn."""
    final_from: int = 0
    """First of ``texts`` after the last tool result."""
    calls: list[CallRecord] = field(default_factory=list[CallRecord])
    result_spans: list[ResultSpan] = field(default_factory=list[ResultSpan])
    """The tool results within the current segment, in order."""

    @property
    def tokens_left(self) -> int:
        return self.builder.tokens_left(self.limits.max_tokens)

    async def generate(self) -> SampledTurn:
        """Sample one turn and append it.

        Raises:
            DeadlineExceeded: no generation within the turn's limit, although the rollout has time left.
            GenerationError: no server could generate, or what came is unusable.
        """
        self._shorten_context()
        left_s = self.ends_at - asyncio.get_running_loop().time()
        timeout_s = max(0.0, min(self.limits.turn_timeout_s, left_s))
        budget = min(self.sampling.max_new_tokens, self.limits.max_tokens_per_turn, self.tokens_left)
        sampling = self.sampling
        if budget != sampling.max_new_tokens:
            sampling = dataclasses.replace(sampling, max_new_tokens=budget)
        started = time.monotonic()
        with waiting("server"):
            async with deadline(timeout_s + _CALLEE_FIRST_S, "turn"):
                generation = await self.generator.generate(
                    self.builder.token_ids,
                    sampling,
                    trajectory_id=self.trajectory_id,
                    group_id=self.group_id,
                    deadline=timeout_s,
                )
        if generation.finish == "abort":
            raise Aborted(f"{generation.server} aborted the generation after {len(generation.ids)} tokens")
        if len(generation.ids) > budget:
            raise GenerationError(f"{generation.server} returned {len(generation.ids)} tokens although {budget} were asked for")
        return self.record(generation, ms=(time.monotonic() - started) * 1e3)

    def record(self, generation: Generation, *, ms: float, segment: int | None = None) -> SampledTurn:
        """Append what was sampled to a segment (by default the current one), as one turn.

        Raises:
            GenerationError: there are no tokens, or they are unusable.
        """
        if not generation.ids:
            raise GenerationError(f"{generation.server} returned no tokens (finish={generation.finish})")
        segment = self.builder.segment if segment is None else segment
        start, end = self.builder.append_sampled(generation, segment=segment)
        text = self.template.decode(self.builder.ids_of(segment)[start:end])  # an array already: cheaper to read than a list
        self.texts.append(text)
        self.num_turns += 1
        self.builder.add_turn(
            Turn(
                kind="model",
                segment=segment,
                start=start,
                end=end,
                ms=ms,
                server=generation.server,
                finish=generation.finish,
                text=text,
            )  # fmt: skip
        )
        return SampledTurn(text, is_cut=generation.finish == "length")

    def find_calls(self, turn: SampledTurn) -> list[FoundCall]:
        """The calls in a turn; none where the task offers no tools."""
        if not self.has_tools:
            return []
        # A prompt that opens the reasoning leaves the sampled text with its end only, or, cut, with neither.
        return self.parser.find_calls(self.template.opened_thinking + turn.text, is_cut=turn.is_cut)

    async def call_tools(self, calls: Sequence[FoundCall]) -> Stop | None:
        """Run calls and append their results; returns why the rollout must stop, if it must.

        Raises:
            ToolInfraError: a tool failed outside the model's control.
        """
        run, surplus = calls[: self.limits.max_calls_per_turn], calls[self.limits.max_calls_per_turn :]
        observations = await self.tools.run(run, turn=self.num_turns - 1)
        if surplus:
            text = (
                f"Error: {len(surplus)} further call{'s were' if len(surplus) > 1 else ' was'} not run; "
                f"at most {self.limits.max_calls_per_turn} per turn"
            )
            observations.append(Observation(name="", text=text, ok=False, error_kind="limit"))
        messages = self._result_messages(calls, observations)
        ids = self.template.observation_ids(messages, last_sampled=self.builder.token_ids[-1])
        self.num_invalid += sum(o.error_kind in ("parse", "unknown_tool", "arguments") for o in observations)
        self.tool_rewards += sum(o.reward or 0.0 for o in observations)
        fits = len(ids) < self.tokens_left  # at least one token must remain for the answer
        is_over = self.num_invalid >= self.limits.max_invalid_calls
        start = end = len(self.builder.token_ids)
        if fits and not is_over:
            start, end = self.builder.append_observed(ids)
            self.result_spans.append(ResultSpan(start, end, len(messages)))
            self.final_from = len(self.texts)
        for observation in observations:
            self._record(observation, start, end)
        if is_over:
            return "tool_limit"
        return None if fits else "max_tokens"

    def _result_messages(self, calls: Sequence[FoundCall], observations: Sequence[Observation]) -> list[Message]:
        """Tool results as the templates want them: with the tool's name and the id of the call that they answer."""
        messages: list[Message] = []
        for index, observation in enumerate(observations):
            call = calls[index]
            given = call.id if isinstance(call, ToolCall) else ""
            messages.append(
                {
                    "role": "tool",
                    "name": observation.name,
                    "tool_call_id": given or call_id(self.num_turns - 1, index),
                    "content": observation.text,
                }
            )
        return messages

    def _record(self, observation: Observation, start: int, end: int) -> None:
        self.builder.add_turn(
            Turn(
                kind="tool",
                segment=self.builder.segment,
                start=start,
                end=end,
                ms=observation.ms,
                name=observation.name,
                arguments=_as_json(observation.arguments) if observation.name else observation.raw,
                ok=observation.ok,
                error_kind=observation.error_kind,
                text=observation.text,
            )  # fmt: skip
        )
        self.calls.append(
            CallRecord(
                name=observation.name,
                arguments=observation.arguments,
                ok=observation.ok,
                error_kind=observation.error_kind,
                result=observation.text,
            )
        )

    def observe(self, messages: Sequence[Message], *, kind: Literal["tool", "env"], name: str = "", ms: float = 0.0) -> bool:
        """Append messages that nobody sampled, as the template prints them after the last turn; False where they do not fit.

        Raises:
            TemplateError: the template rewrites earlier turns.
        """
        ids = self.template.observation_ids(messages, last_sampled=self.builder.token_ids[-1])
        if len(ids) >= self.tokens_left:  # at least one token must remain for the answer
            return False
        start, end = self.builder.append_observed(ids)
        text = "\n".join(str(m.get("content") or "") for m in messages)
        self.builder.add_turn(
            Turn(kind=kind, segment=self.builder.segment, start=start, end=end, ms=ms, name=name, text=text)
        )  # fmt: skip
        return True

    def new_segment(self, messages: Sequence[Message], *, why: str = "rewritten") -> None:
        """Go on from another history: summarised, shortened, or of a sub-agent. What was sampled so far stays on record.

        The next generation sees exactly ``messages``, rendered with the generation prompt. They are the new segment's prompt
        and never trained on, assistant messages among them included. A trajectory's segments share its reward.
        """
        self.new_segment_of(self.template.prompt_ids(messages), why=why)

    def new_segment_of(self, prompt_ids: Sequence[int], *, why: str, spans: Sequence[ResultSpan] = ()) -> None:
        """The same from ids, for example the last segment's with some spans replaced; ``spans`` are its tool results."""
        self.builder.new_segment(prompt_ids)
        self.result_spans = list(spans)
        turn = Turn(
            kind="env", segment=self.builder.segment, start=0, end=len(prompt_ids), ms=0.0, name="context", text=why
        )  # fmt: skip
        self.builder.add_turn(turn)

    def _shorten_context(self) -> None:
        """Start a segment without the oldest tool results where the limits say so."""
        policy = self.limits.context
        if policy is None:
            return

        def note_ids(count: int, last: int) -> list[int]:
            notes: list[Message] = [{"role": "tool", "content": NOTE}] * count
            return self.template.observation_ids(notes, last_sampled=last)

        before = len(self.builder.token_ids)
        rewrite = drop_oldest_results(self.builder.token_ids, self.result_spans, policy, note_ids)
        if rewrite is not None:
            why = f"dropped {rewrite.num_dropped} tool results: {before} -> {len(rewrite.ids)} tokens"
            self.new_segment_of(rewrite.ids, why=why, spans=rewrite.spans)

    def reward_turn(self, value: float) -> None:
        """Give the last sampled turn a reward of its own.

        Raises:
            RolloutError: nothing was sampled yet.
        """
        last = next((t for t in reversed(self.builder.turns) if t.kind == "model"), None)
        if last is None:
            raise RolloutError(f"a turn reward of {value} came before the model's first turn; give it after a turn")
        self.turn_rewards.append((last.segment, last.end - 1, float(value)))

    async def keep(self, *, env_saved: str | None = None, is_resumable: bool = True) -> None:
        """Keep the turns so far for a restart of the process. Call it where the loop would go on by generating.

        Args:
            env_saved: what the loop's Env needs to go on, in a loop that has one.
            is_resumable: the loop could go on from here; else it is only counted how much a restart wastes.
        """
        if self.partials is None:
            return
        progress = None
        if self.tools.is_replayable and is_resumable:
            progress = Progress(
                num_turns=self.num_turns, num_invalid=self.num_invalid, tool_rewards=self.tool_rewards, final_from=self.final_from,
                texts=self.texts, calls=self.calls, result_spans=self.result_spans, turn_rewards=self.turn_rewards,
                created=self.created, env_saved=env_saved,
            )  # fmt: skip
        await self.partials.save(self.trajectory_id, snapshot(self.builder, progress))

    async def resume(self, *, with_env: bool = False) -> str | None:
        """Take up what an earlier process kept of this rollout, if it can be taken up; returns what its Env saved."""
        if self.partials is None:
            return None
        progress = await self.partials.load(self.trajectory_id, self.builder, with_env=with_env)
        if progress is None:
            return None
        self.num_turns, self.num_invalid = progress.num_turns, progress.num_invalid
        self.tool_rewards, self.final_from = progress.tool_rewards, progress.final_from
        self.texts, self.calls = progress.texts, progress.calls
        self.result_spans, self.turn_rewards = progress.result_spans, progress.turn_rewards
        self.created = progress.created
        return progress.env_saved

    def episode(self, stop: Stop) -> Episode:
        """What scoring sees."""
        return Episode(
            task=self.task,
            assistant_text="\n".join(self.texts),
            final="\n".join(self.texts[self.final_from :]),
            transcript=self.template.decode_all(self.builder.response_ids()),
            calls=tuple(self.calls),
            stop=stop,
            num_turns=self.num_turns,
            texts=tuple(self.texts),
            state=self.env_state,
        )


class Aborted(RolloutError):
    """The generation was aborted from outside, for example by an operator."""

    kind = "aborted"


AgentLoop: TypeAlias = Callable[[RolloutState], Awaitable[Stop]]
"""Plays one rollout on the state and returns why it ended."""

_LOOPS: dict[str, AgentLoop] = {}

PROMPTLESS = frozenset({"proxy"})
"""Loops in which the agent, not the row, makes the prompt."""


def agent_loop(name: str) -> Callable[[AgentLoop], AgentLoop]:
    """Register an agent loop."""

    def register(loop: AgentLoop) -> AgentLoop:
        _LOOPS[name] = loop
        return loop

    return register


def get_agent_loop(name: str) -> AgentLoop:
    """The loop registered as ``name``; verl's ``single_turn_agent`` is ``single_turn``.

    Raises:
        ConfigError: there is none; names those there are.
    """
    import agentrl.rollout.env_loop  # pyright: ignore[reportUnusedImport]  # both register themselves
    import agentrl.rollout.proxy.loop  # noqa: F401  # pyright: ignore[reportUnusedImport]

    known = _LOOPS.get(name) or _LOOPS.get(name.removesuffix("_agent"))
    if known is None:
        raise ConfigError(f"no agent loop `{name}`; there are: {', '.join(sorted(_LOOPS))}")
    return known


@agent_loop("single_turn")
async def single_turn(state: RolloutState) -> Stop:
    """One generation; tools are not called."""
    turn = await state.generate()
    return "max_tokens" if turn.is_cut else "answered"


@agent_loop("tool_agent")
async def tool_agent(state: RolloutState) -> Stop:
    """Generate and call tools in turn until the model answers or a limit is reached."""
    await state.resume()
    while True:
        turn = await state.generate()
        calls = state.find_calls(turn)
        if not calls:
            return "max_tokens" if turn.is_cut else "answered"
        if state.tokens_left == 0:
            return "max_tokens"
        if state.num_turns >= state.limits.max_turns:
            return "max_turns"
        stop = await state.call_tools(calls)
        if stop is not None:
            return stop
        await state.keep()


async def run_rollout(
    task: Task,
    *,
    loop: str,
    template: ChatTemplate,
    generator: Generator,
    toolbox: Toolbox,
    scorer: Scorer,
    limits: Limits,
    sampling: SamplingParams,
    trajectory_id: str,
    group_id: str,
    ordinal: int,
    sample_index: int,
    attempt: int,
    env_name: str,
    parser: str = "hermes",
    require_versions: bool = True,
    host: AgentHost | None = None,
    partials: PartialRollouts | None = None,
) -> Rollout:
    """Roll one task out and score it.

    Args:
        task: the row; its ``tool_selection`` narrows the tools shown and runnable.
        loop: name of the agent loop.
        template: of the policy's tokenizer.
        generator: samples tokens.
        toolbox: the run's tools; may be empty.
        scorer: gives the reward.
        limits: of the rollout.
        sampling: of every turn; its ``max_new_tokens`` is lowered to what the limits leave.
        trajectory_id: ``{task_id}/{ordinal}/{sample_index}/{attempt}``.
        group_id: ``{task_id}/{ordinal}``.
        ordinal: of the group.
        sample_index: within the group.
        attempt: 0 for the first try.
        env_name: recorded.
        parser: tool-call format of the model.
        require_versions: refuse tokens without a policy version; off to evaluate foreign servers.
        host: runs agents for the loop ``proxy``.
        partials: keeps completed turns for a restart of the process (loops ``tool_agent`` and ``env``); None keeps nothing.

    Raises:
        RolloutError: nothing to train on. ``kind`` says why; ``partial`` holds the `Rollout` so far, with stop
            ``aborted`` or ``error:<kind>`` and reward 0, where there is one.
    """
    play = get_agent_loop(loop)
    created = time.time()
    shown = template.with_tools(toolbox.schemas(task.tool_selection)) if loop != "single_turn" else template.with_tools(None)
    stops = (*sampling.stop_token_ids, *shown.stop_ids)
    sampling = dataclasses.replace(sampling, stop_token_ids=tuple(dict.fromkeys(stops)))
    env = scorer.env
    # An agent of its own opens with what it likes; the others with the Env's messages, or the row's.
    messages = _prompt_of(env, task) if env is not None and hasattr(env, "prompt") else task.prompt
    opening = None if loop in PROMPTLESS else shown.prompt_ids(messages)
    builder = TrajectoryBuilder(opening, require_versions=require_versions)
    state: RolloutState | None = None

    def finish(stop: Stop, score: Score) -> Trajectory:
        return builder.finish(
            id=trajectory_id, task_id=task.id, group_id=group_id, ordinal=ordinal, sample_index=sample_index, attempt=attempt,
            env=env_name, agent=loop, data_source=task.data_source, split=task.split, reward=score.reward,
            reward_terms={"correct": float(score.correct), **score.terms}, stop=stop, created=state.created if state is not None else created, finished=time.time(),
            turn_rewards=state.turn_rewards if state is not None else (),
        )  # fmt: skip

    async with AsyncExitStack() as cleanup:
        try:
            async with toolbox.session(
                task=task, trajectory_id=trajectory_id, sample_index=sample_index, max_output_tokens=limits.max_tool_tokens
            ) as tools:
                state = RolloutState(
                    task=task, template=shown, generator=generator, tools=tools, has_tools=shown.tools is not None,
                    parser=get_tool_parser(parser), limits=limits, sampling=sampling, builder=builder,
                    trajectory_id=trajectory_id, group_id=group_id, env=env, host=host, cleanup=cleanup, partials=partials, created=created,
                    ends_at=asyncio.get_running_loop().time() + limits.rollout_timeout_s,
                )  # fmt: skip
                stop = await _play(play, state)
            episode = state.episode(stop)
            score = state.score or await scorer.score(episode, tool_rewards=state.tool_rewards)
        except RolloutError as error:
            if state is not None:
                failed = "aborted" if isinstance(error, Aborted) else f"error:{error.kind}"
                state.turn_rewards.clear()
                error.partial = Rollout(finish(failed, Score(correct=0.0)), state.episode(failed))
            if partials is not None:
                await partials.delete(trajectory_id)
            raise
        return Rollout(finish(stop, _with_turn_rewards(score, state.turn_rewards)), episode)


def _prompt_of(env: Env, task: Task) -> Sequence[Message]:
    """What the Env opens with. A row that it cannot open fails alone."""
    try:
        messages = env.prompt(task)
    except RolloutError:
        raise
    except Exception as error:
        raise EnvError(f"env {type(env).__name__}.prompt raised {type(error).__name__} on task {task.id}: {error}") from error
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not all(isinstance(m, Mapping) for m in messages):  # pyright: ignore[reportUnnecessaryIsInstance]  # foreign
        raise EnvError(
            f"env {type(env).__name__}.prompt returned {type(messages).__name__} for task {task.id}; return a list of messages"
        )
    return messages


def _with_turn_rewards(score: Score, turn_rewards: Sequence[tuple[int, int, float]]) -> Score:
    """The reward of a rollout is the sum of all it earned, so what turns earned is a term of it."""
    if not turn_rewards:
        return score
    terms = {**score.terms, "turns": sum(value for _, _, value in turn_rewards)}
    return dataclasses.replace(score, terms=terms)


async def _play(play: AgentLoop, state: RolloutState) -> Stop:
    """Play under the rollout's deadline; passing it is an end like others, unless nothing was sampled or a server stalled."""
    left_s = max(0.0, state.ends_at - asyncio.get_running_loop().time())
    try:
        async with deadline(left_s + 2 * _CALLEE_FIRST_S, "rollout"):
            return await play(state)
    except DeadlineExceeded as error:
        is_own = error.stage == "rollout" or asyncio.get_running_loop().time() >= state.ends_at - _LATE_S
        is_stall = error.silent_s is not None and error.silent_s >= min(_STALL_S, state.limits.rollout_timeout_s / 2)
        if is_own and state.builder.num_sampled and not is_stall:
            return "deadline"
        raise
