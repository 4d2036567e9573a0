"""How long an object of a tool class lives: for one call, for a trajectory, or for the whole process.

For a trajectory is the rule, and `ToolSession` keeps it. Here are the other two, as instances that a session uses like any.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Literal

from agentrl.errors import ToolError, ToolInfraError
from agentrl.protocols import ToolContext
from agentrl.rollout.tool_instances import ToolInstance, close_quietly

ToolScope = Literal["call", "trajectory", "worker"]


class PerCall:
    """A new object for every call; opening and closing it are part of the call and of its deadline.

    Args:
        name: of the tool.
        make: the object of one call.
    """

    def __init__(self, name: str, make: Callable[[], ToolInstance]) -> None:
        self._name, self._make = name, make

    async def open(self) -> None:
        return

    async def call(self, arguments: dict[str, Any]) -> Any:
        instance = self._make()
        try:
            try:
                await instance.open()
            except ToolError as error:  # nothing the model did opened it
                raise ToolInfraError(f"tool `{self._name}` did not open: {error}") from error
            return await instance.call(arguments)
        finally:
            await close_quietly(instance.close(), self._name)

    async def close(self) -> None:
        return


class PerWorker:
    """One object for all rollouts of a process: opened before the first call, closed with the toolbox.

    It is opened with a context that names no trajectory; each call gets its own rollout's. Calls of different rollouts run at once.

    Args:
        name: of the tool.
        construct: the object.
        instance_of: the object in the hands of one trajectory.
    """

    def __init__(self, name: str, construct: Callable[[], Any], instance_of: Callable[[Any, ToolContext], ToolInstance]) -> None:
        self._name, self._construct, self._instance_of = name, construct, instance_of
        self._opening = asyncio.Lock()
        self._open: Any = None

    def of(self, context: ToolContext) -> "ToolInstance":
        """For one trajectory."""
        return _Borrowed(self, context)

    async def instance(self, context: ToolContext) -> ToolInstance:
        """The open object, with this context."""
        async with self._opening:
            if self._open is None:
                made = self._construct()
                owned = self._instance_of(made, _nobodys())
                try:
                    await owned.open()
                except BaseException:
                    await close_quietly(owned.close(), self._name)
                    raise
                self._open = made
        return self._instance_of(self._open, context)

    async def aclose(self) -> None:
        """Close the object, if a call opened it."""
        made, self._open = self._open, None
        if made is not None:
            await close_quietly(self._instance_of(made, _nobodys()).close(), self._name)


class _Borrowed:
    """The process's object in the hands of one trajectory, which neither opens nor closes it."""

    def __init__(self, owner: PerWorker, context: ToolContext) -> None:
        self._owner, self._context = owner, context
        self._instance: ToolInstance | None = None

    async def open(self) -> None:
        self._instance = await self._owner.instance(self._context)

    async def call(self, arguments: dict[str, Any]) -> Any:
        assert self._instance is not None, "a session opens before it calls"
        return await self._instance.call(arguments)

    async def close(self) -> None:
        return


def _nobodys() -> ToolContext:
    return ToolContext(trajectory_id="", task_id="", sample_index=-1)
