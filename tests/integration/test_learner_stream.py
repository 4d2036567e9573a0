"""The learner on a real stream: reading ahead loses and repeats nothing, and poison leaves after it was blamed."""

import asyncio
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import redis
import torch.distributed as dist

RIG = Path(__file__).parents[1] / "unit" / "learner"
sys.path.insert(0, str(RIG))

from learner_rig import make_learner, random_group, tiny_dir  # noqa: E402

from agentrl.assembly.learn import _Source  # noqa: E402
from agentrl.assembly.watchdog import LearnStatus  # noqa: E402
from agentrl.errors import DataError  # noqa: E402
from agentrl.learner.batching import BatchBuilder  # noqa: E402
from agentrl.learner.checkpoint import Checkpoints, read_jsonl  # noqa: E402
from agentrl.learner.distributed import Team, start_team, stop_team  # noqa: E402
from agentrl.learner.loop import run_learning  # noqa: E402
from agentrl.learner.weight_publisher import WeightPublisher  # noqa: E402
from agentrl.rollout.admission import admit  # noqa: E402
from agentrl.stream.consumer import TrajectoryConsumer  # noqa: E402
from agentrl.stream.keys import Keys  # noqa: E402
from agentrl.stream.ledger import read_ledger  # noqa: E402
from agentrl.stream.policy import read_progress_sync  # noqa: E402
from agentrl.stream.producer import TrajectoryProducer  # noqa: E402
from agentrl.stream.server import EmbeddedServer, connect, connect_async, ensure  # noqa: E402
from agentrl.telemetry.run_dir import RunDir  # noqa: E402
from agentrl.types import TrajectoryGroup  # noqa: E402

KEYS = Keys("test")


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    is_ours = not dist.is_initialized()  # the unit tests' team may live in this process
    yield start_team(device="cpu")
    if is_ours:
        stop_team()


@pytest.fixture
def url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="arl-") as directory:
        yield ensure(directory)
        EmbeddedServer(directory).stop()


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    client = connect(url, role="learn")
    yield client
    client.close()


def put(url: str, groups: Sequence[TrajectoryGroup]) -> None:
    async def go() -> None:
        client = connect_async(url, role="serve")
        producer = TrajectoryProducer(client, KEYS)
        for group in groups:
            for trajectory in group:
                await producer.put_trajectory(trajectory)
            await producer.close_group(group.close)
        await client.aclose()

    asyncio.run(go())


def learn(
    client: redis.Redis, team: Team, directory: Path, *, num_steps: int, max_staleness: int = 100, async_save: bool = False
) -> None:
    source = _Source(TrajectoryConsumer(client, KEYS), LearnStatus(RunDir(directory).create()))
    run_learning(
        source, BatchBuilder(groups_per_step=2, max_staleness=max_staleness), make_learner(tiny_dir(directory), team, lr=1e-3),
        Checkpoints(directory / "checkpoints"), WeightPublisher(directory / "weights"), source.announce,
        num_steps=num_steps, save_every=2, stall_timeout_s=250, prefetch=True, async_save=async_save,
    )  # fmt: skip


def trained(directory: Path) -> list[str]:
    return [entry["id"] for entry in read_jsonl(directory / "checkpoints" / "latest" / "trained_ids.jsonl")]


def test_reading_ahead_trains_everything_once_and_leaves_the_rest_to_the_next_start(
    url: str, client: redis.Redis, team: Team, tmp_path: Path
) -> None:
    groups = [random_group(g, size=2) for g in range(14)]
    put(url, groups)
    learn(client, team, tmp_path, num_steps=4)  # reads some of the other six groups ahead
    assert len(trained(tmp_path)) == 16
    learn(client, team, tmp_path, num_steps=7)
    assert sorted(trained(tmp_path)) == sorted(t.id for g in groups for t in g)
    ledger = read_ledger(client, KEYS)
    assert (ledger.trained, ledger.closes) == (28, True)
    assert client.xlen(KEYS.traj) == 0


def test_poison_stops_the_learner_twice_and_takes_no_other_group_with_it(
    url: str, client: redis.Redis, team: Team, tmp_path: Path
) -> None:
    groups = [random_group(g, size=3) for g in range(5)]
    poison = groups[1].trajectories[0]
    poison.segments[0].ids[0] = 100_000
    put(url, groups)
    for _ in range(2):
        with pytest.raises(DataError, match=poison.id):
            learn(client, team, tmp_path, num_steps=2)
    learn(client, team, tmp_path, num_steps=2)
    assert {t.id for g in (groups[0], groups[2], groups[3]) for t in g} <= set(trained(tmp_path))
    assert poison.id not in trained(tmp_path)
    ledger = read_ledger(client, KEYS)
    assert ledger.failed["dead_letter"] == ledger.dead == 1  # the group's other members were not held to account
    assert ledger.closes


class AdmittedProducer(threading.Thread):
    """Puts one group after the other, each when admission lets it, sampled by the policy that is announced then.

    Args:
        late: ordinals of groups sampled by version 0 whatever was announced, as by a server that missed an update.
    """

    def __init__(self, url: str, *, num_groups: int, late: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self._url, self._num_groups, self._late = url, num_groups, late
        self.versions: dict[int, int] = {}
        self.stopping = threading.Event()

    def run(self) -> None:
        with connect(self._url, role="serve") as client:
            made = 0
            while made < self._num_groups and not self.stopping.wait(0.01):
                progress = read_progress_sync(client, KEYS)
                counts = {"open_groups": 0, "closed_groups": progress.closed_groups, "consumed_groups": progress.consumed_groups}
                if not admit(**counts, groups_per_step=2, max_staleness=0, pipeline_depth=0):
                    continue
                self.versions[made] = 0 if made in self._late else progress.version
                put(self._url, [random_group(made, size=2, version=self.versions[made])])
                made += 1


@pytest.mark.parametrize("async_save", [False, True])
def test_reading_ahead_and_strict_admission_never_wait_for_each_other(
    url: str, client: redis.Redis, team: Team, tmp_path: Path, async_save: bool
) -> None:
    producer = AdmittedProducer(url, num_groups=10, late=(3, 6))
    producer.start()
    try:
        learn(client, team, tmp_path, num_steps=4, max_staleness=0, async_save=async_save)
    finally:
        producer.stopping.set()
        producer.join(250)
    fresh = [g for g in range(10) if g not in (3, 6)]
    assert [producer.versions[g] for g in fresh] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(trained(tmp_path)) == sorted(i for g in fresh for i in random_group(g, size=2).close.members)
    ledger = read_ledger(client, KEYS)
    assert (ledger.trained, ledger.stale, ledger.closes) == (16, 4, True)
    assert client.xlen(KEYS.traj) == 0
