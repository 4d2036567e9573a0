"""A deadline that holds whatever the bounded code does."""

import asyncio
import contextlib

import pytest

from agentrl.errors import DeadlineExceeded
from agentrl.rollout import bounded_call as module
from agentrl.rollout.bounded_call import bounded_call, num_left_behind

pytestmark = pytest.mark.asyncio


async def answer() -> int:
    await asyncio.sleep(0)
    return 7


async def until_released(released: asyncio.Event, *, fails: bool = False) -> None:
    while not released.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await released.wait()
    if fails:
        raise ValueError("long forgotten")


async def test_results_and_errors_pass_through() -> None:
    async def fail() -> None:
        raise KeyError("x")

    assert await bounded_call(answer(), 10, "s") == 7
    with pytest.raises(KeyError):
        await bounded_call(fail(), 10, "s")


async def test_what_ends_when_cancelled_has_ended_when_the_deadline_is_reported() -> None:
    ended: list[str] = []

    async def polite() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("closed")

    with pytest.raises(DeadlineExceeded, match="s did not finish within 0.05 s"):
        await bounded_call(polite(), 0.05, "s")
    assert (ended, num_left_behind()) == (["closed"], 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_what_ignores_cancellation_is_left_behind_and_forgotten_at_its_end(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.02)
    released = asyncio.Event()
    with pytest.raises(DeadlineExceeded):
        await bounded_call(until_released(released, fails=fails), 0.02, "s")
    assert num_left_behind() == 1
    released.set()
    async with asyncio.timeout(10):
        while num_left_behind():
            await asyncio.sleep(0.005)


async def test_cancelling_the_caller_is_not_held_up_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.02)
    released = asyncio.Event()
    caller = asyncio.create_task(bounded_call(until_released(released), 1000, "s"))
    await asyncio.sleep(0.01)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(caller, 20)
    assert num_left_behind() == 1
    released.set()
    async with asyncio.timeout(10):
        while num_left_behind():
            await asyncio.sleep(0.005)


async def test_code_that_cancels_itself_does_not_look_like_a_cancelled_caller() -> None:
    async def odd() -> None:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="s cancelled itself"):
        await bounded_call(odd(), 10, "s")
