"""Tools from YAML; each call under its own deadline; the model's errors apart from infrastructure errors.

The model's mistakes (text that is no call, an unknown name, bad arguments, ``ToolError``, a call that runs too long) become
observations that it reads and may learn from. Everything else that goes wrong in a tool is infrastructure: the rollout ends
as failed and is never given a reward. When most calls of a tool fail that way, its circuit opens: `Toolbox.blocked` names
the tool, the worker starts no new rollouts, and one probe is let through per `COOLDOWN_S` until a call succeeds.
"""

import asyncio
import contextlib
import difflib
import inspect
import json
import logging
import re
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast

import yaml

from agentrl.errors import ConfigError, DeadlineExceeded, RolloutError, ToolError, ToolInfraError
from agentrl.plugins import Truncate, load_object, shipped_dir, tool_options
from agentrl.protocols import ToolContext, ToolResult
from agentrl.rollout.circuit import CircuitBreaker
from agentrl.rollout.tool import ArgumentError, Arguments, Signature, ToolSchema, schema_of
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


class _Instance(Protocol):
    """A tool within one trajectory."""

    async def open(self) -> None: ...

    async def call(self, arguments: dict[str, Any]) -> Any: ...

    async def close(self) -> None: ...


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
        make: Callable[[ToolContext], _Instance],
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
                        await _maybe(declared.shutdown())
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
        self._instances: dict[str, _Instance] = {}
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
                async with deadline(declared.limits.timeout_s, f"tool:{declared.name}"):
                    try:
                        value = await instance.call(arguments)
                    except DeadlineExceeded as error:  # the tool's own, not ours
                        raise ToolInfraError(f"tool `{declared.name}`: {error}") from error
            except DeadlineExceeded as error:
                own = error
                raise
            result = _as_result(value)
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

    async def _opened(self, declared: DeclaredTool) -> _Instance:
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


async def _close(instance: _Instance, name: str) -> None:
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


def _as_result(value: Any) -> ToolResult:
    if isinstance(value, ToolResult):
        return value
    if value is None:
        return ToolResult(text="")
    if isinstance(value, str):
        return ToolResult(text=value)
    try:
        return ToolResult(text=json.dumps(value, ensure_ascii=False, default=str))
    except ValueError:
        return ToolResult(text=str(value))


# The three kinds of tools


class _FunctionInstance:
    """An ``@tool`` function; it holds nothing but the trajectory's context."""

    def __init__(self, function: Callable[..., Any], signature: Signature, context: ToolContext) -> None:
        self._function = function
        self._extra = {signature.context_parameter: context} if signature.context_parameter else {}

    async def open(self) -> None:
        return

    async def call(self, arguments: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(**arguments, **self._extra)
        return await asyncio.to_thread(self._function, **arguments, **self._extra)

    async def close(self) -> None:
        return


class _ClassInstance:
    """A ``Tool``: one object per trajectory."""

    def __init__(self, made: Any, signature: Signature, context: ToolContext) -> None:
        self._tool = made
        self._context = context
        self._extra = {signature.context_parameter: context} if signature.context_parameter else {}

    async def open(self) -> None:
        if hasattr(self._tool, "open"):
            await self._tool.open(self._context)

    async def call(self, arguments: dict[str, Any]) -> Any:
        return await self._tool.call(**arguments, **self._extra)

    async def close(self) -> None:
        if hasattr(self._tool, "close"):
            await self._tool.close()


class _VerlInstance:
    """A tool in verl's shape: one object per process, one ``create`` … ``release`` per trajectory."""

    def __init__(self, made: Any, context: ToolContext) -> None:
        self._tool = made
        self._context = context
        self._id = uuid.uuid4().hex

    async def open(self) -> None:
        created = await _maybe(self._tool.create(self._id, **self._kwargs("create_kwargs")))
        if isinstance(created, tuple) and created and isinstance(created[0], str):
            self._id = created[0]
        elif isinstance(created, str):
            self._id = created

    async def call(self, arguments: dict[str, Any]) -> Any:
        answer = await _maybe(self._tool.execute(self._id, arguments, **self._kwargs("execute_kwargs")))
        parts = answer if isinstance(answer, tuple) else (answer,)
        response, reward = parts[0], parts[1] if len(parts) > 1 else None
        metrics = parts[2] if len(parts) > 2 and isinstance(parts[2], Mapping) else {}
        text = response if isinstance(response, str) else getattr(response, "text", None)
        if text is None:
            text = "" if hasattr(response, "text") else _as_result(response).text
        numbers = {str(k): float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        return ToolResult(text=text, reward=None if reward is None else float(reward), metrics=numbers)

    async def close(self) -> None:
        await _maybe(self._tool.release(self._id, **self._kwargs("release_kwargs")))

    def _kwargs(self, key: str) -> dict[str, Any]:
        return dict(self._context.kwargs.get(key) or {})


async def _maybe(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class _VerlSchema(dict[str, Any]):
    """A tool schema for verl-shaped tools, which read it by attribute (``schema.function.name``) and by ``model_dump``."""

    def __getattr__(self, key: str) -> Any:
        try:
            value = self[key]
        except KeyError:
            raise AttributeError(key) from None
        return _VerlSchema(value) if isinstance(value, dict) else value

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return dict(self)


# From YAML

_LIMIT_KEYS = ("timeout_s", "concurrency", "output_tokens", "truncate", "max_infra_error_rate")
_ENTRY_KEYS = ("use", "class_name", "mcp", "http", "config", "tool_schema", "name", "oracle", *_LIMIT_KEYS)


def load_tools(
    spec: Path | str | Sequence[Mapping[str, Any] | str] | Mapping[str, Any],
    *,
    base_dir: Path | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    output_tokens: int | None = None,
) -> Toolbox:
    """Make the toolbox that a tool list describes.

    Args:
        spec: a YAML file (``tools:`` and optionally ``defaults:``), or the list itself. Each entry has ``use`` or verl's
            ``class_name``, and may have ``config``, ``tool_schema``, ``name``, ``oracle``, ``timeout_s``, ``concurrency``,
            ``output_tokens``, ``truncate`` and ``max_infra_error_rate``.
        base_dir: the user's project; the working directory by default.
        overrides: tool name or reference -> config keys that replace the entry's. Those that match no entry are ignored.
        tokenizer: counts the tokens of results; None keeps results whole.
        output_tokens: tokens of one result where neither the tool nor its entry nor ``defaults`` say.

    Raises:
        ConfigError: a key, type, reference or schema is wrong; names the file and the entry.
    """
    project = base_dir or Path.cwd()
    where = "tools"
    if isinstance(spec, str | Path):
        path = _find_spec(Path(spec), project)
        where = str(spec)
        try:
            spec = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{where}: cannot be read as YAML: {error}") from error
    defaults: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        _check_keys(spec, ("tools", "defaults"), where)
        defaults = _mapping(spec.get("defaults") or {}, f"{where}: defaults")
        _check_keys(defaults, _LIMIT_KEYS, f"{where}: defaults")
        _check_limits(defaults, f"{where}: defaults")
        spec = cast("Sequence[Mapping[str, Any] | str]", spec.get("tools") or [])
    if not isinstance(spec, Sequence) or isinstance(spec, str):
        raise ConfigError(f"{where}: `tools` must be a list")
    if output_tokens is not None:
        defaults = {"output_tokens": output_tokens, **defaults}
    declared: list[DeclaredTool] = []
    for index, item in enumerate(spec):
        at = f"{where}: tools[{index}]"
        entry = {"use": item} if isinstance(item, str) else _mapping(item, at)
        declared.append(_declare(entry, defaults, at, project, overrides or {}))
    return Toolbox(declared, tokenizer=tokenizer)


def _find_spec(path: Path, project: Path) -> Path:
    candidates = [path if path.is_absolute() else project / path]
    if not path.is_absolute() and path.parts[:1] == ("configs",):
        with contextlib.suppress(ConfigError):
            candidates.append(shipped_dir("configs") / Path(*path.parts[1:]))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(f"no tool list `{path}`. Looked in: {', '.join(str(c) for c in candidates)}")


def _declare(
    entry: dict[str, Any], defaults: Mapping[str, Any], at: str, project: Path, overrides: Mapping[str, Mapping[str, Any]]
) -> DeclaredTool:
    _check_keys(entry, _ENTRY_KEYS, at)
    for later in ("mcp", "http"):
        if later in entry:
            raise ConfigError(f"{at}: `{later}` tools are not supported yet; wrap the service in an @tool function and `use:` it")
    if ("use" in entry) == ("class_name" in entry):
        raise ConfigError(f"{at}: give `use: module:name` or `class_name: module.Class`, one of them")
    reference = str(entry.get("use") or entry.get("class_name"))
    try:
        target = load_object(reference, root=project)
    except ConfigError as error:
        raise ConfigError(f"{at}: {error}") from error
    _check_limits(entry, at)
    options = tool_options(target)
    given = {k: entry[k] for k in _LIMIT_KEYS if k in entry}
    marked = {k: getattr(options, k) for k in _LIMIT_KEYS if getattr(options, k, None) is not None}
    limits = ToolLimits(**{**defaults, **marked, **given})
    name = str(entry.get("name") or options.name or _default_name(target, entry))
    if not re.fullmatch(r"[A-Za-z_][\w.-]{0,63}", name):
        raise ConfigError(f"{at}: `{name}` is no tool name; use letters, digits, `_`, `-` and `.`, at most 64")
    config = _mapping(entry.get("config") or {}, f"{at}: config")
    for key in (reference, name):
        config = {**config, **overrides.get(key, {})}
    oracle = bool(entry.get("oracle", options.oracle))
    if inspect.isclass(target) and all(callable(getattr(target, m, None)) for m in ("create", "execute", "release")):
        return _declare_verl(target, entry, config, name, limits, reference, oracle, at)
    if inspect.isclass(target) and callable(getattr(target, "call", None)):
        return _declare_class(target, entry, config, name, limits, reference, oracle, at)
    if inspect.isroutine(target):
        return _declare_function(target, entry, config, name, limits, reference, oracle, at)
    raise ConfigError(
        f"{at}: `{reference}` is neither a function nor a class with `call` (or verl's `create`, `execute`, `release`)"
    )


def _default_name(target: Any, entry: Mapping[str, Any]) -> str:
    in_schema = ((entry.get("tool_schema") or {}).get("function") or {}).get("name")
    if in_schema:
        return str(in_schema)
    if inspect.isclass(target):
        own = target.__dict__.get("name")
        if isinstance(own, str):
            return own
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", target.__name__).lower()
    return str(getattr(target, "__name__", "tool"))


def _declare_function(
    target: Any,
    entry: Mapping[str, Any],
    config: dict[str, Any],
    name: str,
    limits: ToolLimits,
    reference: str,
    oracle: bool,
    at: str,
) -> DeclaredTool:
    if config:
        raise ConfigError(f"{at}: `{reference}` is a function and takes no `config`; write a Tool class for settings")
    signature = _signature(target, entry, name, "", at, is_method=False)
    return DeclaredTool(
        schema=signature.schema,
        arguments=signature.arguments,
        limits=limits,
        reference=reference,
        make=lambda context: _FunctionInstance(target, signature, context),
        oracle=oracle,
        is_stateful=False,
    )


def _declare_class(
    target: Any,
    entry: Mapping[str, Any],
    config: dict[str, Any],
    name: str,
    limits: ToolLimits,
    reference: str,
    oracle: bool,
    at: str,
) -> DeclaredTool:
    if config.pop("type", "native") != "native":
        raise ConfigError(f"{at}: only `type: native` tools are supported yet")
    model = getattr(target, "Config", None)
    arguments = {"config": _parsed(model, config, at)} if inspect.isclass(model) and hasattr(model, "model_validate") else config

    def construct() -> Any:
        return target(**arguments)

    try:
        construct()  # a setting that does not fit is found at start-up, not in the first rollout
    except TypeError as error:
        known = [p for p in inspect.signature(target).parameters if p not in ("args", "kwargs")]
        near = {k: difflib.get_close_matches(k, known, n=1) for k in config if k not in known}
        hints = "".join(f" Did you mean `{n[0]}` for `{k}`?" for k, n in near.items() if n)
        raise ConfigError(
            f"{at}: config does not fit {reference}: {error}. It takes: {', '.join(known) or 'nothing'}.{hints}"
        ) from error
    summary = " ".join((inspect.getdoc(target) or "").split("\n\n")[0].split())
    signature = _signature(target.call, entry, name, summary, at, is_method=True)
    return DeclaredTool(
        schema=signature.schema,
        arguments=signature.arguments,
        limits=limits,
        reference=reference,
        make=lambda context: _ClassInstance(construct(), signature, context),
        oracle=oracle,
        is_stateful=True,
        shutdown=getattr(target, "aclose", None) if inspect.ismethod(getattr(target, "aclose", None)) else None,
    )


def _declare_verl(
    target: Any,
    entry: Mapping[str, Any],
    config: dict[str, Any],
    name: str,
    limits: ToolLimits,
    reference: str,
    oracle: bool,
    at: str,
) -> DeclaredTool:
    if config.get("type", "native") != "native":
        raise ConfigError(f"{at}: only `type: native` tools are supported yet")
    given = entry.get("tool_schema")
    try:
        made = target(config=config, tool_schema=_VerlSchema(given) if given else None)
    except Exception as error:
        raise ConfigError(f"{at}: {reference} could not be made: {type(error).__name__}: {error}") from error
    if not given and hasattr(made, "get_openai_tool_schema"):
        own = made.get_openai_tool_schema()
        given = own.model_dump(exclude_none=True) if hasattr(own, "model_dump") else own
    if not given:
        raise ConfigError(f"{at}: {reference} brings no schema; give `tool_schema:`")
    schema = _given_schema(given, str(entry.get("name") or ""), at)
    return DeclaredTool(
        schema=schema,
        arguments=_arguments(schema, at, allow_extra=True),
        limits=limits,
        reference=reference,
        make=lambda context: _VerlInstance(made, context),
        oracle=oracle,
        is_stateful=True,
        shutdown=getattr(made, "aclose", None),
    )


def _signature(function: Any, entry: Mapping[str, Any], name: str, summary: str, at: str, *, is_method: bool) -> Signature:
    """From the signature; a ``tool_schema`` in the entry replaces what the model sees, if it fits."""
    try:
        signature = schema_of(function, name=name, description=summary, is_method=is_method)
    except ConfigError as error:
        raise ConfigError(f"{at}: {error}") from error
    if not entry.get("tool_schema"):
        return signature
    schema = _given_schema(entry["tool_schema"], str(entry.get("name") or ""), at)
    own = set(signature.schema.parameters["properties"])
    foreign = sorted(set(schema.parameters.get("properties", {})) - own)
    missing = sorted(set(signature.schema.parameters.get("required", [])) - set(schema.parameters.get("properties", {})))
    if foreign or missing:
        raise ConfigError(
            f"{at}: tool_schema of `{name}` does not fit the function: "
            f"{'unknown to it: ' + ', '.join(foreign) if foreign else ''}{'; ' if foreign and missing else ''}"
            f"{'required by it: ' + ', '.join(missing) if missing else ''}. Remove `tool_schema:` to use the signature, or rename"
        )
    return Signature(schema, _arguments(schema, at, allow_extra=False), signature.context_parameter)


def _given_schema(given: Any, name: str, at: str) -> ToolSchema:
    function = _mapping(_mapping(given, f"{at}: tool_schema").get("function"), f"{at}: tool_schema.function")
    if not isinstance(function.get("name"), str):
        raise ConfigError(f"{at}: tool_schema.function.name is missing")
    parameters = _mapping(function.get("parameters") or {"type": "object", "properties": {}}, f"{at}: tool_schema parameters")
    return ToolSchema(name=name or function["name"], description=str(function.get("description") or ""), parameters=parameters)


def _arguments(schema: ToolSchema, at: str, *, allow_extra: bool) -> Arguments:
    try:
        return Arguments(schema.parameters, allow_extra=allow_extra)
    except ConfigError as error:
        raise ConfigError(f"{at}: the parameters of `{schema.name}` are {error}") from error


def _parsed(model: Any, config: Mapping[str, Any], at: str) -> Any:
    _check_keys(config, tuple(model.model_fields), f"{at}: config")
    try:
        return model.model_validate(config)
    except ValueError as error:
        raise ConfigError(f"{at}: config: {error}") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping, not {type(value).__name__}")
    return {str(k): v for k, v in value.items()}


def _check_keys(value: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in value:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
            hint = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(allowed)}"
            raise ConfigError(f"{where}: unknown key `{key}`. {hint}")


def _check_limits(value: Mapping[str, Any], where: str) -> None:
    for key, kinds, low in (
        ("timeout_s", int | float, 0),
        ("concurrency", int, 1),
        ("output_tokens", int, 1),
        ("max_infra_error_rate", int | float, 0),
    ):
        if key in value and (not isinstance(value[key], kinds) or isinstance(value[key], bool) or value[key] < low):
            raise ConfigError(f"{where}: `{key}` must be a number of at least {low}, not {value[key]!r}")
    if value.get("truncate", "middle") not in ("middle", "left", "right"):
        raise ConfigError(f"{where}: `truncate` must be middle, left or right, not {value['truncate']!r}")
