"""Several rollout processes on one run: every task is played, none twice, none too early. On a real server."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import redis.asyncio

from agentrl.stream.keys import Keys
from agentrl.stream.leases import TaskLeases
from agentrl.stream.producer import TrajectoryProducer
from agentrl.stream.server import EmbeddedServer, connect_async, ensure
from agentrl.types import GroupClose

pytestmark = [pytest.mark.timeout(60), pytest.mark.asyncio]

KEYS = Keys("leases")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="arl-") as directory:
        yield ensure(directory)
        EmbeddedServer(directory).stop()


@pytest_asyncio.fixture
async def client(url: str) -> AsyncIterator[redis.asyncio.Redis]:
    client = connect_async(url, role="serve")
    await client.flushall()
    yield client
    await client.aclose()


async def close(client: redis.asyncio.Redis, *ordinals: int) -> None:
    producer = TrajectoryProducer(client, KEYS)
    for ordinal in ordinals:
        await producer.close_group(
            GroupClose(
                group_id=f"t/{ordinal}", task_id="t", ordinal=ordinal, size=1, members=(), failed={f"t/{ordinal}/0/0": "x"}
            )
        )


async def test_processes_that_ask_at_once_share_the_ordinals_without_gap_or_overlap(client: redis.asyncio.Redis) -> None:
    processes = [TaskLeases(client, KEYS, owner=f"serve-{i}", budget=1000) for i in range(5)]
    answers = await asyncio.gather(*(p.claim(3, consumed_groups=0) for p in processes for _ in range(4)))
    assert sorted(o for answer in answers for o in answer) == list(range(60))


async def test_the_budget_is_the_runs_and_not_the_processes(client: redis.asyncio.Redis) -> None:
    a, b = (TaskLeases(client, KEYS, owner=name, budget=6) for name in ("a", "b"))
    assert await a.claim(4, consumed_groups=0) == [0, 1, 2, 3]
    assert await b.claim(4, consumed_groups=0) == [4, 5]
    assert await b.claim(4, consumed_groups=0) == []
    await close(client, 1, 4)  # closed but not consumed: still ahead of the learner
    assert await b.claim(4, consumed_groups=0) == []
    assert await a.claim(4, consumed_groups=2) == [6, 7]


async def test_a_process_that_dies_loses_its_tasks_to_others_once_its_leases_expire(client: redis.asyncio.Redis) -> None:
    dead = TaskLeases(client, KEYS, owner="dead", budget=100, ttl_s=0.05)
    alive = TaskLeases(client, KEYS, owner="alive", budget=100)
    assert await dead.claim(3, consumed_groups=0) == [0, 1, 2]
    await close(client, 1)
    assert (await alive.claim(1, consumed_groups=0)) == [3], "a lease that runs is respected"
    await asyncio.sleep(0.1)
    assert await alive.claim(4, consumed_groups=0) == [0, 2, 4, 5], "what expired comes first, what closed never again"
    await dead.renew()
    assert dead.lost == 2
    assert dead.held == {1}, "its group closed: nothing is lost there"


async def test_a_renewed_lease_stays(client: redis.asyncio.Redis) -> None:
    busy = TaskLeases(client, KEYS, owner="busy", budget=100, ttl_s=1.0)
    other = TaskLeases(client, KEYS, owner="other", budget=100)
    await busy.claim(2, consumed_groups=0)
    renewing = asyncio.create_task(busy.run())
    await asyncio.sleep(1.5)
    assert await other.claim(2, consumed_groups=0) == [2, 3]
    renewing.cancel()


async def test_a_process_that_restarts_under_its_name_takes_its_own_tasks_back_at_once(client: redis.asyncio.Redis) -> None:
    await TaskLeases(client, KEYS, owner="serve-0", budget=100).claim(3, consumed_groups=0)
    again = TaskLeases(client, KEYS, owner="serve-0", budget=100)
    assert await again.claim(2, consumed_groups=0) == [0, 1]
    assert await again.claim(2, consumed_groups=0) == [2, 3], "the third was left for the taking, whoever asks"


async def test_leasing_begins_where_a_run_of_one_process_stopped(client: redis.asyncio.Redis) -> None:
    await close(client, 0, 1, 2, 4)
    leases = TaskLeases(client, KEYS, owner="a", budget=100)
    assert await leases.claim(3, consumed_groups=4) == [3, 5, 6]
