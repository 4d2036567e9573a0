"""Admission: slots, order, the queue's bound, cancellation."""

import asyncio

import pytest

from agentrl.sandbox.admission import Admission, QueueFull


@pytest.mark.asyncio
async def test_slots_are_distinct_and_come_back() -> None:
    admission = Admission(capacity=2, max_queue=4)
    async with admission.permit() as first, admission.permit() as second:
        assert {first.slot, second.slot} == {0, 1}
        assert (admission.running, admission.waiting) == (2, 0)
    assert admission.running == 0


@pytest.mark.asyncio
async def test_waiters_are_served_in_the_order_of_arrival_and_told_how_long_they_waited() -> None:
    admission = Admission(capacity=1, max_queue=10)
    served: list[tuple[int, float]] = []

    async def one(index: int) -> None:
        async with admission.permit() as permit:
            served.append((index, permit.queue_time_s))
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for index in range(5):
            group.create_task(one(index))
    assert [index for index, _ in served] == [0, 1, 2, 3, 4]
    assert served[0][1] < 0.01 < served[4][1]


@pytest.mark.asyncio
async def test_past_the_queues_bound_the_answer_is_immediate() -> None:
    admission = Admission(capacity=1, max_queue=1)
    async with admission.permit(), asyncio.TaskGroup() as group:
        waiting = group.create_task(admission.permit().__aenter__())
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as refused:
            async with admission.permit():
                pass
        assert 1 <= refused.value.retry_after_s <= 30
        waiting.cancel()


@pytest.mark.asyncio
async def test_a_cancelled_waiter_neither_keeps_a_place_nor_loses_a_slot() -> None:
    admission = Admission(capacity=1, max_queue=5)
    async with asyncio.TaskGroup() as group:
        async with admission.permit():
            waiting = [group.create_task(admission.permit().__aenter__()) for _ in range(3)]
            await asyncio.sleep(0)
            assert admission.waiting == 3
            waiting[1].cancel()
            await asyncio.sleep(0)
            assert admission.waiting == 2
            waiting[0].cancel()
            waiting[2].cancel()
        await asyncio.sleep(0)
    assert (admission.running, admission.waiting) == (0, 0)


@pytest.mark.asyncio
async def test_a_waiter_cancelled_in_the_moment_it_is_served_passes_the_slot_on() -> None:
    admission = Admission(capacity=1, max_queue=5)
    async with asyncio.TaskGroup() as group:
        async with admission.permit():
            waiting = group.create_task(admission.permit().__aenter__())
            await asyncio.sleep(0)
        waiting.cancel()
    assert admission.running == 0
