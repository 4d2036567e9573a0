"""Tools from YAML; each call under its own deadline; the model's errors apart from infrastructure errors.

The model's mistakes (text that is no call, an unknown name, bad arguments, ``ToolError``, a call that runs too long) become
observations that it reads and may learn from. Everything else that goes wrong in a tool is infrastructure: the rollout ends
as failed and is never given a reward. When most calls of a tool fail that way, its circuit opens: `Toolbox.blocked` names
the tool, the worker starts no new rollouts, and one probe is let through per `COOLDOWN_S` until a call succeeds.
"""

import asyncio
import contextlib
import difflib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

from agentrl.errors import ConfigError, DeadlineExceeded, RolloutError, ToolError, ToolInfraError
from agentrl.plugins import Truncate
from agentrl.protocols import ToolContext, ToolResult
from agentrl.rollout.bounded_call import bounded_call
from agentrl.rollout.circuit import CircuitBreaker
from agentrl.rollout.tool import ArgumentError, Arguments, ToolSchema
from agentrl.rollout.tool_instances import ToolInstance, as_result, awaited
from agentrl.rollout.tool_parsers import FoundCall, ParseFailure
from agentrl.rollout.truncation import cut_to_tokens
from agentrl.supervise import deadline, waiting
from agentrl.types import Task, ToolCall

logger = logging.getLogger(__name__)

ErrorKind: TypeAlias = Literal["", "parse", "unknown_tool", "arguments", "tool", "timeout", "limit"]

BREAKER_WINDOW = 50
"""Latest calls of a tool that its circuit breaker looks at."""
BREAKER_MIN_CALLS = 20
"""Calls before it may open: two failures of three say little."""
COOLDOWN_S = 15.0
"""Between probes while a circuit is open."""
OPEN_TIMEOUT_S = 60.0
"""Deadline of a tool's ``open``; not the model's time, so not the call's deadline."""
CLOSE_TIMEOUT_S = 10.0
_LATENCIES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolLimits:
    """What one tool may use."""

    timeout_s: float = 10.0
    """Of one call. Waiting for a place under ``concurrency`` does not count."""
    concurrency: int = 64
    """Calls at once in this process."""
    output_tokens: int = 512
    """Tokens of one result."""
    truncate: Truncate = "middle"
    """The side that is cut away from longer results: ``left`` keeps the tail, ``right`` the head."""
    max_infra_error_rate: float = 0.5
    """Of the latest calls; above it rollouts pause."""


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


class _Stats:
    """Counters of one tool, and its circuit breaker."""

    def __init__(self, name: str, limits: ToolLimits) -> None:
        self.name = name
        self.calls = self.ok = self.model_errors = self.timeouts = self.infra_errors = 0
        self._limit = limits.max_infra_error_rate
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self.breaker = CircuitBreaker(
            window=BREAKER_WINDOW, min_calls=BREAKER_MIN_CALLS, max_rate=self._limit, cooldown_s=COOLDOWN_S
        )

    def record(self, kind: Literal["ok", "model_errors", "timeouts"], ms: float) -> None:
        """Count one call that the tool answered, or that ran out of time."""
        self.calls += 1
        setattr(self, kind, getattr(self, kind) + 1)
        self._latencies.append(ms)
        if kind == "timeouts" and self.breaker.is_open:
            return  # a hanging service is no sign of life
        if self.breaker.record(ok=True) == "closed":
            logger.warning("tool_circuit_closed tool=%s: a call succeeded; rollouts go on", self.name)

    def count_refused(self) -> None:
        """Count a call that never reached the tool: its arguments did not fit."""
        self.calls += 1
        self.model_errors += 1

    def record_infra(self, error: BaseException, ms: float) -> None:
        """Count one call that failed outside the model's control."""
        self.calls += 1
        self.infra_errors += 1
        self._latencies.append(ms)
        if self.breaker.record(ok=False) == "opened":
            logger.error(
                "tool_circuit_open tool=%s: %d of the last %d calls failed outside the model's control (last: %s). New rollouts "
                "pause; nothing of these was trained on. Repair or start the tool's service; a probe goes out every %g s "
                "(limit: max_infra_error_rate=%g)",
                self.name, self.breaker.failed, self.breaker.seen, error, COOLDOWN_S, self._limit,
            )  # fmt: skip

    def summary(self) -> dict[str, float]:
        ordered = sorted(self._latencies)
        return {
            "calls": self.calls,
            "ok": self.ok,
            "model_errors": self.model_errors,
            "timeouts": self.timeouts,
            "infra_errors": self.infra_errors,
            "p50_ms": ordered[len(ordered) // 2] if ordered else 0.0,
            "p99_ms": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] if ordered else 0.0,
            "circuit_open": float(self.breaker.is_open),
        }


class DeclaredTool:
    """One entry of the tool list: what the model sees, its limits, and how an instance for a trajectory is made."""

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
        shutdown: Callable[[], Any] | None = None,
    ) -> None:
        self.schema = schema
        self.arguments = arguments
        self.limits = limits
        self.reference = reference
        self.make = make
        self.oracle = oracle
        self.is_stateful = is_stateful
        self.shutdown = shutdown
        self.stats = _Stats(schema.name, limits)
        self.places = asyncio.Semaphore(limits.concurrency)

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
        """Per tool: calls, ok, model_errors, timeouts, infra_errors, p50_ms, p99_ms, circuit_open."""
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
        """``tool:<name>`` while that tool's circuit is open: the wait reason for which no new rollout may start."""
        for name, declared in self._tools.items():
            if not declared.stats.breaker.allows():
                return f"tool:{name}"
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

    async def run(self, calls: Sequence[FoundCall], *, turn: int = 0) -> list[Observation]:
        """Answer the calls of one turn, in order. Calls of one stateful tool run one after the other, others together.

        Raises:
            ToolInfraError: a tool failed outside the model's control; the turn's other calls are cancelled.
        """
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
        lock = self._locks[call.name] if declared.is_stateful else contextlib.nullcontext()
        with waiting(f"tool:{call.name}"):
            async with lock, declared.places:
                return await self._call(declared, call, arguments, turn)

    async def _call(self, declared: DeclaredTool, call: ToolCall, arguments: dict[str, Any], turn: int) -> Observation:
        started = time.monotonic()
        own = DeadlineExceeded("", 0.0)
        kind: ErrorKind = ""
        try:
            instance = await self._opened(declared)
            self._contexts[declared.name].turn = turn
            try:
                value = await bounded_call(
                    _own_deadlines_apart(instance, arguments, declared.name),
                    declared.limits.timeout_s,
                    f"tool:{declared.name}",
                )
            except DeadlineExceeded as error:
                own = error
                raise
            result = as_result(value)
        except ToolError as error:
            kind, result = "tool", ToolResult(text=f"Error: {error}")
        except DeadlineExceeded as error:
            if error is not own:
                declared.stats.record_infra(error, _ms(started))
                raise ToolInfraError(f"tool `{declared.name}` did not open: {error}") from error
            kind = "timeout"
            result = ToolResult(text=f"Error: {declared.name} did not finish within {declared.limits.timeout_s:g} s")
        except ToolInfraError as error:
            declared.stats.record_infra(error, _ms(started))
            raise
        except Exception as error:  # noqa: BLE001  # a tool is foreign code; classified here, once
            declared.stats.record_infra(error, _ms(started))
            raise ToolInfraError(f"tool `{declared.name}` raised {type(error).__name__}: {error}") from error
        declared.stats.record("ok" if not kind else "model_errors" if kind == "tool" else "timeouts", _ms(started))
        return Observation(
            name=declared.name,
            text=self._shortened(result.text, declared.limits),
            ok=not kind,
            error_kind=kind,
            arguments=call.arguments,
            raw=call.raw,
            ms=_ms(started),
            reward=result.reward,
        )

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
        self._stack.push_async_callback(_close, instance, declared.name)
        try:
            async with deadline(OPEN_TIMEOUT_S, f"tool:{declared.name} open"):
                await instance.open()
        except ToolError as error:  # nothing the model did opened it
            raise ToolInfraError(f"tool `{declared.name}` did not open: {error}") from error
        return instance

    def _shortened(self, text: str, limits: ToolLimits) -> str:
        limit = limits.output_tokens if self._max_output_tokens is None else min(limits.output_tokens, self._max_output_tokens)
        return text if self._tokenizer is None else cut_to_tokens(self._tokenizer, text, limit, limits.truncate)


async def _own_deadlines_apart(instance: ToolInstance, arguments: dict[str, Any], name: str) -> Any:
    """The call's value; a deadline of the tool's own is its failure, not our limit."""
    try:
        return await instance.call(arguments)
    except DeadlineExceeded as error:
        raise ToolInfraError(f"tool `{name}`: {error}") from error


async def _close(instance: ToolInstance, name: str) -> None:
    try:
        async with deadline(CLOSE_TIMEOUT_S, f"tool:{name} close"):
            await instance.close()
    except Exception as error:  # noqa: BLE001  # the rollout's outcome stands; a leak is worth a warning
        logger.warning("tool_close_failed tool=%s: %s: %s. Its resources may leak", name, type(error).__name__, error)


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
