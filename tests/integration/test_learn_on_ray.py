"""``agentrl learn`` under Ray Train: two ranks on a local Ray, one of them killed."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RIG = ROOT / "tests" / "unit" / "learner"
sys.path.insert(0, str(RIG))

from learner_rig import random_group, tiny_dir  # noqa: E402

from agentrl.learner.checkpoint import read_jsonl  # noqa: E402
from agentrl.stream.keys import Keys  # noqa: E402
from agentrl.stream.ledger import read_ledger  # noqa: E402
from agentrl.stream.producer import TrajectoryProducer  # noqa: E402
from agentrl.stream.server import EmbeddedServer, connect, connect_async, ensure  # noqa: E402
from agentrl.telemetry.run_dir import RunDir  # noqa: E402
from agentrl.types import TrajectoryGroup  # noqa: E402


@pytest.fixture
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("redis")
    yield ensure(directory)
    EmbeddedServer(directory).stop()


def put(url: str, groups: Sequence[TrajectoryGroup]) -> None:
    async def go() -> None:
        client = connect_async(url, role="serve")
        producer = TrajectoryProducer(client, Keys("test"))
        for group in groups:
            for trajectory in group:
                await producer.put_trajectory(trajectory)
            await producer.close_group(group.close)
        await client.aclose()

    asyncio.run(go())


@pytest.mark.slow
def test_a_killed_rank_comes_back_with_the_others_nothing_is_trained_twice_and_sigterm_saves(url: str, tmp_path: Path) -> None:
    pytest.importorskip("ray.train.torch", reason="needs the extra `ray`")
    groups = [random_group(g, size=2) for g in range(14)]
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({
        "run": {"name": "test", "dir": str(tmp_path / "runs")}, "model": {"path": str(tiny_dir(tmp_path))},
        "queue": {"url": url}, "env": "envs.arithmetic:Arithmetic",
        "learn": {
            "launcher": "ray", "ranks": 2, "max_failures": 1, "steps": 100, "groups": 2, "save_every": 2, "max_staleness": 100,
            "lr": 1.0e-3, "rank_timeout_s": 600, "stall_timeout_s": 600,
        },
    }))  # fmt: skip
    directory = RunDir(tmp_path / "runs" / "test")
    put(url, groups[:6])
    # Somebody else's cluster was started on this machine, as two tests do side by side: it is not joined. A socket's path is short.
    ray_dir = Path(tempfile.mkdtemp(prefix="arl-"))
    (ray_dir / "ray").mkdir()
    (ray_dir / "ray/ray_current_cluster").write_text("127.0.0.1:1")
    output = (tmp_path / "learn.out").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "agentrl", "learn", "-c", str(config)], cwd=ROOT, stdout=output, stderr=output,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_TMPDIR": str(ray_dir)},
    )  # fmt: skip

    def said() -> str:
        return (tmp_path / "learn.out").read_text(errors="replace")[-6000:]

    def wait_for(what: Callable[[], bool], name: str) -> None:
        end = time.monotonic() + 400
        while not what():
            assert process.poll() is None, f"ended with {process.returncode} before {name}:\n{said()}"
            assert time.monotonic() < end, f"no {name}:\n{said()}"
            time.sleep(0.1)

    try:
        # Six groups are three steps: the ranks then wait for more, with step 3 behind their last checkpoint.
        wait_for(lambda: len(directory.read_metrics()) >= 3, "step 3")
        (victim,) = (e["pid"] for e in directory.processes() if e["role"] == "learn-rank-1")
        os.kill(victim, signal.SIGKILL)
        put(url, groups[6:])
        wait_for(lambda: len(directory.read_metrics()) >= 7, "step 7")  # behind the checkpoint of step 6
        process.terminate()
        assert process.wait(400) == 0, said()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(200)
        output.close()
        shutil.rmtree(ray_dir, ignore_errors=True)

    events = [e["event"] for e in read_jsonl(directory.events)]
    assert events.count("learn_ranks_started") == 2, said()
    assert [m["step"] for m in directory.read_metrics()] == [1, 2, 3, 4, 5, 6, 7]
    trained = [entry["id"] for entry in read_jsonl(directory.checkpoints / "latest" / "trained_ids.jsonl")]
    assert sorted(trained) == sorted(t.id for g in groups for t in g)
    assert directory.processes() == []
    with connect(url, role="audit") as client:
        ledger = read_ledger(client, Keys("test"))
        assert (ledger.trained, ledger.closes) == (28, True)
        assert client.xlen(Keys("test").traj) == 0


def test_without_ray_the_launcher_says_what_to_install(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({
        "run": {"name": "test", "dir": str(tmp_path / "runs")}, "model": {"path": "none"}, "learn": {"launcher": "ray"},
        "queue": {"url": "redis://127.0.0.1:1"},
    }))  # fmt: skip
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')\n")
    done = subprocess.run(
        [sys.executable, "-m", "agentrl", "learn", "-c", str(config)], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "learn.launcher=ray needs Ray, which is not installed here, or not all of it" in done.stderr
    assert "pip install 'agentrl[ray]'" in done.stderr
