"""A server that loses the end of its file, as one without ``appendfsync always`` does when it is killed: acknowledged work is
found to be missing, counted and done again, and nothing is trained twice."""

import asyncio
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

from rollout_kit import tiny_trajectory

from agentrl.rollout.worker import RolloutWorker
from agentrl.stream.consumer import TrajectoryConsumer
from agentrl.stream.keys import Keys
from agentrl.stream.ledger import read_ledger
from agentrl.stream.policy import read_progress, read_progress_sync
from agentrl.stream.producer import TrajectoryProducer
from agentrl.stream.server import EmbeddedServer, connect, connect_async
from agentrl.testing.stream_doubles import make_close, make_trajectory
from agentrl.types import Task, Trajectory

KEYS = Keys("tail")


def file_of(server: EmbeddedServer) -> Path:
    return next(Path(server.url.removeprefix("unix://")).parent.glob("appendonlydir/*.incr.aof"))


def lose_the_end(server: EmbeddedServer, size: int) -> None:
    """Kill the server, cut its file back to ``size`` bytes, and start it again."""
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while server.is_running():
        time.sleep(0.01)
    os.truncate(file_of(server), size)
    server.ensure()


def test_what_a_learner_has_read_or_committed_is_not_handed_out_again_when_it_comes_back(server: EmbeddedServer) -> None:
    async def put(ordinal: int) -> None:
        client = connect_async(server.url, role="serve")
        producer = TrajectoryProducer(client, KEYS)
        members = [make_trajectory(ordinal, i) for i in range(2)]
        for member in members:
            await producer.put_trajectory(member)
        await producer.close_group(make_close(members))
        await client.aclose()

    def read_until_returned(count: int) -> None:
        while consumer.counters.returned_groups < count:
            assert consumer.next_group(0.3) is None
        assert consumer.next_group(0.3) is None

    client = connect(server.url, role="learn")
    consumer = TrajectoryConsumer(client, KEYS)
    consumer.acquire()
    before = file_of(server).stat().st_size
    for ordinal in range(3):
        asyncio.run(put(ordinal))
    groups = [consumer.next_group(60.0) for _ in range(3)]
    ids = [[t.id for t in group] for group in groups if group is not None]
    committed_later = file_of(server).stat().st_size
    consumer.commit(ids[0], outcomes={ids[0][1]: "filtered"})

    lose_the_end(server, committed_later)  # the commit is lost: its group lies on the stream again
    read_until_returned(1)
    assert read_ledger(client, KEYS).committed_groups == 1

    lose_the_end(server, before)  # all is lost, what the learner holds as well; then it is sampled again
    for ordinal in range(3):
        asyncio.run(put(ordinal))
    read_until_returned(4)
    assert consumer.counters.returned_groups == 4
    consumer.commit([*ids[1], *ids[2]], outcomes={})
    book = read_ledger(client, KEYS)
    assert (book.trained, book.filtered, book.waiting, book.committed_groups, book.closes) == (5, 1, 0, 3, True)
    client.close()


def test_a_run_over_a_server_that_loses_the_end_of_its_file_trains_every_task_once(server: EmbeddedServer) -> None:
    num_groups, group_size = 150, 3
    trained: Counter[str] = Counter()
    stop = threading.Event()
    lost: list[int] = []
    worker: RolloutWorker

    def lose_at_random() -> None:
        rng, client = random.Random(0), connect(server.url, role="audit")
        while not stop.wait(rng.uniform(0.2, 0.5)):
            size, closed = file_of(server).stat().st_size, read_progress_sync(client, KEYS).closed_groups
            while read_progress_sync(client, KEYS).closed_groups == closed and not stop.is_set():
                time.sleep(0.005)
            if stop.wait(rng.uniform(0.0, 0.1)):
                break
            lost.append(file_of(server).stat().st_size - size)
            lose_the_end(server, size)
        client.close()

    def learn() -> None:
        client = connect(server.url, role="learn")
        consumer = TrajectoryConsumer(client, KEYS)
        consumer.acquire()
        ready.set()
        held: list[str] = []
        while (
            len(trained) < num_groups * group_size
            or held
            or consumer.committed_groups < num_groups
            or not worker.status()["groups_lost"]
        ):
            group = consumer.next_group(0.1)
            if group is not None:
                trained.update(t.id for t in group)
                held += [t.id for t in group]
            if len(held) >= 24 or group is None:
                consumer.commit(held, outcomes={})
                held = []
                consumer.report_progress(consumer.committed_groups)
            if lost and len(trained) >= num_groups * group_size:
                stop.set()  # what was lost until now is still to be found
        client.close()

    async def rollout(
        task: Task, trajectory_id: str, group_id: str, ordinal: int, sample: int, attempt: int
    ) -> tuple[Trajectory, None]:
        await asyncio.sleep(0.01)
        return tiny_trajectory(task, trajectory_id, ordinal, sample, attempt), None

    async def run() -> None:
        nonlocal worker
        client = connect_async(server.url, role="serve")
        worker = RolloutWorker(
            task_at=lambda ordinal: Task(id=f"t{ordinal}", prompt=[], data_source="d"),
            sink=TrajectoryProducer(client, KEYS), read_progress=lambda: read_progress(client, KEYS, patience_s=None),
            rollout=rollout, group_size=group_size, groups_per_step=4, max_staleness=2, pipeline_depth=1, in_flight=12,
        )  # fmt: skip
        learner = asyncio.create_task(asyncio.to_thread(learn))
        await asyncio.to_thread(ready.wait)
        loser.start()
        plays = asyncio.create_task(worker.run())
        await asyncio.wait([learner, plays], return_when=asyncio.FIRST_COMPLETED)
        await learner
        plays.cancel()
        await asyncio.wait([plays])
        await client.aclose()

    ready, loser = threading.Event(), threading.Thread(target=lose_at_random)
    try:
        asyncio.run(run())
    finally:
        stop.set()
        loser.join()
    assert max(lost) > 0
    assert worker.status()["groups_lost"] > 0
    assert set(trained.values()) == {1}
    client = connect(server.url, role="audit")
    book = read_ledger(client, KEYS)
    assert book.closes
    assert book.trained >= num_groups * group_size
    client.close()
