"""Tools from YAML; each call under its own deadline; the model's errors apart from infrastructure errors.

The model's mistakes (text that is no call, an unknown name, bad arguments, ``ToolError``, a call that runs too long) become
observations that it reads and may learn from. Everything else that goes wrong in a tool is infrastructure: the rollout ends
as failed and is never given a reward. When most calls of a tool fail that way, its circuit opens: `Toolbox.blocked` names
the tool, the worker starts no new rollouts, and one probe is let through per pause until a call succeeds.
"""

import asyncio
import contextlib
import difflib
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

from agentrl.errors import AgentRLError, ConfigError, DeadlineExceeded, RolloutError, ToolBusy, ToolError, ToolInfraError
from agentrl.protocols import ToolContext, ToolResult
from agentrl.rollout.tool import ArgumentError, Arguments, ToolSchema
from agentrl.rollout.tool_instances import FunctionInstance, ToolInstance, as_result, awaited, close_quietly
from agentrl.rollout.tool_limits import RateLimit, ResultCache, ToolLimits, backoff_s, cache_key
from agentrl.rollout.tool_parsers import FoundCall, ParseFailure
from agentrl.rollout.tool_stats import ToolStats
from agentrl.rollout.truncation import cut_to_tokens
from agentrl.supervise import bounded, deadline, waiting
from agentrl.types import Task, ToolCall

logger = logging.getLogger(__name__)

ErrorKind: TypeAlias = Literal["", "parse", "unknown_tool", "arguments", "tool", "timeout", "limit"]
ToolKind: TypeAlias = Literal["function", "class", "verl", "http", "mcp"]

OPEN_TIMEOUT_S = 60.0
"""Deadline of a tool's ``open``; not the model's time, so not the call's deadline."""
CLOSE_TIMEOUT_S = 10.0
_JITTER = random.Random()


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one call gave, for the model and for the record."""

    name: str
    text: str
    ok: bool
    error_kind: ErrorKind = ""
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    raw: str = ""
    """The call as the model wrote it."""
    ms: float = 0.0
    reward: float | None = None


class DeclaredTool:
    """One tool of the run: what the model sees, its limits, and how an instance for a trajectory is made.

    Args:
        schema: what the model sees.
        arguments: checks what the model passes.
        limits: see `ToolLimits`.
        reference: as the entry names it.
        make: an instance for one trajectory.
        oracle: it may see the ground truth.
        is_stateful: calls of one trajectory share an instance and run one after the other.
        is_idempotent: it may be asked twice, so retried and cached.
        kind: of its entry.
        place: where it was found, for people: file and line, address or command.
        probe: says in a line that its service can be reached, or raises.
        shutdown: ends what its instances share.
    """

    def __init__(
        self,
        *,
        schema: ToolSchema,
        arguments: Arguments,
        limits: ToolLimits,
        reference: str,
        make: Callable[[ToolContext], ToolInstance],
        oracle: bool = False,
        is_stateful: bool,
        is_idempotent: bool = False,
        kind: ToolKind = "function",
        place: str = "",
        probe: Callable[[], Awaitable[str]] | None = None,
        shutdown: Callable[[], Any] | None = None,
    ) -> None:
        self.schema = schema
        self.arguments = arguments
        self.limits = limits
        self.reference = reference
        self.make = make
        self.oracle = oracle
        self.is_stateful = is_stateful
        self.is_idempotent = is_idempotent
        self.kind: ToolKind = kind
        self.place = place
        self.probe = probe
        self.shutdown = shutdown
        self.stats = ToolStats(schema.name, limits.max_infra_error_rate)
        self.places = asyncio.Semaphore(limits.concurrency)
        self.rate = RateLimit(limits.calls_per_s, limits.burst)
        self.cache = ResultCache(limits.cache) if limits.cache else None

    @property
    def name(self) -> str:
        return self.schema.name


class Toolbox:
    """The tools of a run. The schemas shown to the model and the tools that can be called are the same objects.

    Args:
        tools: in the order the model sees them.
        tokenizer: counts tokens of results; None keeps results whole.
    """

    def __init__(self, tools: Sequence[DeclaredTool] = (), *, tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer
        self._tools: dict[str, DeclaredTool] = {}
        for declared in tools:
            if declared.name in self._tools:
                raise ConfigError(
                    f"two tools are named `{declared.name}`: {self._tools[declared.name].reference} and {declared.reference}. "
                    "Give one of them a `name:`"
                )
            self._tools[declared.name] = declared

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tools)

    @property
    def tools(self) -> tuple[DeclaredTool, ...]:
        return tuple(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    def schemas(self, selection: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Function schemas of the selected tools, all by default, in declared order.

        Raises:
            ConfigError: the selection names a tool that is not declared.
        """
        return [declared.schema.as_function for declared in self._select(selection)]

    def _select(self, selection: Sequence[str] | None) -> list[DeclaredTool]:
        if selection is None:
            return list(self._tools.values())
        unknown = [name for name in selection if name not in self._tools]
        if unknown:
            raise ConfigError(
                f"tool_selection names {', '.join(f'`{n}`' for n in unknown)}, which the run does not declare. "
                f"Declared: {', '.join(self._tools) or 'none'}"
            )
        return [declared for name, declared in self._tools.items() if name in selection]

    @asynccontextmanager
    async def session(
        self, *, task: Task, trajectory_id: str, sample_index: int, max_output_tokens: int | None = None
    ) -> AsyncGenerator["ToolSession", None]:
        """The tools of one trajectory. Opened at their first call; closed at the end, also after a cancellation.

        Args:
            task: its ``tool_selection``, ``tools_kwargs`` and, for oracle tools only, ``ground_truth`` are used.
            trajectory_id: shown to the tools.
            sample_index: shown to the tools.
            max_output_tokens: an upper bound over every tool's ``output_tokens``.
        """
        async with AsyncExitStack() as stack:
            yield ToolSession(
                {declared.name: declared for declared in self._select(task.tool_selection)},
                task=task,
                trajectory_id=trajectory_id,
                sample_index=sample_index,
                tokenizer=self._tokenizer,
                max_output_tokens=max_output_tokens,
                stack=stack,
            )

    def stats(self) -> dict[str, dict[str, float]]:
        """Per tool: the counters of `ToolStats.summary`."""
        return {name: declared.stats.summary() for name, declared in self._tools.items()}

    async def aclose(self) -> None:
        """End what the tools share over a process: awaits ``aclose`` of tool classes (and verl objects) that have one."""
        for name, declared in self._tools.items():
            if declared.shutdown is not None:
                try:
                    async with deadline(CLOSE_TIMEOUT_S, f"tool:{name} aclose"):
                        await awaited(declared.shutdown())
                except Exception as error:  # noqa: BLE001  # foreign code, at the end of the process
                    logger.warning("tool_aclose_failed tool=%s: %s: %s", name, type(error).__name__, error)

    def blocked(self) -> str | None:
        """``tool:<name>`` while that tool's circuit is open: the wait reason for which no new rollout may start.

        A rollout that starts while circuits are open is the probe of all of them. None is spent while another still blocks, or
        two tools whose cooldowns end at different times would block for ever.
        """
        circuits = {name: declared.stats.breaker for name, declared in self._tools.items() if declared.stats.breaker.is_open}
        for name, breaker in circuits.items():
            if breaker.is_blocking:
                return f"tool:{name}"
        for breaker in circuits.values():
            breaker.allows()
        return None


class ToolSession:
    """See `Toolbox.session`."""

    def __init__(
        self,
        tools: Mapping[str, DeclaredTool],
        *,
        task: Task,
        trajectory_id: str,
        sample_index: int,
        tokenizer: Any,
        max_output_tokens: int | None,
        stack: AsyncExitStack,
    ) -> None:
        self._tools = tools
        self._task = task
        self._trajectory_id = trajectory_id
        self._sample_index = sample_index
        self._tokenizer = tokenizer
        self._max_output_tokens = max_output_tokens
        self._stack = stack
        self._instances: dict[str, ToolInstance] = {}
        self._contexts: dict[str, ToolContext] = {}
        self._locks = {name: asyncio.Lock() for name in tools}
        self._caches = {n: ResultCache(d.limits.cache) for n, d in tools.items() if d.limits.cache}

    @property
    def is_replayable(self) -> bool:
        """Whether a new session could go on where this one is: nothing was opened that holds state."""
        return not any(self._tools[name].is_stateful or self._contexts[name].state for name in self._instances)

    async def run(self, calls: Sequence[FoundCall], *, turn: int = 0) -> list[Observation]:
        """Answer the calls of one turn, in order. Calls of one stateful tool run one after the other, others together.

        Raises:
            ToolInfraError: a tool failed outside the model's control; the turn's other calls are cancelled.
        """
        if len(calls) == 1:
            return [await self._answer(calls[0], turn)]
        results: list[Observation | None] = [None] * len(calls)

        async def answer(index: int, call: FoundCall) -> None:
            results[index] = await self._answer(call, turn)

        try:
            async with asyncio.TaskGroup() as group:
                for index, call in enumerate(calls):
                    group.create_task(answer(index, call))
        except BaseExceptionGroup as errors:
            failure = _first_rollout_error(errors)
            if failure is None:
                raise
            raise failure from failure.__cause__
        return [r for r in results if r is not None]

    async def _answer(self, call: FoundCall, turn: int) -> Observation:
        if isinstance(call, ParseFailure):
            return Observation(name="", text=f"Error: {call.reason}", ok=False, error_kind="parse", raw=call.raw)
        declared = self._tools.get(call.name)
        if declared is None:
            near = difflib.get_close_matches(call.name, self._tools, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            text = f"Error: there is no tool {call.name[:80]!r}. Tools: {', '.join(self._tools) or 'none'}.{hint}"
            return Observation(
                name=call.name, text=text, ok=False, error_kind="unknown_tool", arguments=call.arguments, raw=call.raw
            )
        try:
            arguments = declared.arguments.bind(call.arguments)
        except ArgumentError as error:
            declared.stats.count_refused()
            text = f"Error: {error}"
            return Observation(
                name=call.name, text=text, ok=False, error_kind="arguments", arguments=call.arguments, raw=call.raw
            )
        key, cache = self._cache_of(declared, call)
        lock = self._locks[call.name] if declared.is_stateful else contextlib.nullcontext()
        with waiting(f"tool:{call.name}"):
            async with lock:
                known = cache.get(key) if cache is not None and key is not None else None
                if known is not None:
                    declared.stats.count_cached()
                    return self._observation(declared, call, "", known, 0.0)
                async with declared.places:
                    await self._turn_at(declared)
                    kind, result, ms = await self._call(declared, arguments, turn)
                if cache is not None and key is not None and not kind:
                    cache.put(key, result)
                return self._observation(declared, call, kind, result, ms)

    async def _turn_at(self, declared: DeclaredTool) -> None:
        """Wait for the tool's rate. A pause that its service asked for is waited for as long as an answer would be, and no longer:
        the rollout's deadline would else pass over it, and blame the model."""
        started = time.monotonic()
        try:
            await declared.rate.wait(longest_pause_s=declared.limits.timeout_s)
        except ToolBusy as busy:
            error = ToolInfraError(f"tool `{declared.name}`: its service {busy}")
            declared.stats.record_infra(error, _ms(started))
            raise error from None

    def _cache_of(self, declared: DeclaredTool, call: ToolCall) -> tuple[str | None, ResultCache | None]:
        """The cache of the asked scope, and the key of this call in it."""
        limits = declared.limits.cache
        if limits is None:
            return None, None
        kwargs: Mapping[str, Any] = self._task.tools_kwargs.get(declared.name) or {}
        key = cache_key(call.arguments, kwargs, self._task.ground_truth if declared.oracle else None)
        return key, declared.cache if limits.scope == "process" else self._caches[declared.name]

    def _observation(self, declared: DeclaredTool, call: ToolCall, kind: ErrorKind, result: ToolResult, ms: float) -> Observation:
        return Observation(
            name=declared.name,
            text=self._shortened(result.text, declared.limits),
            ok=not kind,
            error_kind=kind,
            arguments=call.arguments,
            raw=call.raw,
            ms=ms,
            reward=result.reward,
        )

    async def _call(self, declared: DeclaredTool, arguments: dict[str, Any], turn: int) -> tuple[ErrorKind, ToolResult, float]:
        """One call, counted. The place where an error becomes the model's or the infrastructure's."""
        started = time.monotonic()
        try:
            kind, result = await self._classified(declared, arguments, turn)
        except ToolInfraError as error:
            declared.stats.record_infra(error, _ms(started))
            raise
        declared.stats.record("ok" if not kind else "model_errors" if kind == "tool" else "timeouts", _ms(started))
        return kind, result, _ms(started)

    async def _classified(self, declared: DeclaredTool, arguments: dict[str, Any], turn: int) -> tuple[ErrorKind, ToolResult]:
        timeout_s = declared.limits.timeout_s
        try:
            instance = await self._opened(declared)
        except DeadlineExceeded as error:
            raise ToolInfraError(f"tool `{declared.name}` did not open: {error}") from error
        except RolloutError:
            raise
        except Exception as error:  # noqa: BLE001  # a tool is foreign code; classified here, once
            raise ToolInfraError(f"tool `{declared.name}` raised {type(error).__name__}: {error}") from error
        self._contexts[declared.name].begin(turn, seed=f"{self._trajectory_id} {declared.name} {turn}")
        failed: list[ToolInfraError] = []
        try:
            asked = _attempts(declared, instance, arguments, failed)
            return "", await bounded(asked, timeout_s, f"tool:{declared.name}")
        except ToolError as error:
            return "tool", ToolResult(text=f"Error: {error}")
        except DeadlineExceeded as error:
            if failed:  # time ran out over retries, not over the model's call
                raise failed[-1] from error
            if declared.limits.on_timeout == "infra":
                raise ToolInfraError(f"tool `{declared.name}` did not answer within {timeout_s:g} s") from error
            return "timeout", ToolResult(text=f"Error: {declared.name} did not finish within {timeout_s:g} s")
        except RolloutError:
            raise
        except AgentRLError as error:
            raise ToolInfraError(f"tool `{declared.name}`: {error}") from error

    async def _opened(self, declared: DeclaredTool) -> ToolInstance:
        """The trajectory's instance; a failed ``open`` is an infrastructure failure, and ``close`` still runs."""
        if declared.name in self._instances:
            return self._instances[declared.name]
        kwargs: dict[str, Any] = dict(self._task.tools_kwargs.get(declared.name) or {})
        context = ToolContext(
            trajectory_id=self._trajectory_id,
            task_id=self._task.id,
            sample_index=self._sample_index,
            kwargs=kwargs if declared.oracle else _without_ground_truth(kwargs),
            ground_truth=self._task.ground_truth if declared.oracle else None,
        )
        instance = declared.make(context)
        self._contexts[declared.name] = context
        self._instances[declared.name] = instance
        if isinstance(instance, FunctionInstance):
            return instance  # it holds nothing, so there is nothing to open or to close
        self._stack.push_async_callback(_close, instance, declared.name)
        try:
            await bounded(instance.open(), OPEN_TIMEOUT_S, f"tool:{declared.name} open")
        except ToolError as error:  # nothing the model did opened it
            raise ToolInfraError(f"tool `{declared.name}` did not open: {error}") from error
        return instance

    def _shortened(self, text: str, limits: ToolLimits) -> str:
        limit = limits.output_tokens if self._max_output_tokens is None else min(limits.output_tokens, self._max_output_tokens)
        return text if self._tokenizer is None else cut_to_tokens(self._tokenizer, text, limit, limits.truncate)


async def _attempts(
    declared: DeclaredTool, instance: ToolInstance, arguments: dict[str, Any], failed: list[ToolInfraError]
) -> ToolResult:
    """Ask until the tool answers, its retries are used up, or the next would come after the deadline, which is the caller's.

    Args:
        failed: receives each infrastructure error.

    Raises:
        ToolError: the model's mistake.
        ToolInfraError: the last attempt's.
    """
    ends_at = asyncio.get_running_loop().time() + declared.limits.timeout_s
    for attempt in range(declared.limits.retries + 1):
        try:
            return as_result(await instance.call(dict(arguments)))
        except ToolError:
            raise
        except ToolInfraError as error:
            failed.append(error)
        except Exception as error:  # noqa: BLE001  # a tool is foreign code; classified here, once
            cause = str(error) if isinstance(error, DeadlineExceeded) else f"raised {type(error).__name__}: {error}"
            failed.append(ToolInfraError(f"tool `{declared.name}` {cause}"))
            failed[-1].__cause__ = error
        pause_s = backoff_s(attempt, _JITTER)
        if isinstance(failed[-1], ToolBusy) and failed[-1].retry_after_s is not None:
            pause_s = failed[-1].retry_after_s
            declared.rate.pause(pause_s)
        if attempt == declared.limits.retries or asyncio.get_running_loop().time() + pause_s >= ends_at:
            break
        declared.stats.retries += 1
        await asyncio.sleep(pause_s)
    raise failed[-1]


async def _close(instance: ToolInstance, name: str) -> None:
    await close_quietly(bounded(instance.close(), CLOSE_TIMEOUT_S, f"tool:{name} close"), name)


def _first_rollout_error(errors: BaseExceptionGroup[BaseException]) -> RolloutError | None:
    """The first failure, if all of them are expected ones."""
    if errors.split(RolloutError)[1] is not None:
        return None
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return cast("RolloutError", first)


def _ms(started: float) -> float:
    return (time.monotonic() - started) * 1e3


def _without_ground_truth(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """verl's rows carry ``create_kwargs: {ground_truth: …}``; only an oracle may have it."""
    return {
        k: _without_ground_truth(cast("Mapping[str, Any]", v)) if isinstance(v, Mapping) else v
        for k, v in kwargs.items()
        if k != "ground_truth"
    }
