"""Over-stale groups are given back and sampled again, on a real server: once each, behind the checkpoint, and the ledger closes."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import pytest_asyncio
import redis
import redis.asyncio

from agentrl.errors import StreamError
from agentrl.learner.batching import BatchBuilder, StepBatch
from agentrl.rollout.worker import RolloutWorker
from agentrl.stream.consumer import TrajectoryConsumer
from agentrl.stream.keys import Keys
from agentrl.stream.ledger import read_ledger
from agentrl.stream.policy import read_progress
from agentrl.stream.producer import TrajectoryProducer
from agentrl.stream.server import connect_async
from agentrl.testing.stream_doubles import make_close, make_trajectory
from agentrl.types import Task, Trajectory, TrajectoryGroup, group_id_of, round_of

pytestmark = pytest.mark.asyncio
KEYS = Keys("again")


@pytest_asyncio.fixture
async def producer(url: str, client: redis.Redis) -> AsyncIterator[TrajectoryProducer]:
    aclient = connect_async(url, role="serve")
    yield TrajectoryProducer(aclient, KEYS)
    await aclient.aclose()


def member(ordinal: int, index: int, round_: int = 0, *, version: int = 0) -> Trajectory:
    t = make_trajectory(ordinal, index, version=version, reward=float(index % 2))
    group_id = group_id_of(t.task_id, ordinal, round_)
    return replace(t, id=f"{group_id}/{index}/0", group_id=group_id)


async def put(producer: TrajectoryProducer, ordinal: int, round_: int = 0, *, version: int = 0, size: int = 2) -> list[str]:
    members = [member(ordinal, i, round_, version=version) for i in range(size)]
    for t in members:
        await producer.put_trajectory(t)
    await producer.close_group(make_close(members))
    return [t.id for t in members]


def take(consumer: TrajectoryConsumer) -> TrajectoryGroup:
    group = consumer.next_group(60.0)
    assert group is not None
    return group


def decide(groups: Sequence[TrajectoryGroup], version: int, *, max_requeues: int = 3) -> StepBatch:
    batches = BatchBuilder(
        groups_per_step=1, max_staleness=2, staleness_policy="requeue", max_requeues=max_requeues, zero_spread="keep"
    )
    for group in groups:
        batches.add(group)
    return batches.build(version)


def acquire(client: redis.Redis, trained: dict[str, str] | None = None) -> TrajectoryConsumer:
    consumer = TrajectoryConsumer(client, KEYS, trained=trained or {})
    consumer.acquire()
    return consumer


def commit(consumer: TrajectoryConsumer, batch: StepBatch) -> None:
    consumer.commit([g.close.id for g in batch.groups], outcomes=batch.outcomes)


async def test_an_over_stale_group_is_sampled_again_under_new_ids_and_then_trained(
    client: redis.Redis, producer: TrajectoryProducer
) -> None:
    first = await put(producer, 0)
    consumer = acquire(client)
    batch = decide([take(consumer)], version=5)
    assert batch.outcomes == dict.fromkeys(first, "stale:requeued")
    assert (batch.num_trained, batch.counts["groups/requeued"], batch.counts["trajectories/stale"]) == (0, 1, 2)
    assert batch.counts["tokens/stale"] == 2 * 16, "every wasted token is counted"
    assert await producer.requeued() == {}, "nothing is given back before the checkpoint"
    commit(consumer, batch)
    commit(consumer, batch)
    assert await producer.requeued() == {0: 1}
    book = read_ledger(client, KEYS)
    assert (book.submitted, book.stale, book.requeued, book.waiting, book.closes) == (2, 2, 2, 0, True)
    assert "of which given back" in book.table()

    second = await put(producer, 0, 1, version=4)
    assert not set(first) & set(second)
    assert await producer.requeued() == {}
    batch = decide([take(consumer)], version=5)
    assert set(batch.outcomes.values()) == {"trained"}
    commit(consumer, batch)
    book = read_ledger(client, KEYS)
    assert (book.submitted, book.trained, book.stale, book.closed_groups, book.committed_groups) == (4, 2, 2, 2, 2)
    assert book.closes
    assert client.xlen(KEYS.traj) == 0


async def test_one_over_stale_member_gives_its_whole_group_back(client: redis.Redis, producer: TrajectoryProducer) -> None:
    members = [member(3, 0, version=5), member(3, 1, version=1)]
    for t in members:
        await producer.put_trajectory(t)
    await producer.close_group(make_close(members, failed={"gone": "deadline"}))
    consumer = acquire(client)
    batch = decide([take(consumer)], version=5)
    assert Counter(batch.outcomes.values()) == {"stale:requeued": 2, "failed:deadline": 1}
    assert batch.counts["trajectories/over_stale"] == 1
    commit(consumer, batch)
    assert await producer.requeued() == {3: 1}
    book = read_ledger(client, KEYS)
    assert (book.submitted, book.requeued, dict(book.failed), book.closes) == (3, 2, {"deadline": 1}, True)


async def test_after_the_last_round_a_group_is_dropped(client: redis.Redis, producer: TrajectoryProducer) -> None:
    consumer = acquire(client)
    for round_ in range(3):
        await put(producer, 7, round_)
        batch = decide([take(consumer)], version=9, max_requeues=2)
        commit(consumer, batch)
        assert await producer.requeued() == ({7: round_ + 1} if round_ < 2 else {})
    book = read_ledger(client, KEYS)
    assert (book.submitted, book.stale, book.requeued, book.closes) == (6, 6, 4, True)


async def test_what_an_older_round_still_sends_is_superseded(client: redis.Redis, producer: TrajectoryProducer) -> None:
    ids = await put(producer, 0)
    consumer = acquire(client)
    commit(consumer, decide([take(consumer)], version=9))
    await producer.put_trajectory(member(0, 5))
    await producer.close_group(make_close([member(0, i) for i in range(2)]))  # a repeated close is none
    assert read_ledger(client, KEYS).superseded == 1
    assert await producer.requeued() == {0: 1}, "the new round is still to come"
    await put(producer, 0, 1)
    await producer.put_trajectory(member(0, 6, 1))
    book = read_ledger(client, KEYS)
    assert (book.superseded, book.waiting, book.closed_groups, book.closes) == (2, 2, 2, True)
    with pytest.raises(StreamError, match="does not know"):
        await producer.close_group(make_close([member(1, 0)]))
    assert await producer.present(ids) == set(ids)


@pytest.mark.parametrize("knows", [True, False])
async def test_a_learner_that_dies_between_checkpoint_and_commit_gives_back_when_it_returns(
    client: redis.Redis, producer: TrajectoryProducer, knows: bool
) -> None:
    await put(producer, 0)
    await put(producer, 1, version=8)
    dead = acquire(client)
    saved = dict(decide([take(dead), take(dead)], version=9).outcomes)
    successor = acquire(client, saved if knows else None)
    if knows:  # by the consumer: what the checkpoint contains is committed, not returned
        assert successor.next_group(0.2) is None
    else:  # by the loop, which compares with the checkpoint itself
        groups = [take(successor), take(successor)]
        successor.commit([g.close.id for g in groups], outcomes=saved)
    assert await producer.requeued() == {0: 1}
    book = read_ledger(client, KEYS)
    assert (book.trained, book.requeued, book.waiting, book.closes) == (2, 2, 0, True)


async def test_a_learner_that_dies_before_its_checkpoint_gives_nothing_back(
    client: redis.Redis, producer: TrajectoryProducer
) -> None:
    await put(producer, 0, version=3)
    dead = acquire(client)
    assert set(decide([take(dead)], version=9).outcomes.values()) == {"stale:requeued"}
    batch = decide([take(acquire(client))], version=4)  # resumed from older weights, for which it is fresh
    assert set(batch.outcomes.values()) == {"trained"}
    assert await producer.requeued() == {}


async def test_serve_samples_what_was_given_back_before_new_tasks_and_a_restart_finds_it(
    url: str, client: redis.Redis, producer: TrajectoryProducer
) -> None:
    """A real worker, stream and batch builder; versions jump so that the first groups are over-stale."""
    version = 0
    played: list[str] = []

    async def rollout(
        task: Task, trajectory_id: str, group_id: str, ordinal: int, sample: int, attempt: int
    ) -> tuple[Trajectory, None]:
        await asyncio.sleep(0)
        played.append(trajectory_id)
        made = make_trajectory(ordinal, sample, attempt=attempt, version=version, reward=float(sample))
        return replace(made, id=trajectory_id, group_id=group_id, task_id=task.id), None

    def worker() -> RolloutWorker:
        return RolloutWorker(
            task_at=lambda n: Task(id=f"t/{n % 5}", prompt=[], data_source="d"), sink=producer,
            read_progress=partial(read_progress, producer._client, KEYS), rollout=rollout, group_size=2, groups_per_step=2,
            max_staleness=2, pipeline_depth=1, in_flight=4, requeued=producer.requeued,
        )  # fmt: skip

    async def groups(consumer: TrajectoryConsumer, count: int) -> list[TrajectoryGroup]:
        return [await asyncio.to_thread(take, consumer) for _ in range(count)]

    consumer = acquire(client)
    running = asyncio.create_task(worker().run())
    batch = decide(await groups(consumer, 4), version=9)  # all four that the bound admits
    assert {round_of(g.close.group_id) for g in batch.groups} == {0}
    running.cancel()  # serve dies before it hears of it
    await asyncio.wait([running])
    commit(consumer, batch)
    consumer.report_progress(4)
    assert await producer.requeued() == dict.fromkeys(range(4), 1)
    played.clear()
    version = 9
    # A worker died while it sampled group 2 again: one member is on the stream.
    await producer.put_trajectory(
        replace(make_trajectory(2, 0, version=9), id="t/2/2+again1/0/0", group_id="t/2/2+again1", task_id="t/2")
    )
    running = asyncio.create_task(worker().run())
    batch = decide(await groups(consumer, 4), version=10)
    commit(consumer, batch)
    consumer.report_progress(8)
    assert sorted(g.close.ordinal for g in batch.groups) == [0, 1, 2, 3], "before any new task"
    assert set(batch.outcomes.values()) == {"trained"}
    assert Counter(played)["t/2/2+again1/0/0"] == 0, "it was there already"
    fresh = await groups(consumer, 2)
    assert {g.close.ordinal for g in fresh} < set(range(4, 8)), "and then on with new ones, in whatever order they end"
    running.cancel()
    await asyncio.wait([running])
    assert max(Counter(played).values()) == 1
    book = read_ledger(client, KEYS)
    assert (book.requeued, book.trained, book.closes) == (8, 8, True)


async def test_a_damaged_close_of_a_later_round_keeps_its_ordinal(client: redis.Redis, producer: TrajectoryProducer) -> None:
    await put(producer, 4)
    consumer = acquire(client)
    commit(consumer, decide([take(consumer)], version=9))
    await put(producer, 4, 1)
    ((entry, fields),) = client.xrevrange(KEYS.traj, count=1)
    client.xdel(KEYS.traj, entry)
    client.xadd(KEYS.traj, {**fields, b"b": fields[b"b"][:-3] + b"xyz"})
    group = take(consumer)
    assert (group.close.ordinal, len(group.trajectories)) == (4, 2)
    commit(consumer, decide([group], version=9))
    assert await producer.requeued() == {4: 2}


@pytest.mark.parametrize(
    ("group_id", "round_"),
    [("t/5", 0), ("t/5+again1", 1), ("a+again3/12+again20", 20), ("t/5+replay1-0", None), ("t/x", None), ("t/5+again", None)],
)
async def test_rounds_are_read_from_group_ids(group_id: str, round_: int | None) -> None:
    assert round_of(group_id) == round_


async def test_group_ids_of_rounds_differ() -> None:
    ids = [group_id_of("t", 5, r) for r in range(3)]
    assert ids == ["t/5", "t/5+again1", "t/5+again2"]
    assert [round_of(i) for i in ids] == [0, 1, 2]
    assert np.unique(ids).size == 3
