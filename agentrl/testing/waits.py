"""Wait for what a test needs to be true, for minutes where it must be: a busy machine makes it late, not wrong.

By the machine's clock, not the event loop's, which `agentrl.testing.clock.pass_time` moves.
"""

import asyncio
import time
from collections.abc import Callable

_LIMIT_S = 250.0


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until the condition holds.

    Raises:
        AssertionError: it did not within minutes.
    """
    ends = time.monotonic() + _LIMIT_S
    while not condition():
        _fail_after(ends, condition)
        await asyncio.sleep(0.002)


def wait_until(condition: Callable[[], object]) -> None:
    """The same where no event loop runs: sleep until the condition holds."""
    ends = time.monotonic() + _LIMIT_S
    while not condition():
        _fail_after(ends, condition)
        time.sleep(0.02)


def _fail_after(ends: float, condition: Callable[[], object]) -> None:
    if time.monotonic() < ends:
        return
    code = getattr(condition, "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code is not None else repr(condition)
    raise AssertionError(f"the condition at {where} did not come true within {_LIMIT_S:g} s")
