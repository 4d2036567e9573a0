"""Faults of the machine and the network: half-open connections, full disks, set clocks, torn checkpoints, damaged entries.

Nothing that was acknowledged is lost, nothing is trained twice, and everything goes on when the fault is over. What can be shown on
parts in seconds runs in ``make test``; the same faults against a whole run under way are in ``test_fault_runs.py``.
"""

import asyncio
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import redis
import torch.distributed as dist
from chaos_rig import small_disk

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "learner"))

from learner_rig import make_learner, random_group, tiny_dir  # noqa: E402

from agentrl.errors import CheckpointError, StreamError  # noqa: E402
from agentrl.learner.batching import BatchBuilder  # noqa: E402
from agentrl.learner.checkpoint import STATE_FILE, Checkpoints  # noqa: E402
from agentrl.learner.distributed import Team, start_team, stop_team  # noqa: E402
from agentrl.learner.loop import run_learning  # noqa: E402
from agentrl.learner.weight_publisher import WeightPublisher  # noqa: E402
from agentrl.stream.connection import connect, connect_async  # noqa: E402
from agentrl.stream.consumer import TrajectoryConsumer, full_age_s  # noqa: E402
from agentrl.stream.keys import Keys  # noqa: E402
from agentrl.stream.ledger import read_books, read_ledger  # noqa: E402
from agentrl.stream.producer import TrajectoryProducer  # noqa: E402
from agentrl.stream.server import EmbeddedServer  # noqa: E402
from agentrl.telemetry.run_dir import RunDir, read_jsonl  # noqa: E402
from agentrl.testing.stream_doubles import LossyProxy, make_close, make_trajectory  # noqa: E402
from agentrl.types import PolicyRecord, TrajectoryGroup  # noqa: E402

pytestmark = pytest.mark.chaos
KEYS = Keys("faults")
DAY_S = 86_400.0
PATIENCE_S = 120.0
"""For what takes a moment on a quiet machine."""


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with tempfile.TemporaryDirectory(prefix="arl-") as directory:
        server = EmbeddedServer(directory)
        server.ensure()
        yield server
        server.stop()


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    with connect(server.url, role="learn") as client:
        client.flushall()
        yield client


# -- half-open connections --------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_producer_gives_up_a_connection_that_fell_silent_and_its_entry_is_there_once(
    server: EmbeddedServer, client: redis.Redis
) -> None:
    with LossyProxy(server.url) as proxy:
        aclient = connect_async(proxy.url, role="serve", socket_timeout_s=0.5)
        waits: list[str] = []
        producer = TrajectoryProducer(aclient, KEYS, on_wait=lambda reason, _: waits.append(reason))
        members = [make_trajectory(0, i) for i in range(3)]
        await producer.put_trajectory(members[0])
        proxy.go_silent()
        putting = asyncio.create_task(producer.put_trajectory(members[1]))
        while "stream:down" not in waits:
            await asyncio.sleep(0.02)
        assert not putting.done(), "it waits, and drops nothing"
        proxy.heal()
        await asyncio.wait_for(putting, PATIENCE_S)
        proxy.lose_replies(1)  # and the same when the entry did arrive and only its answer did not
        await asyncio.wait_for(producer.put_trajectory(members[2]), PATIENCE_S)
        await producer.close_group(make_close(members))
        await aclient.aclose()
    assert client.xlen(KEYS.traj) == 4
    book = read_ledger(client, KEYS)
    assert (book.submitted, book.waiting, book.closes) == (3, 3, True)


def put_groups(url: str, ordinals: Sequence[int]) -> None:
    async def go() -> None:
        aclient = connect_async(url, role="serve")
        producer = TrajectoryProducer(aclient, KEYS)
        for ordinal in ordinals:
            members = [make_trajectory(ordinal, i) for i in range(2)]
            for member in members:
                await producer.put_trajectory(member)
            await producer.close_group(make_close(members))
        await aclient.aclose()

    asyncio.run(go())


def test_a_learner_whose_connection_fell_silent_finds_what_was_delivered_into_the_silence(
    server: EmbeddedServer, client: redis.Redis
) -> None:
    put_groups(server.url, range(2))
    with LossyProxy(server.url) as proxy, connect(proxy.url, role="learn", socket_timeout_s=0.5) as half_open:
        consumer = TrajectoryConsumer(half_open, KEYS)
        consumer.acquire()
        groups = [consumer.next_group(PATIENCE_S)]
        proxy.go_silent()
        put_groups(server.url, range(2, 4))
        groups.append(consumer.next_group(0.1))  # read ahead, or nothing
        assert consumer.next_group(1.5) is None
        assert consumer.outage_s > 0
        committing = threading.Thread(target=consumer.commit, args=([groups[0].close.id],), kwargs={"outcomes": {}})
        committing.start()
        time.sleep(0.7)
        assert committing.is_alive(), "a commit waits as well"
        proxy.heal()
        committing.join(PATIENCE_S)
        assert not committing.is_alive()
        while len([g for g in groups if g is not None]) < 4:
            group = consumer.next_group(PATIENCE_S)
            assert group is not None
            groups.append(group)
        found = [g for g in groups if g is not None]
        consumer.commit([g.close.id for g in found], outcomes={})
    assert sorted(g.close.ordinal for g in found) == [0, 1, 2, 3]
    book = read_ledger(client, KEYS)
    assert (book.trained, book.waiting, book.closes) == (8, 0, True)


@pytest.mark.asyncio
async def test_bytes_that_change_on_the_way_are_dead_letters_and_the_rest_is_trained(
    server: EmbeddedServer, client: redis.Redis
) -> None:
    from agentrl.stream.codec import MAGIC

    with LossyProxy(server.url) as proxy:
        aclient = connect_async(proxy.url, role="serve")
        producer = TrajectoryProducer(aclient, KEYS)
        members = [make_trajectory(0, i, num_tokens=200) for i in range(4)]
        await producer.put_trajectory(members[0])
        proxy.corrupt(2, marker=MAGIC)
        for member in members[1:]:
            await producer.put_trajectory(member)
        await producer.close_group(make_close(members))
        await aclient.aclose()
        assert proxy.corrupted == 2
    consumer = TrajectoryConsumer(client, KEYS)
    consumer.acquire()
    group = await asyncio.to_thread(consumer.next_group, PATIENCE_S)
    assert group is not None
    assert [t.id for t in group] == [members[0].id, members[3].id]
    assert dict(group.close.failed) == {members[1].id: "dead_letter", members[2].id: "dead_letter"}
    consumer.commit([group.close.id], outcomes={})
    book = read_ledger(client, KEYS)
    assert (book.trained, dict(book.failed), book.dead, book.closes) == (2, {"dead_letter": 2}, 2, True)


# -- clocks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets this process's date, days from the truth. Nobody else's: as on one of several machines."""
    real = time.time

    def set_to(days: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + days * DAY_S)

    return set_to


@pytest.mark.asyncio
async def test_a_machine_with_the_wrong_date_forgets_and_repeats_nothing(
    server: EmbeddedServer, client: redis.Redis, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentrl.stream.consumer._FULL_RECENT_S", PATIENCE_S)
    aclient = connect_async(server.url, role="serve")
    producer = TrajectoryProducer(aclient, KEYS)
    members = [make_trajectory(0, i) for i in range(4)]
    for member, days in zip(members, (0, 40, -20_000, 400), strict=True):
        clock(days)
        await producer.put_trajectory(member)
        await producer.put_trajectory(member)
        assert await producer.present([m.id for m in members]) == {m.id for m in members[: members.index(member) + 1]}
    await producer.close_group(make_close(members))
    clock(-3)
    await producer.close_group(make_close(members))
    assert client.xlen(KEYS.traj) == 5
    consumer = TrajectoryConsumer(client, KEYS)
    consumer.acquire()
    group = consumer.next_group(PATIENCE_S)
    assert group is not None
    assert len(group.trajectories) == 4
    small = TrajectoryProducer(aclient, KEYS, max_items=1)
    await small.put_trajectory(make_trajectory(1, 0))
    waiting = asyncio.create_task(small.put_trajectory(make_trajectory(1, 1)))
    while full_age_s(client, KEYS) is None:
        await asyncio.sleep(0.01)
    for days in (0, 50, -50):
        clock(days)
        assert consumer.producers_blocked(), "the server says when it was full, whatever either side's date"
    waiting.cancel()
    await asyncio.wait([waiting])
    await aclient.aclose()


def test_a_process_with_the_wrong_date_is_neither_silent_nor_another(tmp_path: Path, clock: Callable[[float], None]) -> None:
    run = RunDir(tmp_path).create()
    run.register("serve")
    for days in (0, 40, -40):
        clock(days)
        run.write_status("serve", {"wait": ""})
        clock(-days)
        assert run.status_age_s("serve") < PATIENCE_S
        assert [e["role"] for e in run.processes()] == ["serve"]
    os.utime(run.status / "serve.json", (time.time() - 300, os.stat(run.status / "serve.json").st_mtime - 300))
    assert run.status_age_s("serve") > 250
    assert run.status_age_s("learn") == 0.0


# -- torn checkpoints -------------------------------------------------------------------------------------------------


class Source:
    """The stream as the loop sees it, and a moment at which the process dies."""

    def __init__(self, client: redis.Redis) -> None:
        self.consumer = TrajectoryConsumer(client, KEYS)
        self.dies_at_commit: int | None = None

    def acquire(self) -> int:
        return self.consumer.acquire()

    def next_group(self, timeout_s: float) -> TrajectoryGroup | None:
        return self.consumer.next_group(timeout_s)

    def commit(self, groups: Sequence[TrajectoryGroup], outcomes: Mapping[str, str]) -> None:
        if self.dies_at_commit == 0:
            raise KeyboardInterrupt("dies here")
        if self.dies_at_commit is not None:
            self.dies_at_commit -= 1
        wanted = {i for g in groups for i in (*g.close.members, *g.close.failed)}
        self.consumer.commit([g.close.id for g in groups], outcomes={i: o for i, o in outcomes.items() if i in wanted})

    def report_progress(self, consumed_groups: int) -> None:
        self.consumer.report_progress(consumed_groups)

    def announce(self, record: PolicyRecord, consumed_groups: int) -> None:
        self.consumer.publish_policy(record, consumed_groups=consumed_groups)


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    is_ours = not dist.is_initialized()  # the learner's tests may have started one in this process
    yield start_team(device="cpu")
    if is_ours:
        stop_team()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dir(tmp_path_factory.mktemp("model"))


def learn(
    client: redis.Redis, team: Team, model: Path, directory: Path, *, steps: int, dies_at_commit: int | None = None
) -> None:
    source = Source(client)
    source.dies_at_commit = dies_at_commit
    run_learning(
        source, BatchBuilder(groups_per_step=1, max_staleness=100, zero_spread="keep"), make_learner(model, team, lr=1e-3),
        Checkpoints(directory / "checkpoints", keep=2), WeightPublisher(directory / "weights"), source.announce,
        num_steps=steps, save_every=1, stall_timeout_s=PATIENCE_S,
    )  # fmt: skip


def put_learnable(url: str, count: int) -> list[str]:
    groups = [random_group(g, size=2) for g in range(count)]

    async def go() -> None:
        aclient = connect_async(url, role="serve")
        producer = TrajectoryProducer(aclient, KEYS)
        for group in groups:
            for t in group:
                await producer.put_trajectory(t)
            await producer.close_group(group.close)
        await aclient.aclose()

    asyncio.run(go())
    return [t.id for g in groups for t in g]


def trained(directory: Path) -> list[str]:
    return [e["id"] for e in read_jsonl(directory / "checkpoints/latest/trained_ids.jsonl")]


def tear(path: Path, how: str) -> None:
    """What a disk may leave of a file."""
    if how == "gone":
        path.unlink()
        return
    data = path.read_bytes()
    path.unlink()  # checkpoints may share a file by a hard link
    path.write_bytes(b"" if how == "empty" else data[: len(data) // 2])


@pytest.mark.parametrize(
    ("pattern", "how"), [("*.safetensors", "half"), (STATE_FILE, "half"), ("trained_ids.jsonl", "empty"), ("dcp/*", "gone")]
)
def test_a_checkpoint_torn_before_its_groups_were_acknowledged_is_passed_over_and_they_are_trained_again(
    server: EmbeddedServer, client: redis.Redis, team: Team, model: Path, tmp_path: Path, pattern: str, how: str
) -> None:
    ids = put_learnable(server.url, 4)
    with pytest.raises(KeyboardInterrupt):  # with the third checkpoint written, and its groups not acknowledged
        learn(client, team, model, tmp_path, steps=4, dies_at_commit=2)
    newest = (tmp_path / "checkpoints/latest").resolve()
    assert newest.name == "step_3"
    for path in sorted(newest.glob(pattern)):
        tear(path, how)
    learn(client, team, model, tmp_path, steps=4)
    assert trained(tmp_path) == ids, "each once, in order, the torn step again"
    books = read_books(client, KEYS)
    assert (books.ledger.trained, books.ledger.waiting, books.ledger.closes, books.on_stream) == (8, 0, True, ())


def test_a_checkpoint_torn_after_it_was_acknowledged_costs_its_step_and_the_audit_can_say_so(
    server: EmbeddedServer, client: redis.Redis, team: Team, model: Path, tmp_path: Path
) -> None:
    ids = put_learnable(server.url, 4)
    learn(client, team, model, tmp_path, steps=3)
    newest = (tmp_path / "checkpoints/latest").resolve()
    for path in newest.glob("*.safetensors"):
        tear(path, "half")
    learn(client, team, model, tmp_path, steps=3)  # the step before, and then the fourth group as step 3
    assert trained(tmp_path) == ids[:4] + ids[6:], "the disk took what only that checkpoint held; nothing else, nothing twice"
    book = read_ledger(client, KEYS)
    assert (book.trained, book.waiting, book.closes) == (8, 0, True), "two more were acknowledged than the lineage holds"


# -- full disks -------------------------------------------------------------------------------------------------------


def fill(folder: Path) -> Path:
    """A file that takes all space that is left."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file:
        block = b"\0" * (1 << 16)
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]
    return path


def test_a_server_whose_disk_is_full_keeps_what_it_acknowledged_and_goes_on_with_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mib=24) as disk:
        server = EmbeddedServer(disk / "redis")
        url = server.ensure()
        try:
            put_groups(url, range(3))
            ballast = fill(disk)

            async def put_into_it() -> list[str]:
                aclient = connect_async(url, role="serve", socket_timeout_s=2)
                producer = TrajectoryProducer(aclient, KEYS, patience_s=1.0)
                acknowledged: list[str] = []

                async def go_on() -> None:
                    for index in range(10_000):
                        t = make_trajectory(3, index)
                        await producer.put_trajectory(t)
                        acknowledged.append(t.id)

                with pytest.raises(StreamError):  # refused, or its server is gone: never taken and lost
                    await go_on()
                await aclient.aclose()
                return acknowledged

            acknowledged = asyncio.run(put_into_it())
            ballast.unlink()
            server.ensure()
            with connect(url, role="learn") as client:
                books = read_books(client, KEYS)
                assert set(acknowledged) <= set(books.on_stream)
                assert len(books.on_stream) == len(set(books.on_stream))
                assert books.ledger.closes
                put_groups(url, range(4, 6))
                assert read_ledger(client, KEYS).closed_groups == 5
        finally:
            server.stop()


def test_a_checkpoint_that_finds_no_room_acknowledges_nothing_and_leaves_the_one_before(
    server: EmbeddedServer, client: redis.Redis, team: Team, model: Path, tmp_path: Path
) -> None:
    ids = put_learnable(server.url, 3)
    with small_disk(tmp_path / "disk", mib=8) as disk:
        learn(client, team, model, disk, steps=1)
        ballast = fill(disk)
        with pytest.raises(CheckpointError, match="could not be written under .*[Ss]pace"):
            learn(client, team, model, disk, steps=3)
        assert trained(disk) == ids[:2]
        book = read_ledger(client, KEYS)
        assert (book.trained, book.waiting, book.closes) == (2, 4, True)
        ballast.unlink()
        learn(client, team, model, disk, steps=3)
        assert trained(disk) == ids
        assert not list((disk / "checkpoints").glob(".*.tmp"))
    assert read_ledger(client, KEYS).closes


def test_the_proxy_is_half_open_and_not_closed(server: EmbeddedServer) -> None:
    """The double itself: silence, no end of stream."""
    with LossyProxy(server.url) as proxy:
        port = int(proxy.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"PING\r\n")
            assert raw.recv(16) == b"+PONG\r\n"
            proxy.go_silent()
            raw.settimeout(0.3)
            raw.sendall(b"PING\r\n")
            with pytest.raises(TimeoutError):
                raw.recv(16)
            proxy.heal()
            with pytest.raises(TimeoutError):
                raw.recv(16)
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"PING\r\n")
            assert raw.recv(16) == b"+PONG\r\n"
