"""The clock that tests move."""

import asyncio
import time

import pytest

from agentrl.testing.clock import pass_time


@pytest.mark.asyncio
async def test_a_limit_of_an_hour_passes_at_once_and_what_is_due_later_does_not() -> None:
    began = time.monotonic()
    order: list[str] = []

    async def sleep(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        order.append(name)

    tasks = [asyncio.create_task(sleep(*how)) for how in (("later", 4000), ("second", 3000), ("first", 2000))]
    asyncio.get_running_loop().call_soon(pass_time, 3600)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.sleep(10_000), 3600)
    while len(order) < 2:
        await asyncio.sleep(0)
    assert (order, tasks[0].done()) == (["first", "second"], False)
    pass_time(400)
    await tasks[0]
    assert time.monotonic() - began < 2000
