"""The learner on a real stream: reading ahead loses and repeats nothing, and poison leaves after it was blamed."""

import asyncio
import sys
import tempfile
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
from agentrl.stream.consumer import TrajectoryConsumer  # noqa: E402
from agentrl.stream.keys import Keys  # noqa: E402
from agentrl.stream.ledger import read_ledger  # noqa: E402
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


def learn(client: redis.Redis, team: Team, directory: Path, *, num_steps: int) -> None:
    source = _Source(TrajectoryConsumer(client, KEYS), LearnStatus(RunDir(directory)))
    run_learning(
        source, BatchBuilder(groups_per_step=2, max_staleness=100), make_learner(tiny_dir(directory), team, lr=1e-3),
        Checkpoints(directory / "checkpoints"), WeightPublisher(directory / "weights"), source.announce,
        num_steps=num_steps, save_every=2, stall_timeout_s=10, prefetch=True,
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
    assert ledger.failed["dead_letter"] == ledger.dead >= 1
    assert ledger.closes
