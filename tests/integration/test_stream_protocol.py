"""Producer and consumer on a real server: puts, bounds, groups, commits, fences, dead letters, the ledger."""

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import redis
import redis.asyncio

from agentrl.errors import CodecError, ConfigError, Fenced, StreamError
from agentrl.stream import producer as producer_module
from agentrl.stream.codec import encode
from agentrl.stream.consumer import TrajectoryConsumer, fetch
from agentrl.stream.fingerprint import check_fingerprint, clear_fingerprint
from agentrl.stream.keys import GROUP, Keys
from agentrl.stream.ledger import read_books, read_ledger
from agentrl.stream.policy import read_policy, read_policy_sync, read_progress, read_progress_sync
from agentrl.stream.producer import TrajectoryProducer
from agentrl.stream.put_ids import put_name
from agentrl.stream.server import connect, connect_async
from agentrl.testing.stream_doubles import LossyProxy, make_close, make_trajectory
from agentrl.types import GroupClose, PolicyRecord, Trajectory, TrajectoryGroup, content_digest

pytestmark = pytest.mark.asyncio

FIRST_PAUSE_S = 0.03
DEADLINE_S = 60.0
"""Of what takes milliseconds: only a hang reaches it."""


@pytest.fixture
def keys() -> Keys:
    return Keys("test")


def group_of(ordinal: int, size: int = 2, **fields: Any) -> list[Trajectory]:
    return [make_trajectory(ordinal, i, **fields) for i in range(size)]


async def put_group(producer: TrajectoryProducer, ordinal: int, size: int = 2, **fields: Any) -> list[Trajectory]:
    members = group_of(ordinal, size, **fields)
    for member in members:
        await producer.put_trajectory(member)
    await producer.close_group(make_close(members))
    return members


def started(client: redis.Redis, keys: Keys, **options: Any) -> TrajectoryConsumer:
    consumer = TrajectoryConsumer(client, keys, **options)
    consumer.acquire()
    return consumer


def take(consumer: TrajectoryConsumer, timeout_s: float = DEADLINE_S) -> TrajectoryGroup:
    group = consumer.next_group(timeout_s)
    assert group is not None
    return group


def ids(group: TrajectoryGroup) -> list[str]:
    return [t.id for t in group]


def size_of(client: redis.Redis, keys: Keys) -> tuple[int, int]:
    progress = read_progress_sync(client, keys)
    return progress.items, progress.bytes


# -- putting ----------------------------------------------------------------------------------------------------------


async def test_group_arrives_as_it_was_put(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    members = await put_group(TrajectoryProducer(aclient, keys), 5, size=3)
    group = take(started(client, keys))
    assert group.close == make_close(members)
    assert [content_digest(t) for t in group] == [content_digest(t) for t in members]


async def test_repeated_put_and_close_are_one_entry_each(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    producer = TrajectoryProducer(aclient, keys)
    for _ in range(3):
        await put_group(producer, 0)
    assert client.xlen(keys.traj) == 3
    assert read_ledger(client, keys).submitted == 2


async def test_put_after_commit_is_still_known(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    producer = TrajectoryProducer(aclient, keys)
    members = await put_group(producer, 0)
    consumer = started(client, keys)
    consumer.commit(ids(take(consumer)), outcomes={})
    await put_group(producer, 0)
    assert client.xlen(keys.traj) == 0
    assert await producer.present([m.id for m in members] + ["never"]) == {m.id for m in members}


async def test_ids_of_closed_groups_cost_a_bit_each_and_are_never_forgotten(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    producer = TrajectoryProducer(aclient, keys, max_items=10_000)
    members = [m for ordinal in range(40) for m in await put_group(producer, ordinal, 8)]
    assert (client.exists(keys.dedupe), client.hlen(keys.open)) == (0, 0)
    assert client.scard(keys.put) == 1
    (name,) = client.smembers(keys.put)
    assert client.strlen(keys.put_map(name.decode())) == 40
    assert list(client.scan_iter(keys.members("*"))) == []
    names = [m.id for m in members]
    assert await producer.present([*names, *(n + "1" for n in names), *(f"{n}/x" for n in names)]) == set(names)
    assert read_books(client, keys).put == {put_name(n) for n in names}


async def test_late_puts_are_counted_once_however_late_they_are_repeated(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    """A retry of what was put, and what came after its group closed; before and after the commit; for ids with and without a bit."""
    producer = TrajectoryProducer(aclient, keys)
    members = [make_trajectory(0, i, attempt=i % 2) for i in range(12)]
    odd = replace(make_trajectory(0, 0), id="of another shape")
    for member in (*members[:9], odd):
        await producer.put_trajectory(member)
    await producer.close_group(make_close(members[:8]))
    consumer = started(client, keys)
    group = take(consumer)
    for _ in range(2):
        for member in (*members[:11], odd, replace(odd, id="late and of another shape")):
            await producer.put_trajectory(member)
        consumer.commit(ids(group), outcomes={})
        book = read_ledger(client, keys)
        assert (book.submitted, book.trained, book.superseded, book.waiting, book.closes) == (13, 8, 5, 0, True)
    assert await producer.present([m.id for m in members] + [odd.id]) == {m.id for m in members[:11]} | {odd.id}


async def test_a_run_of_an_older_version_goes_on_with_the_ids_it_remembers(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    """It kept every id in one sorted set: of groups that are open, closed, and committed."""
    producer = TrajectoryProducer(aclient, keys)
    open_, closed, committed = ([make_trajectory(o, i) for i in range(2)] for o in range(3))
    for members in (committed, closed):
        for member in members:
            await producer.put_trajectory(member)
        await producer.close_group(make_close(members))
    await producer.put_trajectory(open_[0])
    consumer = started(client, keys)
    consumer.commit(ids(take(consumer)), outcomes={})
    # What the older version wrote instead.
    client.delete(*client.scan_iter(keys.members("*")), *client.scan_iter(keys.put_map("*")), keys.put)
    for entry in (open_[0], *closed, *committed, make_close(closed), make_close(committed)):
        client.zadd(keys.dedupe, {entry.id: 1.7e12})
    before = read_ledger(client, keys)
    for member in (open_[0], *closed, *committed):
        await producer.put_trajectory(member)
    await producer.close_group(make_close(closed))
    assert read_ledger(client, keys) == before
    assert await producer.present([m.id for m in (*open_, *closed, *committed)]) == {
        m.id for m in (open_[0], *closed, *committed)
    }
    await producer.put_trajectory(open_[1])
    await producer.close_group(make_close(open_))
    for members in (closed, open_):
        group = take(consumer)
        assert ids(group) == [m.id for m in members]
        consumer.commit(ids(group), outcomes={})
    book = read_ledger(client, keys)
    assert (book.submitted, book.trained, book.waiting, book.closes) == (6, 6, 0, True)


async def test_malformed_trajectory_is_refused_before_anything_is_written(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    with pytest.raises(CodecError, match="reward=nan"):
        await TrajectoryProducer(aclient, keys).put_trajectory(make_trajectory(reward=float("nan")))
    assert client.dbsize() == 0


async def test_close_that_lists_a_member_never_put_is_refused(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    producer = TrajectoryProducer(aclient, keys)
    members = group_of(0)
    await producer.put_trajectory(members[0])
    with pytest.raises(StreamError, match=f"1 members that the stream does not know.*{members[1].id}"):
        await producer.close_group(make_close(members))
    await producer.put_trajectory(members[1])
    await producer.close_group(make_close(members))
    assert ids(take(started(client, keys))) == [m.id for m in members]


async def test_two_groups_cannot_close_one_ordinal(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    producer = TrajectoryProducer(aclient, keys)
    ours = make_trajectory(0, 0)
    other = replace(ours, id="other/0/0/0", group_id="other/0", task_id="other")
    await producer.put_trajectory(ours)
    await producer.put_trajectory(other)
    await producer.close_group(make_close([ours]))
    with pytest.raises(StreamError, match="already closed by another group"):
        await producer.close_group(make_close([other]))


async def test_cursor_is_the_lowest_ordinal_not_closed(aclient: redis.asyncio.Redis, keys: Keys) -> None:
    producer = TrajectoryProducer(aclient, keys)
    assert await producer.next_open_ordinal() == 0
    for ordinal in (*range(9), 10, 700):
        await put_group(producer, ordinal, size=1)
    assert await producer.next_open_ordinal() == 9
    assert await producer.is_closed(range(2000)) == {*range(9), 10, 700}
    await put_group(producer, 9, size=1)
    assert await producer.next_open_ordinal() == 11


async def test_large_trajectory_lives_beside_the_stream_and_dies_with_its_entry(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    big = make_trajectory(0, 0, num_tokens=200_000)
    payload = encode(big)
    assert len(payload) > producer_module.SIDE_KEY_BYTES
    producer = TrajectoryProducer(aclient, keys)
    await producer.put_trajectory(big)
    assert client.strlen(keys.blob(big.id)) == len(payload)
    entry = client.xrange(keys.traj)[0]
    assert b"b" not in entry[1]
    await producer.close_group(make_close([big]))
    consumer = started(client, keys)
    group = take(consumer)
    assert content_digest(group.trajectories[0]) == content_digest(big)
    assert content_digest(consumer.fetch([consumer.entry_id(big.id)])[0]) == content_digest(big)
    consumer.commit(ids(group), outcomes={})
    assert client.exists(keys.blob(big.id)) == 0
    assert size_of(client, keys) == (0, 0)


# -- bounds -----------------------------------------------------------------------------------------------------------


async def test_full_stream_makes_puts_wait_and_drops_nothing(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    waits: list[tuple[str, float]] = []
    producer = TrajectoryProducer(aclient, keys, max_items=6, on_wait=lambda reason, s: waits.append((reason, s)))
    consumer = started(client, keys)
    trained: list[str] = []
    deepest = 0

    async def produce(first: int) -> None:
        for ordinal in range(first, 60, 3):
            await put_group(producer, ordinal)

    async with asyncio.TaskGroup() as tasks:
        for first in range(3):
            tasks.create_task(produce(first))
        while producer.waiting < 3:  # the bound is reached before anything is taken away
            await asyncio.sleep(0.001)
        while len(trained) < 120:
            backlog = client.xlen(keys.traj) - client.xpending(keys.traj, GROUP)["pending"]
            deepest = max(deepest, backlog)
            group = await asyncio.to_thread(consumer.next_group, DEADLINE_S)
            if group is not None:
                await asyncio.sleep(0.003)
                consumer.commit(ids(group), outcomes={})
                trained += ids(group)
    assert len(trained) == len(set(trained)) == 120
    assert size_of(client, keys) == (0, 0)
    # Closes are always admitted: at most one per producer task above the bound.
    assert 6 <= deepest <= 6 + 3
    assert {reason for reason, _ in waits} == {"stream:full"}
    assert read_ledger(client, keys).trained == 120


async def test_payload_is_not_sent_again_while_the_stream_is_full(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    waits: list[str] = []
    producer = TrajectoryProducer(aclient, keys, max_items=1, on_wait=lambda reason, _: waits.append(reason))
    await producer.put_trajectory(make_trajectory(0, 0))
    payload = len(encode(make_trajectory(1, 0, num_tokens=20_000)))
    before = client.info("stats")["total_net_input_bytes"]
    put = asyncio.create_task(producer.put_trajectory(make_trajectory(1, 0, num_tokens=20_000)))
    while len(waits) < 8:
        await asyncio.sleep(0.01)
    put.cancel()
    await asyncio.wait([put])
    sent = client.info("stats")["total_net_input_bytes"] - before
    assert payload <= sent < 1.5 * payload
    assert producer.waiting == 0


async def test_group_close_is_admitted_when_full(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    producer = TrajectoryProducer(aclient, keys, max_items=1)
    member = make_trajectory(0, 0)
    await producer.put_trajectory(member)
    async with asyncio.timeout(DEADLINE_S):
        await producer.close_group(make_close([member]))
    assert client.xlen(keys.traj) == 2


async def test_uncommitted_entries_do_not_fill_the_item_bound(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    """A checkpoint interval longer than max_items must not deadlock."""
    producer = TrajectoryProducer(aclient, keys, max_items=2)
    consumer = started(client, keys)
    held: list[str] = []
    async with asyncio.timeout(DEADLINE_S):
        for ordinal in range(10):
            await put_group(producer, ordinal)
            held += ids(await asyncio.to_thread(take, consumer))
    assert client.xlen(keys.traj) == 30
    consumer.commit(held, outcomes={})
    assert size_of(client, keys) == (0, 0)


async def test_begun_groups_finish_although_the_byte_bound_is_reached(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    one = len(encode(make_trajectory(0, 0)))
    producer = TrajectoryProducer(aclient, keys, max_bytes=one + 1)
    members = group_of(0, 4)
    async with asyncio.timeout(DEADLINE_S):
        for member in members:
            await producer.put_trajectory(member)
        await producer.close_group(make_close(members))
    put = asyncio.create_task(producer.put_trajectory(make_trajectory(1, 0)))
    consumer = started(client, keys)
    while not consumer.producers_blocked():
        await asyncio.sleep(0.01)
    assert not put.done()
    consumer.commit(ids(take(consumer)), outcomes={})
    async with asyncio.timeout(DEADLINE_S):
        await put


async def test_entry_above_the_byte_bound_is_admitted_alone(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    producer = TrajectoryProducer(aclient, keys, max_bytes=10)
    async with asyncio.timeout(DEADLINE_S):
        await producer.put_trajectory(make_trajectory(0, 0))
    assert client.xlen(keys.traj) == 1


async def test_server_at_its_maxmemory_counts_as_full_and_commits_still_pass(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    producer = TrajectoryProducer(aclient, keys)
    await put_group(producer, 0)
    consumer = started(client, keys)
    group = take(consumer)
    client.config_set("maxmemory", 1)
    try:
        task = asyncio.create_task(producer.put_trajectory(make_trajectory(1, 0)))
        await asyncio.sleep(0.2)
        assert not task.done()
        consumer.commit(ids(group), outcomes={})
        assert client.xlen(keys.traj) == 0
    finally:
        client.config_set("maxmemory", 0)
    async with asyncio.timeout(DEADLINE_S):
        await task
    assert client.xlen(keys.traj) == 1


async def test_cancelled_puts_leave_the_connection_usable(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    producer = TrajectoryProducer(aclient, keys)
    for index in range(40):
        task = asyncio.create_task(producer.put_trajectory(make_trajectory(0, index, num_tokens=2000)))
        await asyncio.sleep(0.0002 * (index % 5))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    for index in range(40):
        await producer.put_trajectory(make_trajectory(0, index, num_tokens=2000))
    assert client.xlen(keys.traj) == 40
    assert len(await producer.present([make_trajectory(0, i).id for i in range(40)])) == 40


# -- groups -----------------------------------------------------------------------------------------------------------


async def test_interleaved_groups_come_in_the_order_they_closed(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    producer = TrajectoryProducer(aclient, keys)
    groups = [group_of(ordinal, 4) for ordinal in range(3)]
    for sample in range(4):
        for members in groups:
            await producer.put_trajectory(members[sample])
    for ordinal in (2, 0, 1):
        await producer.close_group(make_close(groups[ordinal]))
    consumer = started(client, keys)
    assert [take(consumer).close.ordinal for _ in range(3)] == [2, 0, 1]
    assert consumer.next_group(0.05) is None


async def test_open_group_is_not_returned(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    producer = TrajectoryProducer(aclient, keys)
    members = group_of(0)
    for member in members:
        await producer.put_trajectory(member)
    consumer = started(client, keys)
    assert consumer.next_group(0.05) is None
    assert read_ledger(client, keys).open_groups == 1
    await producer.close_group(make_close(members))
    assert ids(take(consumer)) == [m.id for m in members]


async def test_group_whose_rollouts_all_failed_is_returned_empty(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    close = GroupClose(group_id="t/0", task_id="t", ordinal=0, size=2, members=(), failed={"a": "deadline", "b": "tool"})
    await TrajectoryProducer(aclient, keys).close_group(close)
    consumer = started(client, keys)
    group = take(consumer)
    assert (group.trajectories, group.close) == ((), close)
    consumer.commit([close.id], outcomes={})
    ledger = read_ledger(client, keys)
    assert (ledger.submitted, dict(ledger.failed), ledger.closes) == (2, {"deadline": 1, "tool": 1}, True)
    assert (ledger.committed_groups, size_of(client, keys)) == (1, (0, 0))


async def test_trajectory_its_group_did_not_list_is_superseded(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    producer = TrajectoryProducer(aclient, keys)
    first, second = make_trajectory(0, 0, attempt=0), make_trajectory(0, 0, attempt=1)
    late = make_trajectory(0, 0, attempt=2)
    await producer.put_trajectory(first)
    await producer.put_trajectory(second)
    await producer.close_group(make_close([second]))
    await producer.put_trajectory(late)
    consumer = started(client, keys)
    group = take(consumer)
    assert ids(group) == [second.id]
    consumer.commit(ids(group), outcomes={})
    ledger = read_ledger(client, keys)
    assert (ledger.submitted, ledger.trained, ledger.superseded, ledger.closes) == (3, 1, 2, True)
    assert size_of(client, keys) == (0, 0)


async def test_blocked_read_wakes_when_a_group_closes(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    consumer = started(client, keys)
    reader = asyncio.create_task(asyncio.to_thread(consumer.next_group, 2 * DEADLINE_S))
    while not any(c["cmd"] == "xreadgroup" and "b" in c["flags"] for c in await aclient.client_list()):
        await asyncio.sleep(0.01)
    members = await put_group(TrajectoryProducer(aclient, keys), 0)
    async with asyncio.timeout(DEADLINE_S):
        group = await reader
    assert group is not None
    assert ids(group) == [m.id for m in members]


async def test_read_returns_in_time_when_nothing_comes(client: redis.Redis, keys: Keys) -> None:
    consumer = started(client, keys)
    for timeout_s in (0.0, 0.3):
        began = time.monotonic()
        assert consumer.next_group(timeout_s) is None
        assert timeout_s <= time.monotonic() - began < timeout_s + DEADLINE_S


async def test_read_before_acquire_is_refused(client: redis.Redis, keys: Keys) -> None:
    with pytest.raises(StreamError, match="acquire"):
        TrajectoryConsumer(client, keys).next_group(0.1)


async def test_other_ranks_fetch_payloads_by_stream_id(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys, url: str
) -> None:
    producer = TrajectoryProducer(aclient, keys)
    members = await put_group(producer, 0, 20)
    consumer = started(client, keys)
    entry_ids = [consumer.entry_id(i) for i in ids(take(consumer))]
    rank = connect(url, role="rank1")
    got = fetch(rank, keys, entry_ids[::-1])
    assert [content_digest(t) for t in got] == [content_digest(t) for t in members[::-1]]
    consumer.commit([m.id for m in members], outcomes={})
    with pytest.raises(StreamError, match="committed before this rank"):
        fetch(rank, keys, entry_ids[:1])
    with pytest.raises(StreamError, match="not in hand"):
        consumer.entry_id(members[0].id)
    rank.close()


# -- commits ----------------------------------------------------------------------------------------------------------


async def test_outcomes_are_counted_once_however_often_they_are_committed(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    await put_group(TrajectoryProducer(aclient, keys), 0, size=5)
    consumer = started(client, keys)
    names = ids(take(consumer))
    outcomes = dict(zip(names, ["trained", "filtered", "stale", "failed:oom", "superseded"], strict=True))
    for _ in range(3):
        consumer.commit(names, outcomes=outcomes)
    ledger = read_ledger(client, keys)
    assert (ledger.trained, ledger.filtered, ledger.stale, ledger.superseded) == (1, 1, 1, 1)
    assert dict(ledger.failed) == {"oom": 1}
    assert ledger.closes
    assert client.xpending(keys.traj, GROUP)["pending"] == 0


async def test_part_of_a_group_cannot_be_committed(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    await put_group(TrajectoryProducer(aclient, keys), 0, size=3)
    consumer = started(client, keys)
    names = ids(take(consumer))
    with pytest.raises(ValueError, match="1 of 3 trajectories.*committed whole"):
        consumer.commit(names[:1], outcomes={})
    consumer.commit(names[:1], outcomes=dict.fromkeys(names[1:], "filtered"))
    assert client.xlen(keys.traj) == 0


async def test_unknown_outcome_is_refused(client: redis.Redis, keys: Keys) -> None:
    with pytest.raises(ValueError, match="outcome 'lost'"):
        started(client, keys).commit(["x"], outcomes={"x": "lost"})


async def test_many_groups_are_committed_at_once(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    producer = TrajectoryProducer(aclient, keys, max_items=10_000)
    for ordinal in range(150):
        await put_group(producer, ordinal)
    consumer = started(client, keys)
    names = [name for _ in range(150) for name in ids(take(consumer))]
    consumer.commit(names, outcomes={})
    assert consumer.committed_groups == 150
    assert size_of(client, keys) == (0, 0)
    assert read_ledger(client, keys).trained == 300


async def test_zombie_learner_can_neither_commit_publish_nor_read(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    producer = TrajectoryProducer(aclient, keys)
    await put_group(producer, 0)
    zombie = started(client, keys)
    held = ids(take(zombie))
    successor = started(client, keys)
    assert successor.run_epoch == zombie.run_epoch + 1
    with pytest.raises(Fenced, match="epoch 1 but epoch 2"):
        zombie.commit(held, outcomes={})
    record = PolicyRecord(run_epoch=zombie.run_epoch, version=9, path="/w", digest="sha256:0")
    for call in (
        lambda: zombie.publish_policy(record, consumed_groups=9),
        lambda: zombie.report_progress(9),
        lambda: zombie.blame(held),
        lambda: zombie.next_group(0.2),
    ):
        with pytest.raises(Fenced):
            call()
    assert client.xlen(keys.traj) == 3
    assert read_policy_sync(client, keys) is None
    assert ids(take(successor)) == held


@pytest.mark.parametrize("name", ["L0", "other-host"])
async def test_what_a_zombie_read_last_still_reaches_its_successor(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys, name: str
) -> None:
    producer = TrajectoryProducer(aclient, keys)
    successor = started(client, keys)
    members = group_of(0, 3)
    for stolen in ((0, 1), (2, "close")):
        for what in stolen:
            await (producer.close_group(make_close(members)) if what == "close" else producer.put_trajectory(members[what]))
            if what in (1, "close"):
                assert client.xreadgroup(GROUP, name, {keys.traj: ">"}, count=9)
        if 2 not in stolen:
            assert successor.next_group(0.05) is None
    assert ids(take(successor)) == [m.id for m in members]


async def test_member_in_another_hand_is_not_taken_for_dead(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    producer = TrajectoryProducer(aclient, keys)
    successor = started(client, keys)
    members = group_of(0, 3)
    await producer.put_trajectory(members[0])
    client.xreadgroup(GROUP, "zombie", {keys.traj: ">"})
    await producer.put_trajectory(members[1])
    await producer.put_trajectory(members[2])
    await producer.close_group(make_close(members))
    group = take(successor)
    assert ids(group) == [m.id for m in members]
    assert not group.close.failed


async def test_epoch_is_above_every_earlier_one(client: redis.Redis, keys: Keys) -> None:
    assert [TrajectoryConsumer(client, keys).acquire() for _ in range(2)] == [1, 2]
    assert TrajectoryConsumer(client, keys).acquire(at_least=40) == 41
    assert TrajectoryConsumer(client, keys).acquire(at_least=3) == 42


# -- dead letters -----------------------------------------------------------------------------------------------------


def corrupt(client: redis.Redis, keys: Keys, which: int) -> None:
    """Rewrite the stream with one damaged payload, keeping the order."""
    entries = client.xrange(keys.traj)
    client.xtrim(keys.traj, 0, approximate=False)
    for index, (_, fields) in enumerate(entries):
        if index == which:
            fields[b"b"] = fields[b"b"][:-1] + bytes([fields[b"b"][-1] ^ 1])
        client.xadd(keys.traj, fields)


async def test_corrupt_trajectory_is_a_dead_letter_and_its_group_still_closes(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    members = await put_group(TrajectoryProducer(aclient, keys), 0, size=3)
    corrupt(client, keys, 1)
    consumer = started(client, keys)
    group = take(consumer)
    assert ids(group) == [members[0].id, members[2].id]
    assert dict(group.close.failed) == {members[1].id: "dead_letter"}
    consumer.commit(ids(group), outcomes={})
    [(_, dead)] = client.xrange(keys.dead)
    assert b"CRC32" in dead[b"reason"]
    assert dead[b"t"] == members[1].id.encode()
    ledger = read_ledger(client, keys)
    assert (ledger.trained, dict(ledger.failed), ledger.dead, ledger.closes) == (2, {"dead_letter": 1}, 1, True)
    assert size_of(client, keys) == (0, 0)


@pytest.mark.parametrize("crash", [False, True])
async def test_corrupt_close_still_closes_its_group(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys, crash: bool
) -> None:
    members = await put_group(TrajectoryProducer(aclient, keys), 7, size=2)
    corrupt(client, keys, 2)
    consumer = started(client, keys)
    group = take(consumer)
    if crash:
        consumer = started(client, keys)
        group = take(consumer)
    assert ids(group) == [m.id for m in members]
    assert (group.close.ordinal, group.close.task_id) == (7, members[0].task_id)
    consumer.commit(ids(group), outcomes={})
    ledger = read_ledger(client, keys)
    assert (ledger.trained, ledger.dead, ledger.committed_groups, ledger.closes) == (2, 1, 1, True)
    assert size_of(client, keys) == (0, 0)


async def test_entry_nobody_of_ours_wrote_is_a_dead_letter(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    client.xadd(keys.traj, {"hello": "world"})
    client.xadd(keys.traj, {"t": "x", "g": "y", "k": "t", "n": "-5", "b": "junk"})
    client.xadd(keys.traj, {"t": "big", "g": "y", "k": "t", "n": "5", "s": "1"})
    await put_group(TrajectoryProducer(aclient, keys), 0)
    consumer = started(client, keys)
    assert len(take(consumer).trajectories) == 2
    assert client.xlen(keys.dead) == 3
    assert consumer.counters.dead == 3
    consumer.commit([make_trajectory(0, i).id for i in range(2)], outcomes={})
    assert client.xlen(keys.traj) == 0
    assert not read_ledger(client, keys).failed


async def test_trajectory_under_another_label_is_a_dead_letter(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    client.xadd(keys.traj, {"t": "a", "g": "g", "k": "t", "n": "1", "b": encode(make_trajectory())})
    assert started(client, keys).next_group(0.1) is None
    assert b"labelled 'a'" in client.xrange(keys.dead)[0][1][b"reason"]


async def test_blamed_trajectories_become_dead_letters_at_the_third_delivery(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    producer = TrajectoryProducer(aclient, keys)
    poison = await put_group(producer, 0)
    healthy = await put_group(producer, 1)
    for _ in range(2):
        consumer = started(client, keys)
        assert ids(take(consumer)) == [p.id for p in poison]
        consumer.blame([p.id for p in poison])
    consumer = started(client, keys)
    group = take(consumer)
    assert group.trajectories == ()
    assert dict(group.close.failed) == {p.id: "dead_letter" for p in poison}
    consumer.commit([group.close.id], outcomes={})
    assert ids(take(consumer)) == [h.id for h in healthy]
    ledger = read_ledger(client, keys)
    assert (dict(ledger.failed), ledger.dead, ledger.closes) == ({"dead_letter": 2}, 2, True)


async def test_blame_counts_only_the_members_it_names_unless_it_names_the_group(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    members = await put_group(TrajectoryProducer(aclient, keys), 0)
    for _ in range(2):
        consumer = started(client, keys)
        take(consumer)
        consumer.blame([members[0].id, "unknown"])
    group = take(started(client, keys))
    assert ids(group) == [m.id for m in members[1:]]
    assert dict(group.close.failed) == {members[0].id: "dead_letter"}
    for _ in range(2):
        consumer = started(client, keys)
        consumer.blame([take(consumer).close.id])
    assert take(started(client, keys)).trajectories == ()


async def test_kills_and_failed_reads_are_never_held_against_an_entry(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys
) -> None:
    members = await put_group(TrajectoryProducer(aclient, keys), 0)
    for _ in range(10):
        assert ids(take(started(client, keys))) == [m.id for m in members]


# -- lost replies -----------------------------------------------------------------------------------------------------


async def test_lost_reply_to_a_put_leaves_one_entry(client: redis.Redis, url: str, keys: Keys) -> None:
    with LossyProxy(url) as proxy:
        aclient = connect_async(proxy.url)
        waits: list[str] = []
        producer = TrajectoryProducer(aclient, keys, on_wait=lambda reason, _: waits.append(reason))
        await producer.put_trajectory(make_trajectory(0, 9))
        for index in range(5):
            proxy.lose_replies(1, marker=b"EVALSHA")
            await producer.put_trajectory(make_trajectory(0, index))
        members = [make_trajectory(0, i) for i in (*range(5), 9)]
        proxy.lose_replies(1, marker=b"EVALSHA")
        await producer.close_group(make_close(members))
        await aclient.aclose()
        assert proxy.lost == 6
        assert "stream:down" in waits
    assert client.xlen(keys.traj) == 7
    assert read_ledger(client, keys).submitted == 6


@pytest.mark.parametrize("count", [1, 3])
async def test_lost_reply_to_a_read_strands_nothing(
    client: redis.Redis, aclient: redis.asyncio.Redis, url: str, keys: Keys, count: int
) -> None:
    producer = TrajectoryProducer(aclient, keys)
    with LossyProxy(url) as proxy:
        lossy = connect(proxy.url)
        consumer = started(lossy, keys)
        seen: list[str] = []
        for ordinal in range(6):
            await put_group(producer, ordinal)
            proxy.lose_replies(count, marker=b"XREADGROUP")
            assert consumer.next_group(0.0) is None
            group = take(consumer)
            seen += ids(group)
            consumer.commit(ids(group), outcomes={})
        assert proxy.lost >= 6
        assert consumer.counters.recovered >= 6
        lossy.close()
    assert len(seen) == len(set(seen)) == 12
    assert size_of(client, keys) == (0, 0)


async def test_lost_reply_to_a_commit_counts_once(
    client: redis.Redis, aclient: redis.asyncio.Redis, url: str, keys: Keys
) -> None:
    await put_group(TrajectoryProducer(aclient, keys), 0)
    with LossyProxy(url) as proxy:
        lossy = connect(proxy.url)
        consumer = started(lossy, keys)
        group = take(consumer)
        consumer.commit([], outcomes={})
        client.script_load(consumer._commit.script)
        proxy.lose_replies(2, marker=b"EVALSHA")
        consumer.commit(ids(group), outcomes={})
        lossy.close()
        assert proxy.lost == 2
    ledger = read_ledger(client, keys)
    assert (ledger.trained, ledger.closes) == (2, True)
    assert size_of(client, keys) == (0, 0)


async def test_interrupted_blocked_read_loses_nothing(
    client: redis.Redis, aclient: redis.asyncio.Redis, url: str, keys: Keys
) -> None:
    """The reader's connections are cut again and again while it blocks, as on cancellation or a network fault."""
    producer = TrajectoryProducer(aclient, keys)
    with LossyProxy(url) as proxy:
        lossy = connect(proxy.url)
        consumer = started(lossy, keys)
        stop = asyncio.Event()

        async def cut() -> None:
            pause_s, arrived = FIRST_PAUSE_S, 0
            while not stop.is_set():
                await asyncio.sleep(pause_s)
                proxy.cut_all()
                # Longer and longer until a group arrives: a slow machine, too, gets a read through between two cuts.
                pause_s, arrived = (2 * pause_s, arrived) if len(seen) == arrived else (FIRST_PAUSE_S, len(seen))

        seen: list[str] = []
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(cut())
            for ordinal in range(15):
                reader = asyncio.create_task(asyncio.to_thread(consumer.next_group, DEADLINE_S))
                await asyncio.sleep(0.01)
                await put_group(producer, ordinal)
                group = await reader
                assert group is not None
                seen += ids(group)
            stop.set()
        lossy.close()
    assert seen == [t.id for ordinal in range(15) for t in group_of(ordinal)]


# -- policy, progress, fingerprint ------------------------------------------------------------------------------------


async def test_policy_record_round_trip(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    assert await read_policy(aclient, keys) is None
    consumer = started(client, keys)
    record = PolicyRecord(run_epoch=1, version=3, kind="lora", path="/ckpt/step 3", digest="sha256:abc")
    consumer.publish_policy(record, consumed_groups=7)
    assert await read_policy(aclient, keys) == read_policy_sync(client, keys) == record
    progress = await read_progress(aclient, keys)
    assert (progress.run_epoch, progress.version, progress.consumed_groups) == (1, 3, 7)
    with pytest.raises(ValueError, match="run_epoch=5"):
        consumer.publish_policy(replace(record, run_epoch=5), consumed_groups=7)


async def test_progress_counts_groups_for_admission(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    producer = TrajectoryProducer(aclient, keys)
    for ordinal in range(3):
        await put_group(producer, ordinal)
    consumer = started(client, keys)
    first, second = take(consumer), take(consumer)
    consumer.report_progress(consumer.committed_groups + 2)
    progress = await read_progress(aclient, keys)
    assert (progress.closed_groups, progress.consumed_groups, progress.committed_groups) == (3, 2, 0)
    assert progress.items == 9
    consumer.commit(ids(first), outcomes={})
    # The learner is killed before it commits the second: what it decided is undone, and the counter says so.
    successor = started(client, keys)
    progress = await read_progress(aclient, keys)
    assert (progress.run_epoch, progress.consumed_groups, progress.committed_groups) == (2, 1, 1)
    assert successor.committed_groups == 1
    assert ids(take(successor)) == ids(second)


async def test_fingerprints_are_compared_field_by_field(client: redis.Redis, keys: Keys) -> None:
    check_fingerprint(client, keys, "serve", {"model": "a", "template": "t", "tools": "x"})
    check_fingerprint(client, keys, "serve", {"model": "a", "template": "t", "tools": "x"})
    check_fingerprint(client, keys, "learn", {"model": "a", "optimizer": "adam"})
    with pytest.raises(ConfigError) as caught:
        check_fingerprint(client, keys, "learn", {"model": "b", "template": "t2", "tools": "x"})
    text = str(caught.value)
    assert "2 of 3 settings" in text
    assert "model: serve has 'a', learn has 'b'" in text
    assert "template: serve has 't', learn has 't2'" in text
    assert "tools" not in text
    clear_fingerprint(client, keys)
    check_fingerprint(client, keys, "learn", {"model": "b"})


async def test_ledger_closes_over_every_kind_of_end(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    producer = TrajectoryProducer(aclient, keys)
    done = group_of(0, 3)
    for member in done:
        await producer.put_trajectory(member)
    await producer.close_group(make_close(done, size=6, failed={"f1": "deadline", "f2": "deadline"}))
    await put_group(producer, 1)
    await producer.put_trajectory(make_trajectory(2, 0))
    consumer = started(client, keys)
    consumer.commit(ids(take(consumer)), outcomes={done[0].id: "stale", done[1].id: "filtered"})
    ledger = read_ledger(client, keys)
    assert (ledger.submitted, ledger.trained, ledger.stale, ledger.filtered) == (9, 1, 1, 1)
    assert dict(ledger.failed) == {"deadline": 2, "unreported": 1}
    assert (ledger.waiting, ledger.open_groups, ledger.closed_groups, ledger.committed_groups) == (3, 1, 2, 1)
    assert json.loads(ledger.to_json())["closes"] is True
    assert "The ledger closes." in ledger.table()
    client.xtrim(keys.traj, 1, approximate=False)
    broken = read_ledger(client, keys)
    assert (broken.closes, broken.difference) == (False, 3)
    assert "DOES NOT CLOSE" in broken.table()


async def test_streams_of_two_runs_do_not_touch(client: redis.Redis, aclient: redis.asyncio.Redis) -> None:
    for run in ("a", "b"):
        await put_group(TrajectoryProducer(aclient, Keys(run)), 0)
    consumer = started(client, Keys("a"))
    consumer.commit(ids(take(consumer)), outcomes={})
    assert read_ledger(client, Keys("a")).waiting == 0
    assert read_ledger(client, Keys("b")).waiting == 2


async def test_versions_and_masks_survive_the_trip(client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys) -> None:
    await put_group(TrajectoryProducer(aclient, keys), 0, size=1, version=12)
    [t] = take(started(client, keys))
    np.testing.assert_array_equal(t.segments[0].versions, [-1] * 8 + [12] * 16)
    assert (t.min_version, t.max_version, t.num_sampled) == (12, 12, 16)


@pytest.mark.parametrize("shape", ["{o}/{s}/{a}", "t/{o}/{s}/{a}", "a/b+again3/{o}/{s}/{a}", "t/{o}+again2/{s}/{a}", "t/{o}/0{s}/{a}",
                                   "t/0{o}/{s}/{a}", "t/{o}+again02/{s}/{a}", "{s}", "t/{o}/{s}/{a}+replay1-0"])  # fmt: skip
async def test_scripts_and_readers_name_put_ids_alike(
    client: redis.Redis, aclient: redis.asyncio.Redis, keys: Keys, shape: str
) -> None:
    """Lua places an id, Python names it: for every shape of id, and at the edges of a bitmap."""
    producer, names = TrajectoryProducer(aclient, keys), set[str]()
    for ordinal, sample, attempt in ((0, 0, 0), (1023, 7, 1), (1024, 8, 0), (99_999, 17, 3)):
        name = shape.format(o=ordinal, s=sample, a=attempt)
        t = replace(make_trajectory(ordinal, 0), id=name, group_id=name.rpartition("/")[0].rpartition("/")[0] or "g")
        await producer.put_trajectory(t)
        names.add(name)
        for _ in range(2):
            assert read_books(client, keys).put == {put_name(n) for n in names}
            assert await producer.present([name, name + "0"]) == {name}
            await producer.close_group(replace(make_close([t]), group_id=t.group_id))
            await producer.put_trajectory(t)
    assert read_ledger(client, keys).submitted == 4
