"""Several rollout processes on one run: every task is played, none twice, none too early. On a real server."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import redis.asyncio

from agentrl.rollout.worker import RolloutWorker
from agentrl.stream.keys import Keys
from agentrl.stream.leases import TaskLeases
from agentrl.stream.partials import RedisPartials
from agentrl.stream.policy import read_progress
from agentrl.stream.producer import TrajectoryProducer
from agentrl.testing.stream_doubles import make_trajectory
from agentrl.types import GroupClose, Task, group_id_of

pytestmark = pytest.mark.asyncio

KEYS = Keys("leases")
BUDGET = 8


async def close(aclient: redis.asyncio.Redis, *ordinals: int) -> None:
    producer = TrajectoryProducer(aclient, KEYS)
    for ordinal in ordinals:
        await producer.close_group(
            GroupClose(
                group_id=f"t/{ordinal}", task_id="t", ordinal=ordinal, size=1, members=(), failed={f"t/{ordinal}/0/0": "x"}
            )
        )


async def test_processes_that_ask_at_once_share_the_ordinals_without_gap_or_overlap(aclient: redis.asyncio.Redis) -> None:
    processes = [TaskLeases(aclient, KEYS, owner=f"serve-{i}", budget=1000) for i in range(5)]
    answers = await asyncio.gather(*(p.claim(3, consumed_groups=0) for p in processes for _ in range(4)))
    assert sorted(o for answer in answers for o in answer) == list(range(60))


async def test_the_budget_is_the_runs_and_not_the_processes(aclient: redis.asyncio.Redis) -> None:
    a, b = (TaskLeases(aclient, KEYS, owner=name, budget=6) for name in ("a", "b"))
    assert list(await a.claim(4, consumed_groups=0)) == [0, 1, 2, 3]
    assert list(await b.claim(4, consumed_groups=0)) == [4, 5]
    assert list(await b.claim(4, consumed_groups=0)) == []
    await close(aclient, 1, 4)  # closed but not consumed: still ahead of the learner
    assert list(await b.claim(4, consumed_groups=0)) == []
    assert list(await a.claim(4, consumed_groups=2)) == [6, 7]


async def test_a_process_that_dies_loses_its_tasks_to_others_once_its_leases_expire(aclient: redis.asyncio.Redis) -> None:
    dead = TaskLeases(aclient, KEYS, owner="dead", budget=100)
    alive = TaskLeases(aclient, KEYS, owner="alive", budget=100)
    assert list(await dead.claim(3, consumed_groups=0)) == [0, 1, 2]
    await close(aclient, 1)
    assert (list(await alive.claim(1, consumed_groups=0))) == [3], "a lease that runs is respected"
    await aclient.zadd(KEYS.leases, {"0": 1, "2": 1})  # their time is up
    assert list(await alive.claim(4, consumed_groups=0)) == [0, 2, 4, 5], "what expired comes first, what closed never again"
    await dead.renew()
    assert dead.lost == 2
    assert dead.held == {1}, "its group closed: nothing is lost there"


async def test_a_renewed_lease_stays(aclient: redis.asyncio.Redis) -> None:
    async def ends_at_ms() -> list[float]:
        return [score for _, score in await aclient.zrange(KEYS.leases, 0, -1, withscores=True)]

    brief = TaskLeases(aclient, KEYS, owner="busy", budget=100, ttl_s=0.3)
    await brief.claim(2, consumed_groups=0)
    first_end = max(await ends_at_ms())
    renewing = asyncio.create_task(brief.run())
    while min(await ends_at_ms()) <= first_end + 300:  # twice as long as it was leased for
        await asyncio.sleep(0.01)
    renewing.cancel()

    await aclient.delete(KEYS.leases, KEYS.lease_owners)
    busy = TaskLeases(aclient, KEYS, owner="busy", budget=100)
    other = TaskLeases(aclient, KEYS, owner="other", budget=100)
    assert list(await busy.claim(2, consumed_groups=0)) == [0, 1]
    await aclient.zadd(KEYS.leases, {"0": 1, "1": 1})  # their time is up, but nobody has asked before their owner is heard
    await busy.renew()
    assert list(await other.claim(2, consumed_groups=0)) == [2, 3]
    assert (busy.lost, busy.held) == (0, {0, 1})


async def test_a_process_that_restarts_under_its_name_takes_its_own_tasks_back_at_once(aclient: redis.asyncio.Redis) -> None:
    await TaskLeases(aclient, KEYS, owner="serve-0", budget=100).claim(3, consumed_groups=0)
    again = TaskLeases(aclient, KEYS, owner="serve-0", budget=100)
    assert list(await again.claim(2, consumed_groups=0)) == [0, 1]
    assert list(await again.claim(2, consumed_groups=0)) == [2, 3], "the third was left for the taking, whoever asks"


async def test_leasing_begins_where_a_run_of_one_process_stopped(aclient: redis.asyncio.Redis) -> None:
    await close(aclient, 0, 1, 2, 4)
    leases = TaskLeases(aclient, KEYS, owner="a", budget=100)
    assert list(await leases.claim(3, consumed_groups=4)) == [3, 5, 6]


async def test_what_the_learner_gave_back_is_leased_first_and_ends_with_its_new_close(aclient: redis.asyncio.Redis) -> None:
    leases = TaskLeases(aclient, KEYS, owner="a", budget=100)
    assert await leases.claim(2, consumed_groups=0) == {0: 0, 1: 0}
    await close(aclient, 0, 1)
    await aclient.zadd(KEYS.requeued, {"1": 1})
    assert await leases.claim(2, consumed_groups=2) == {1: 1, 2: 0}
    assert await leases.claim(1, consumed_groups=2) == {3: 0}, "it is being played"
    await TrajectoryProducer(aclient, KEYS).close_group(
        GroupClose(group_id=group_id_of("t", 1, 1), task_id="t", ordinal=1, size=1, members=(), failed={"x": "x"})
    )
    assert await leases.claim(1, consumed_groups=3) == {4: 0}
    assert {int(o) for o in await aclient.zrange(KEYS.leases, 0, -1)} == {2, 3, 4}


def worker(
    aclient: redis.asyncio.Redis, owner: str, play: Callable[[], Awaitable[None]], *, ttl_s: float = 30.0
) -> RolloutWorker:
    async def rollout(task: Task, trajectory_id: str, group_id: str, ordinal: int, sample: int, attempt: int) -> Any:
        await play()
        made = make_trajectory(ordinal, sample, attempt=attempt)
        return replace(made, id=trajectory_id, task_id=task.id, group_id=group_id), None

    return RolloutWorker(
        task_at=lambda ordinal: Task(id=f"t{ordinal}", prompt=[], data_source="d"),
        sink=TrajectoryProducer(aclient, KEYS),
        read_progress=partial(read_progress, aclient, KEYS),
        rollout=rollout,
        group_size=2,
        groups_per_step=4,
        max_staleness=1,
        pipeline_depth=1,
        in_flight=4,
        leases=TaskLeases(aclient, KEYS, owner=owner, budget=BUDGET, ttl_s=ttl_s),
        poll_s=0.01,
    )


async def test_workers_that_are_killed_and_restarted_play_every_group_once_and_never_run_ahead_together(
    aclient: redis.asyncio.Redis,
) -> None:
    """A learner that takes one step of four groups at a time; three workers; one is killed again and again."""
    ahead: list[int] = []

    async def play() -> None:
        state = await read_progress(aclient, KEYS)
        live = int(await aclient.zcount(KEYS.leases, "-inf", "+inf"))
        ahead.append(state.closed_groups - state.consumed_groups)
        assert live <= BUDGET
        await asyncio.sleep(0.01)

    steady = [asyncio.create_task(worker(aclient, f"steady-{i}", play).run()) for i in range(2)]
    victim = asyncio.create_task(worker(aclient, "victim", play).run())
    async with asyncio.timeout(150):
        for step in range(1, 11):
            while (await read_progress(aclient, KEYS)).closed_groups < 4 * step:
                await asyncio.sleep(0.01)
                if step % 3 == 0 and not victim.done():
                    victim.cancel()
                    await asyncio.gather(victim, return_exceptions=True)
                    victim = asyncio.create_task(worker(aclient, "victim", play).run())
            await aclient.hset(KEYS.progress, mapping={"run_epoch": 1, "version": step, "consumed_groups": 4 * step})
    for task in (*steady, victim):
        task.cancel()
    await asyncio.gather(*steady, victim, return_exceptions=True)
    assert max(ahead) <= BUDGET
    producer = TrajectoryProducer(aclient, KEYS)
    assert await producer.is_closed(range(36)) == set(range(36)), "in order but for the pipeline: nothing was skipped"
    entries = [fields[b"t"].decode() for _, fields in await aclient.xrange(KEYS.traj) if fields[b"k"] == b"t"]
    assert len(entries) == len(set(entries)), "no trajectory twice"
    per_group = Counter(entry.rsplit("/", 2)[0] for entry in entries)
    assert {f"t{o}/{o}": 2 for o in range(36)}.items() <= per_group.items()


@pytest.mark.parametrize("about", ["progress", "partial rollouts"])
async def test_cancelling_a_process_that_talks_to_the_stream_all_the_time_always_ends_it(
    aclient: redis.asyncio.Redis, about: str
) -> None:
    """redis-py's own `wait_for` loses about every second of these cancellations before Python 3.12."""
    partials = RedisPartials(aclient, KEYS)

    async def talk() -> None:
        while True:
            await (read_progress(aclient, KEYS) if about == "progress" else partials.save("t/0/0/0/0", b"a turn"))

    for _ in range(50):
        talking = asyncio.create_task(talk())
        await asyncio.sleep(0.005)
        talking.cancel()
        async with asyncio.timeout(60):
            await asyncio.gather(talking, return_exceptions=True)
        assert talking.cancelled()
