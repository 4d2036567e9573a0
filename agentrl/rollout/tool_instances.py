"""A tool in the hands of one trajectory: a function, a ``Tool`` class, or an object in verl's shape, behind one protocol."""

import asyncio
import inspect
import json
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from agentrl.protocols import ToolContext, ToolResult
from agentrl.rollout.tool import Signature


class ToolInstance(Protocol):
    """A tool within one trajectory."""

    async def open(self) -> None: ...

    async def call(self, arguments: dict[str, Any]) -> Any: ...

    async def close(self) -> None: ...


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
        created = await awaited(self._tool.create(self._id, **self._kwargs("create_kwargs")))
        if isinstance(created, tuple) and created and isinstance(created[0], str):
            self._id = created[0]
        elif isinstance(created, str):
            self._id = created

    async def call(self, arguments: dict[str, Any]) -> Any:
        answer = await awaited(self._tool.execute(self._id, arguments, **self._kwargs("execute_kwargs")))
        parts = answer if isinstance(answer, tuple) else (answer,)
        response, reward = parts[0], parts[1] if len(parts) > 1 else None
        metrics = parts[2] if len(parts) > 2 and isinstance(parts[2], Mapping) else {}
        text = response if isinstance(response, str) else getattr(response, "text", None)
        if text is None:
            text = "" if hasattr(response, "text") else as_result(response).text
        numbers = {str(k): float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        return ToolResult(text=text, reward=None if reward is None else float(reward), metrics=numbers)

    async def close(self) -> None:
        await awaited(self._tool.release(self._id, **self._kwargs("release_kwargs")))

    def _kwargs(self, key: str) -> dict[str, Any]:
        return dict(self._context.kwargs.get(key) or {})


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
