"""Admission: slots, order, the queue's bound, cancellation."""

import asyncio
import time

import pytest

from agentrl.sandbox.admission import Admission, Draining, QueueFull, WaitedTooLong


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

    async with asyncio.TaskGroup() as group, admission.permit():
        for index in range(5):
            group.create_task(one(index))
        await asyncio.sleep(0)
        queued = time.monotonic()
        await asyncio.sleep(0.02)
        least_s = time.monotonic() - queued
    assert [index for index, _ in served] == [0, 1, 2, 3, 4]
    assert all(queue_time_s >= least_s > 0.01 for _, queue_time_s in served)


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


@pytest.mark.asyncio
async def test_clients_take_turns_however_many_requests_one_sends() -> None:
    admission = Admission(capacity=1, max_queue=20)
    served: list[str] = []

    async def one(client: str) -> None:
        async with admission.permit(client):
            served.append(client)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group, admission.permit("first"):
        for client in [*"aaaaaa", "b", "c", "b"]:
            group.create_task(one(client))
        await asyncio.sleep(0)
    assert "".join(served) == "abcabaaaa"


@pytest.mark.asyncio
async def test_in_a_full_queue_the_greediest_client_gives_way() -> None:
    admission = Admission(capacity=1, max_queue=3)
    outcomes: dict[str, str] = {}

    async def one(name: str, client: str) -> None:
        try:
            async with admission.permit(client):
                outcomes[name] = "ran"
        except QueueFull:
            outcomes[name] = "refused"

    async with asyncio.TaskGroup() as group, admission.permit("other"):
        for name, client in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("a4", "a")):
            group.create_task(one(name, client))
            await asyncio.sleep(0)
        assert admission.waiting == 3
    assert outcomes == {"a1": "ran", "a2": "ran", "a3": "refused", "b1": "ran", "a4": "refused"}
    assert (admission.running, admission.waiting) == (0, 0)


@pytest.mark.asyncio
async def test_a_wait_with_a_deadline_ends_with_it_and_leaves_no_place_taken() -> None:
    admission = Admission(capacity=1, max_queue=3)
    async with admission.permit():
        with pytest.raises(WaitedTooLong, match="0.02 s"):
            async with admission.permit(timeout_s=0.02):
                pass
        assert admission.waiting == 0
    async with admission.permit(timeout_s=0.02) as permit:
        assert permit.slot == 0


@pytest.mark.asyncio
async def test_draining_refuses_what_waits_and_what_comes_and_lets_run_what_runs() -> None:
    admission = Admission(capacity=1, max_queue=3)
    async with admission.permit():
        waiting = asyncio.ensure_future(admission.permit().__aenter__())
        await asyncio.sleep(0)
        admission.drain()
        with pytest.raises(Draining):
            await waiting
        with pytest.raises(Draining):
            async with admission.permit():
                pass
        assert admission.running == 1
    assert (admission.running, admission.waiting) == (0, 0)
