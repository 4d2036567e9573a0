"""The only async helpers: ``running()`` for endless loops, ``deadline()`` for bounded ones, ``bounded()`` where even the
cancellation may be ignored, ``heeding_cancellation()`` where it may be lost, ``waiting()`` to say what for."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from agentrl.errors import AgentRLError, DeadlineExceeded

T = TypeVar("T")

logger = logging.getLogger(__name__)

GRACE_S = 1.0
"""For cancelled foreign work to clean up, before it is left behind."""
_LEFT_BEHIND: set["asyncio.Task[Any]"] = set()


class LoopExited(AgentRLError):
    """A loop that should run until it is cancelled returned."""


@asynccontextmanager
async def running(**loops: Coroutine[None, None, None]) -> AsyncGenerator[None, None]:
    """Run endless loops beside the block. The block's end stops them; any loop's end stops the block.

    Raises:
        LoopExited: a loop returned instead of running until cancelled.
        BaseExceptionGroup: several of the loops and the block failed; a single failure is raised as itself.
    """

    async def endless(name: str, loop: Coroutine[None, None, None]) -> None:
        await loop
        raise LoopExited(f"{name} returned; it should run until cancelled")

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(endless(name, loop), name=name) for name, loop in loops.items()]
            yield
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as error:
        alone: BaseException = error
        while isinstance(alone, BaseExceptionGroup) and len(alone.exceptions) == 1:
            alone = alone.exceptions[0]
        if isinstance(alone, BaseExceptionGroup):
            raise
        raise alone from alone.__cause__  # so that `except ConfigError` around the block means what it says
    finally:
        for loop in loops.values():
            loop.close()  # one that was cancelled before its first step was never awaited


class _Deadline:
    """See `deadline`. A class, because it is entered several times a turn and a generator costs thrice as much."""

    __slots__ = ("_scope", "_seconds", "_stage")

    def __init__(self, seconds: float, stage: str) -> None:
        self._seconds, self._stage = seconds, stage
        self._scope = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._scope.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._scope.__aexit__(kind, error, traceback)
        except TimeoutError as late:
            error = late
        if isinstance(error, TimeoutError) and self._scope.expired():
            raise DeadlineExceeded(self._stage, self._seconds) from error


def deadline(seconds: float, stage: str) -> AbstractAsyncContextManager[None, None]:
    """Bound the block from outside. A ``TimeoutError`` that the block itself raises passes through unchanged.

    Raises:
        DeadlineExceeded: the block took longer than ``seconds``.
    """
    return _Deadline(seconds, stage)


def num_left_behind() -> int:
    """Calls that still run although nobody waits for them: they ignored their cancellation."""
    return sum(not task.done() for task in _LEFT_BEHIND)


async def bounded(work: Coroutine[Any, Any, T], seconds: float, stage: str) -> T:
    """Await foreign code for ``seconds``, and no longer when it ignores its cancellation: then it is left behind, with a warning.

    A task of its own, outside every group: a group would wait for it, which is what must not happen.

    Raises:
        DeadlineExceeded: it took longer.
        AgentRLError: it cancelled itself, which must not look like our own cancellation.
    """
    task = asyncio.get_running_loop().create_task(work, name=stage)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise DeadlineExceeded(stage, seconds)
    finally:
        if not task.done():
            task.cancel()
            _LEFT_BEHIND.add(task)
            task.add_done_callback(_forget)
            await asyncio.wait({task}, timeout=GRACE_S)
            if not task.done():
                logger.warning(
                    "cancellation_ignored stage=%s: it goes on in the background; let it end when it is cancelled", stage
                )
    if task.cancelled():
        raise AgentRLError(f"{stage} cancelled itself")
    return task.result()


@contextmanager
def heeding_cancellation() -> Generator[None, None, None]:
    """Raise a cancellation that arrived during the block and was lost in it: whoever cancelled would otherwise wait for ever.

    Before Python 3.12 ``asyncio.wait_for`` loses one that comes in the same moment as the answer, and redis-py writes every command
    through it. Put no ``TaskGroup`` into the block: before 3.12 one whose task failed leaves its parent marked as cancelled.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


def _forget(task: "asyncio.Task[Any]") -> None:
    _LEFT_BEHIND.discard(task)
    if not task.cancelled() and task.exception() is not None:
        logger.debug("left_behind_failed stage=%s: %s", task.get_name(), task.exception())


class _Wait:
    """See `waiting`. A class for the same reason as `_Deadline`."""

    __slots__ = ("reason", "since")

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.since = 0.0

    def __enter__(self) -> None:
        self.since = time.monotonic()
        _WAITS.add(self)

    def __exit__(self, *_: object) -> None:
        _WAITS.discard(self)


_WAITS: set[_Wait] = set()


def waiting(reason: str) -> AbstractContextManager[None, None]:
    """Say what the block waits for: ``capacity | server | tool:<name> | group | trainer | weights | stream | reward``."""
    return _Wait(reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitSummary:
    """Everything in this process that waits for one reason."""

    count: int
    oldest_s: float
    """Seconds since the longest of them began to wait."""


def current_waits() -> dict[str, WaitSummary]:
    """What this process waits for right now, longest first."""
    now = time.monotonic()
    ages: dict[str, list[float]] = {}
    for wait in list(_WAITS):
        ages.setdefault(wait.reason, []).append(now - wait.since)
    ordered = sorted(ages.items(), key=lambda item: -max(item[1]))
    return {reason: WaitSummary(count=len(a), oldest_s=max(a)) for reason, a in ordered}
