"""A tool in the hands of one trajectory: a function, a ``Tool`` class, or an object in verl's shape, behind one protocol."""

import asyncio
import inspect
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import SimpleNamespace
from typing import Any, Protocol, SupportsFloat

from agentrl.protocols import ToolContext, ToolResult
from agentrl.rollout.tool import Signature

logger = logging.getLogger(__name__)


class ToolInstance(Protocol):
    """A tool within one trajectory."""

    def open(self) -> Coroutine[Any, Any, None]: ...

    def call(self, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]: ...

    def close(self) -> Coroutine[Any, Any, None]: ...


class FunctionInstance:
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


class ClassInstance:
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


class VerlInstance:
    """A tool in verl's shape: one object per process, one ``create`` … ``release`` per trajectory."""

    def __init__(self, made: Any, context: ToolContext) -> None:
        self._tool = made
        self._context = context
        self._id = uuid.uuid4().hex

    async def open(self) -> None:
        given = self._kwargs("create_kwargs")
        if _takes(self._tool.create, "create_kwargs"):  # later versions of verl pass them as one argument, earlier ones spread
            given = {"create_kwargs": dict(given), **given}
        created = await awaited(self._tool.create(self._id, **given))
        if isinstance(created, tuple) and created and isinstance(created[0], str):
            self._id = created[0]
        elif isinstance(created, str):
            self._id = created

    async def call(self, arguments: dict[str, Any]) -> Any:
        given = self._kwargs("execute_kwargs")
        if _takes(self._tool.execute, "agent_data"):
            given = {"agent_data": self._agent_data(), **given}
        answer = await awaited(self._tool.execute(self._id, arguments, **given))
        return _verl_result(answer if isinstance(answer, tuple) else (answer,))

    async def close(self) -> None:
        await awaited(self._tool.release(self._id, **self._kwargs("release_kwargs")))

    def _kwargs(self, key: str) -> dict[str, Any]:
        return dict(self._context.kwargs.get(key) or {})

    def _agent_data(self) -> SimpleNamespace:
        """What verl's tools may read of the rollout; ``extra_fields`` lives as long as the trajectory."""
        context = self._context
        return SimpleNamespace(
            request_id=context.trajectory_id, tools_kwargs=context.kwargs, extra_fields=context.state, turn=context.turn
        )


def _takes(function: Any, name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


async def close_quietly(closing: Awaitable[None], name: str) -> None:
    """Await the end of a tool's object. What was done with it stands, whatever goes wrong; a leak is worth a warning."""
    try:
        await closing
    except Exception as error:  # noqa: BLE001  # foreign code
        logger.warning("tool_close_failed tool=%s: %s: %s. Its resources may leak", name, type(error).__name__, error)


async def awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class VerlSchema(dict[str, Any]):
    """A tool schema for verl-shaped tools, which read it by attribute (``schema.function.name``) and by ``model_dump``."""

    def __getattr__(self, key: str) -> Any:
        try:
            value = self[key]
        except KeyError:
            raise AttributeError(key) from None
        return VerlSchema(value) if isinstance(value, dict) else value

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return dict(self)


def as_result(value: Any) -> ToolResult:
    """What a tool returned, as a result: text, JSON for other data, and verl's ``ToolResponse`` and tuples of response,
    reward and metrics."""
    if isinstance(value, ToolResult):
        return value
    if _is_verl_tuple(value):
        return _verl_result(value)
    if value is None:
        return ToolResult(text="")
    if isinstance(value, str):
        return ToolResult(text=value)
    if _is_response(value):
        return ToolResult(text=value.text or "")
    try:
        return ToolResult(text=json.dumps(value, ensure_ascii=False, default=str))
    except ValueError:
        return ToolResult(text=str(value))


def _verl_result(value: tuple[Any, ...]) -> ToolResult:
    """``(response, reward, metrics)``, the last two perhaps missing; numbers may be numpy's or a tensor's."""
    response, reward, metrics = (*value, None, None)[:3]
    numbers = {str(k): float(v) for k, v in (metrics or {}).items() if isinstance(v, SupportsFloat)}
    return ToolResult(text=as_result(response).text, reward=None if reward is None else float(reward), metrics=numbers)


def _is_response(value: Any) -> bool:
    """verl's ``ToolResponse``, whoever defines it."""
    return hasattr(value, "text") and (hasattr(value, "image") or type(value).__name__ == "ToolResponse")


def _is_verl_tuple(value: Any) -> bool:
    """``(response,)``, ``(response, reward)`` or ``(response, reward, metrics)``; other tuples are data."""
    if not isinstance(value, tuple) or not 1 <= len(value) <= 3:  # pyright: ignore[reportUnknownArgumentType]
        return False
    response, reward, metrics = (*value, None, None)[:3]
    is_reward = reward is None or (isinstance(reward, int | float) and not isinstance(reward, bool))
    is_metrics = metrics is None or isinstance(metrics, Mapping)
    return (
        (isinstance(response, str | dict | ToolResult) or response is None or _is_response(response)) and is_reward and is_metrics
    )
