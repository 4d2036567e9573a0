"""Processes and the server are killed under load; then the books are checked."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from agentrl.errors import StreamError
from agentrl.stream.consumer import TrajectoryConsumer
from agentrl.stream.keys import Keys
from agentrl.stream.ledger import read_ledger
from agentrl.stream.policy import read_progress
from agentrl.stream.producer import TrajectoryProducer
from agentrl.stream.server import EmbeddedServer, connect, connect_async
from agentrl.testing.stream_doubles import make_close, make_trajectory

KEYS = Keys("crash")


def kill(server: EmbeddedServer) -> None:
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while server.is_running():
        time.sleep(0.01)


def restart_at_random(server: EmbeddedServer, stop: threading.Event, acked: list[str], kills: list[int], seed: int) -> None:
    """Counted in what was acknowledged, not in seconds: a slow machine gets as far between two kills as a fast one."""
    rng = random.Random(seed)
    while True:
        due = len(acked) + rng.randrange(20, 120)
        while len(acked) < due:
            if stop.wait(0.005):
                return
        time.sleep(rng.uniform(0.0, 0.05))
        kill(server)
        kills.append(len(acked))
        time.sleep(rng.uniform(0.0, 0.1))
        server.ensure()


async def produce(url: str, ordinals: range, acked: list[str], **options: int) -> None:
    client = connect_async(url, role="serve")
    producer = TrajectoryProducer(client, KEYS, **options)
    for ordinal in ordinals:
        members = [make_trajectory(ordinal, i, num_tokens=600) for i in range(3)]
        for member in members:
            await producer.put_trajectory(member)
            acked.append(member.id)
        await producer.close_group(make_close(members))
    await client.aclose()


def test_server_killed_under_load_loses_nothing_it_acknowledged(server: EmbeddedServer) -> None:
    acked: list[str] = []

    async def load() -> None:
        async with asyncio.TaskGroup() as tasks:
            jobs = [
                tasks.create_task(produce(server.url, range(first, 100_000, 4), acked, max_items=10**6)) for first in range(4)
            ]
            while len(acked) <= 50:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(kill, server)
            for job in jobs:
                job.cancel()

    asyncio.run(load())
    assert len(acked) > 50
    client = connect(server.ensure(), role="audit")
    stored = Counter(fields[b"t"].decode() for _, fields in client.xrange(KEYS.traj) if fields[b"k"] == b"t")
    client.close()
    assert set(acked) <= set(stored)
    assert set(stored.values()) == {1}


def test_run_survives_server_kills_on_both_sides(server: EmbeddedServer) -> None:
    """Producers, a learner that commits behind checkpoints, admission's reader: none sees more than a pause."""
    num_groups = 300
    acked: list[str] = []
    trained: Counter[str] = Counter()
    kills: list[int] = []
    stop = threading.Event()
    killer = threading.Thread(target=restart_at_random, args=(server, stop, acked, kills, 0))

    def learn() -> None:
        client = connect(server.url, role="learn")
        consumer = TrajectoryConsumer(client, KEYS)
        consumer.acquire()
        held: list[str] = []
        while sum(trained.values()) < 3 * num_groups:
            group = consumer.next_group(0.2)
            if group is not None:
                assert len(group.trajectories) == 3
                trained.update(t.id for t in group)
                held += [t.id for t in group]
            if len(held) >= 24 or group is None:
                consumer.commit(held, outcomes={})
                consumer.report_progress(consumer.committed_groups)
                held = []
        consumer.commit(held, outcomes={})
        client.close()

    async def run() -> None:
        client = connect_async(server.url, role="admit")
        async with asyncio.TaskGroup() as tasks:
            learner = tasks.create_task(asyncio.to_thread(learn))
            for first in range(4):
                tasks.create_task(produce(server.url, range(first, num_groups, 4), acked, max_items=20))
            seen = 0
            while not learner.done():
                closed = (await read_progress(client, KEYS)).closed_groups
                assert closed >= seen
                seen = closed
                await asyncio.sleep(0.02)
        await client.aclose()

    killer.start()
    try:
        asyncio.run(run())
    finally:
        stop.set()
        killer.join()
    assert len(kills) >= 5
    assert set(trained) == set(acked)
    assert set(trained.values()) == {1}
    client = connect(server.ensure(), role="audit")
    ledger = read_ledger(client, KEYS)
    assert (ledger.submitted, ledger.trained, ledger.waiting, ledger.bytes) == (3 * num_groups, 3 * num_groups, 0, 0)
    assert ledger.closes
    client.close()


LEARNER = """
import json, os, sys, time
from pathlib import Path
from agentrl.stream.consumer import TrajectoryConsumer
from agentrl.stream.keys import Keys
from agentrl.stream.server import connect

url, checkpoint, target, is_doomed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "doomed"
state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"weights": [], "consumed": {}}
consumer = TrajectoryConsumer(connect(url, role="learn"), Keys("crash"), trained=state["consumed"])
consumer.acquire()
while len(state["weights"]) < target:
    groups = [g for g in (consumer.next_group(0.5) for _ in range(4)) if g is not None]
    for group in groups:
        for t in group:
            state["weights"].append(t.id)          # "training": the effect of an entry on the weights
            state["consumed"][t.id] = "trained"
        time.sleep(0.005)
        state["consumed"][group.close.id] = ""
    fresh = checkpoint.with_suffix(".tmp")
    with fresh.open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(checkpoint)
    time.sleep(0.01)                               # between checkpoint and commit
    consumer.commit([t.id for g in groups for t in g], outcomes={})
while is_doomed: time.sleep(1)                       # whoever kills it may be late
while consumer.next_group(0.2) is not None: pass   # what the checkpoint already had is committed on the way
"""


def test_killed_learner_neither_loses_nor_repeats_a_trajectory(server: EmbeddedServer, tmp_path: Path) -> None:
    """Learner processes die by SIGKILL at random points, also between checkpoint and commit; one checkpoint file."""
    rng = random.Random(3)
    num_groups = 60
    acked: list[str] = []
    asyncio.run(produce(server.url, range(num_groups), acked, max_items=10**6))
    checkpoint = tmp_path / "checkpoint.json"
    command = [sys.executable, "-c", LEARNER, server.url, str(checkpoint), str(3 * num_groups)]
    client = connect(server.url, role="audit")
    for _ in range(5):
        epoch = int(client.get(KEYS.fence) or 0)
        with subprocess.Popen([*command, "doomed"]) as learner:
            while learner.poll() is None and int(client.get(KEYS.fence) or 0) == epoch:
                time.sleep(0.005)
            with suppress(subprocess.TimeoutExpired):
                learner.wait(rng.uniform(0.0, 0.12))
            learner.kill()
            assert learner.wait() == -signal.SIGKILL
    subprocess.run([*command, "last"], check=True, timeout=120)
    state = json.loads(checkpoint.read_text())
    assert Counter(state["weights"]) == Counter(acked)
    ledger = read_ledger(client, KEYS)
    assert (ledger.submitted, ledger.trained, ledger.waiting, ledger.bytes) == (180, 180, 0, 0)
    assert ledger.closes
    client.close()


def test_learner_killed_between_checkpoint_and_commit_does_not_train_again(server: EmbeddedServer) -> None:
    asyncio.run(produce(server.url, range(4), []))
    client = connect(server.url, role="learn")
    first = TrajectoryConsumer(client, KEYS)
    first.acquire()
    saved = [group for _ in range(2) if (group := first.next_group(60.0)) is not None]
    consumed = [t.id for group in saved for t in group]
    second = TrajectoryConsumer(client, KEYS, trained=consumed)
    second.acquire()
    rest = [group for _ in range(2) if (group := second.next_group(60.0)) is not None]
    assert [g.close.ordinal for g in rest] == [2, 3]
    assert second.next_group(0.05) is None
    assert (second.counters.skipped_groups, second.committed_groups) == (2, 2)
    second.commit([g.close.id for g in rest], outcomes={t.id: "filtered" for t in rest[0]})
    ledger = read_ledger(client, KEYS)
    assert (ledger.trained, ledger.filtered, ledger.closes, ledger.bytes) == (9, 3, True, 0)
    client.close()


def test_checkpoint_that_names_outcomes_and_closes_is_believed(server: EmbeddedServer) -> None:
    asyncio.run(produce(server.url, range(2), []))
    client = connect(server.url, role="learn")
    names = [make_trajectory(0, i).id for i in range(3)]
    outcomes = {names[0]: "trained", names[1]: "stale", names[2]: "filtered"}
    consumer = TrajectoryConsumer(client, KEYS, trained=outcomes)
    consumer.acquire()
    group = consumer.next_group(60.0)
    assert group is not None
    assert group.close.ordinal == 1
    successor = TrajectoryConsumer(client, KEYS, trained=[group.close.id])
    successor.acquire()
    assert successor.next_group(0.1) is None
    ledger = read_ledger(client, KEYS)
    assert (ledger.trained, ledger.stale, ledger.filtered, ledger.closes) == (1, 1, 4, True)
    client.close()


def test_group_consumed_in_part_returns_the_rest_and_is_counted(server: EmbeddedServer) -> None:
    asyncio.run(produce(server.url, range(1), []))
    client = connect(server.url, role="learn")
    names = [make_trajectory(0, i).id for i in range(3)]
    consumer = TrajectoryConsumer(client, KEYS, trained={names[1]})
    consumer.acquire()
    group = consumer.next_group(60.0)
    assert group is not None
    assert [t.id for t in group] == [names[0], names[2]]
    assert consumer.counters.partial_groups == 1
    consumer.commit([t.id for t in group], outcomes=dict.fromkeys((names[0], names[2]), "filtered"))
    ledger = read_ledger(client, KEYS)
    assert (ledger.trained, ledger.filtered, ledger.closes, ledger.bytes) == (1, 2, True, 0)
    client.close()


def test_outage_longer_than_the_timeout_returns_none_and_shows(server: EmbeddedServer) -> None:
    client = connect(server.url, role="learn")
    consumer = TrajectoryConsumer(client, KEYS, patience_s=0.3)
    consumer.acquire()
    kill(server)
    began = time.monotonic()
    assert consumer.next_group(0.5) is None
    assert 0.5 <= time.monotonic() - began < 60.0
    assert consumer.outage_s > 0
    with pytest.raises(StreamError, match="reporting progress: Redis was unreachable"):
        consumer.report_progress(1)
    server.ensure()
    while consumer.outage_s:  # until a read has found the server again
        assert consumer.next_group(0.2) is None
    client.close()


def test_producer_with_limited_patience_reports_the_outage(server: EmbeddedServer) -> None:
    async def run() -> None:
        client = connect_async(server.url)
        producer = TrajectoryProducer(client, KEYS, patience_s=0.2)
        kill(server)
        with pytest.raises(StreamError, match=r"unreachable for \d+\.\d s"):
            await producer.put_trajectory(make_trajectory())
        await client.aclose()

    asyncio.run(run())


def test_server_that_lost_its_data_is_an_error_and_not_an_empty_stream(server: EmbeddedServer) -> None:
    client = connect(server.url, role="learn")
    consumer = TrajectoryConsumer(client, KEYS)
    consumer.acquire()
    client.flushall()
    with pytest.raises(StreamError, match="lost its data"):
        consumer.next_group(0.2)
    with pytest.raises(StreamError, match="lost its data"):
        consumer.report_progress(1)
    client.close()


def test_producer_restarted_in_the_middle_of_a_group_completes_it(server: EmbeddedServer) -> None:
    members = [make_trajectory(0, i) for i in range(4)]

    async def first_life() -> None:
        client = connect_async(server.url)
        producer = TrajectoryProducer(client, KEYS)
        await producer.put_trajectory(members[0])
        await producer.put_trajectory(members[2])
        await client.aclose()

    async def second_life() -> set[str]:
        client = connect_async(server.url)
        producer = TrajectoryProducer(client, KEYS)
        assert await producer.next_open_ordinal() == 0
        have = await producer.present([m.id for m in members])
        for member in members:
            if member.id not in have:
                await producer.put_trajectory(member)
        await producer.close_group(make_close(members))
        assert await producer.next_open_ordinal() == 1
        await client.aclose()
        return have

    asyncio.run(first_life())
    assert asyncio.run(second_life()) == {members[0].id, members[2].id}
    client = connect(server.url)
    consumer = TrajectoryConsumer(client, KEYS)
    consumer.acquire()
    group = consumer.next_group(60.0)
    assert group is not None
    assert [t.id for t in group] == [m.id for m in members]
    client.close()
