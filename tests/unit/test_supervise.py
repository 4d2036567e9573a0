import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress

import pytest

from agentrl.errors import ConfigError, DeadlineExceeded
from agentrl.supervise import LoopExited, current_waits, deadline, heeding_cancellation, running, waiting


async def forever() -> None:
    await asyncio.Event().wait()


@pytest.mark.asyncio
async def test_the_end_of_the_block_stops_the_loops() -> None:
    stopped: list[str] = []

    async def loop() -> None:
        try:
            await forever()
        finally:
            stopped.append("loop")

    async with running(loop=loop()):
        await asyncio.sleep(0)
    assert stopped == ["loop"]


@pytest.mark.asyncio
async def test_a_loop_that_returns_stops_the_block_and_is_named() -> None:
    async def brief() -> None:
        await asyncio.sleep(0)

    with pytest.raises(LoopExited, match="brief returned"):
        async with running(brief=brief(), other=forever()):
            await forever()


@pytest.mark.asyncio
async def test_a_loops_error_and_the_blocks_error_come_out_as_themselves() -> None:
    async def breaks() -> None:
        raise ConfigError("no such key")

    with pytest.raises(ConfigError, match="no such key"):
        async with running(breaks=breaks()):
            await forever()
    with pytest.raises(KeyError, match="mine"):
        async with running(other=forever()):
            raise KeyError("mine")


@pytest.mark.asyncio
async def test_a_nested_loops_error_is_unwrapped_and_two_errors_stay_a_group() -> None:
    async def breaks(name: str) -> None:
        raise ConfigError(name)

    async def nested() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(breaks("inner"))

    with pytest.raises(ConfigError, match="inner"):
        async with running(nested=nested()):
            await forever()
    with pytest.raises(BaseExceptionGroup) as caught:
        async with running(a=breaks("a"), b=breaks("b")):
            await forever()
    assert sorted(str(e) for e in caught.value.exceptions) == ["a", "b"]


@pytest.mark.asyncio
async def test_a_passed_deadline_names_the_stage_and_the_seconds() -> None:
    with pytest.raises(DeadlineExceeded, match=r"tool did not finish within 0\.01 s") as caught:
        async with deadline(0.01, "tool"):
            await forever()
    assert (caught.value.stage, caught.value.seconds) == ("tool", 0.01)


@pytest.mark.asyncio
async def test_a_timeout_error_from_inside_is_not_taken_for_our_deadline() -> None:
    with pytest.raises(TimeoutError, match="somebody else's"):
        async with deadline(10, "tool"):
            raise TimeoutError("somebody else's")


@pytest.mark.asyncio
async def test_of_nested_deadlines_the_one_that_passed_is_named() -> None:
    with pytest.raises(DeadlineExceeded, match="rollout"):
        async with deadline(0.01, "rollout"), deadline(10, "turn"):
            await forever()


@pytest.mark.asyncio
async def test_a_cancellation_lost_in_a_block_is_raised_behind_it() -> None:
    async def loses_it() -> str:
        try:
            await forever()
        except asyncio.CancelledError:
            return "the answer had come"
        return ""

    async def fails_instead() -> str:
        await loses_it()
        raise ConfigError("the answer was an error")

    async def heeds(lossy: Callable[[], Coroutine[None, None, str]]) -> str:
        with heeding_cancellation():
            return await lossy()

    for lossy in (loses_it, fails_instead):
        task = asyncio.create_task(heeds(lossy))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


@pytest.mark.asyncio
async def test_heeding_cancellation_changes_nothing_where_there_is_none_and_nothing_about_an_outer_deadline() -> None:
    with heeding_cancellation(), pytest.raises(DeadlineExceeded, match="tool"):
        async with deadline(0.01, "tool"):
            await forever()
    with pytest.raises(ConfigError), heeding_cancellation():
        raise ConfigError("of the block")

    async def lost() -> None:
        with heeding_cancellation(), suppress(asyncio.CancelledError):
            await forever()

    with pytest.raises(DeadlineExceeded, match="outer"):
        async with deadline(0.01, "outer"):
            await lost()


def test_waits_are_counted_by_reason_and_end_with_the_block() -> None:
    with waiting("server"), waiting("server"), waiting("tool:x"):
        waits = current_waits()
        assert {reason: wait.count for reason, wait in waits.items()} == {"server": 2, "tool:x": 1}
        assert waits["server"].oldest_s >= waits["tool:x"].oldest_s >= 0
    assert current_waits() == {}
