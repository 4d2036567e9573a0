"""A deadline that holds even for code that ignores being cancelled.

``asyncio.timeout`` cancels and then waits for the cancelled code to end. Foreign code that catches ``CancelledError`` and goes
on would so hold its caller, its rollout and its group for ever. Here the code runs in a task of its own, which is given
`GRACE_S` to end after it was cancelled and is then left behind, counted and named in the log.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from agentrl.errors import DeadlineExceeded

logger = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_S = 0.5
"""For ``finally`` blocks after a cancellation."""

_left_behind: set[asyncio.Task[Any]] = set()
"""Kept, or the event loop would forget them while they run."""


def num_left_behind() -> int:
    """Calls that still run although nobody waits for them."""
    return len(_left_behind)


async def bounded_call(work: Coroutine[Any, Any, T], seconds: float, stage: str) -> T:
    """The result of ``work``, which is cancelled after ``seconds`` or when the caller is.

    Raises:
        DeadlineExceeded: ``work`` took longer than ``seconds``; it names ``stage``.
        RuntimeError: ``work`` ended with a ``CancelledError`` that nobody sent.
    """
    task = asyncio.create_task(work, name=stage)
    try:
        done, _ = await asyncio.wait((task,), timeout=seconds)
    except asyncio.CancelledError:
        await _end(task, stage)
        raise
    if not done:
        await _end(task, stage)
        raise DeadlineExceeded(stage, seconds)
    if task.cancelled():  # by itself: passed on, it would look like a cancellation of the caller
        raise RuntimeError(f"{stage} cancelled itself")
    return task.result()


async def _end(task: asyncio.Task[Any], stage: str) -> None:
    """Cancel ``task`` and wait a little for its end, whatever it is."""
    task.cancel()
    try:
        await asyncio.wait((task,), timeout=GRACE_S)
    finally:
        if not task.done():
            _left_behind.add(task)
            logger.error(
                "call_ignores_cancellation stage=%s running=%d: it was cancelled and goes on; it is left behind. Let "
                "CancelledError pass through",
                stage,
                len(_left_behind),
            )
        task.add_done_callback(_forget)


def _forget(task: asyncio.Task[Any]) -> None:
    _left_behind.discard(task)
    if not task.cancelled():
        task.exception()  # retrieved: nobody is left to tell
