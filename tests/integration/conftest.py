"""The cold-started quickstart model, made once per checkout: about a minute and a half of real supervised training."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis
import redis.asyncio
import yaml

from agentrl.stream.server import EmbeddedServer, connect, connect_async, ensure
from agentrl.telemetry.run_dir import RunDir

ROOT = Path(__file__).parents[2]
SFT_STEPS = 700
MAKE_COLD_START = """
import sys
from pathlib import Path
from agentrl.data.conversations import read_conversations
from agentrl.learner.sft import run_sft
from agentrl.plugins import load_object
out, steps = Path(sys.argv[1]), int(sys.argv[2])
load_object("envs.arithmetic:prepare")(out / "data", seed=0, sft=True, sft_rows=steps * 16, val=200)
load_object("envs.arithmetic_model:make_scratch_model")(out / "scratch", seed=0)
run_sft(out / "scratch", list(read_conversations(out / "data" / "sft.jsonl")), out_dir=out / "sft", steps=steps, shuffle=False)
"""


@pytest.fixture(scope="session")
def cold_start(request: pytest.FixtureRequest) -> Path:
    """Folder with ``data/`` and ``sft/``; kept in pytest's cache, keyed by what it is made from."""
    sources = [*sorted((ROOT / "envs").glob("arithmetic*.py")), ROOT / "agentrl/learner/sft.py"]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + str(SFT_STEPS).encode()).hexdigest()[:12]
    cache = Path(request.config.cache.mkdir("cold-start"))  # pyright: ignore[reportOptionalMemberAccess]
    folder = cache / key
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of xdist's workers makes it, the other waits
        if not (folder / "done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            subprocess.run(
                [sys.executable, "-c", MAKE_COLD_START, str(folder), str(SFT_STEPS)], check=True, cwd=ROOT, env=environment()
            )
            (folder / "done").touch()
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def quickstart_config(tmp_path: Path, cold_start: Path) -> Callable[..., Path]:
    """Write a run's YAML from the shipped quickstart, with sections updated; returns its path."""

    def write(**sections: dict[str, Any]) -> Path:
        values = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
        values["run"] = {"name": "test", "dir": str(tmp_path / "runs"), "seed": 0}
        values["model"] = {"path": str(cold_start / "sft")}
        values["data"] = {"train": str(cold_start / "data/train.parquet"), "val": str(cold_start / "data/val.parquet")}
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


class RunProcess:
    """An ``agentrl run`` that a test started, and what its directory says."""

    def __init__(self, config: Path, *overrides: str) -> None:
        values = yaml.safe_load(config.read_text())
        self.directory = RunDir(Path(values["run"]["dir"]) / values["run"]["name"])
        self._output = config.with_suffix(".out").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agentrl", "run", "-c", str(config), *overrides],
            cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output,
        )  # fmt: skip

    def step(self) -> int:
        return max((int(m["step"]) for m in self.directory.read_metrics()), default=0)

    def wait_for(self, what: Callable[[], bool], *, seconds: float, name: str) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, f"the run ended with {self.process.returncode}:\n{self.logs()}"
            assert time.monotonic() < end, f"no {name} within {seconds} s:\n{self.logs()}"
            time.sleep(0.1)

    def pid_of(self, role: str) -> int | None:
        return next((int(e["pid"]) for e in self.directory.processes() if e["role"] == role), None)

    def kill(self, role: str) -> int:
        """SIGKILL to a part once it lives; returns the pid it had."""
        killed: list[int] = []

        def is_killed() -> bool:
            if (pid := self.pid_of(role)) is not None:
                with contextlib.suppress(ProcessLookupError):  # gone since it was looked up: its successor, then
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            return bool(killed)

        self.wait_for(is_killed, seconds=240, name=f"live {role}")
        return killed[0]

    def finish(self, *, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end within {seconds} s:\n{self.logs()}") from None

    def logs(self) -> str:
        files = [Path(self._output.name), *sorted(self.directory.logs.glob("*.log"))]
        return "\n".join(
            f"--- {f.name}\n" + "\n".join(f.read_text(errors="replace").splitlines()[-25:]) for f in files if f.is_file()
        )

    def close(self) -> None:
        """End what is left, by pid: the supervisor drains its children on SIGTERM."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(200)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._output.close()


@pytest.fixture
def start_run() -> Any:
    started: list[RunProcess] = []

    def start(config: Path, *overrides: str) -> RunProcess:
        started.append(RunProcess(config, *overrides))
        return started[-1]

    yield start
    for run in started:
        run.close()


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    """A real stream server of one test, which may kill it."""
    with tempfile.TemporaryDirectory(prefix="arl-") as directory:
        server = EmbeddedServer(directory)
        server.ensure()
        yield server
        server.stop()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A real stream server of the test file's own."""
    with tempfile.TemporaryDirectory(prefix="arl-") as directory:
        yield ensure(directory)
        EmbeddedServer(directory).stop()


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    """The learner's client of the stream server, emptied."""
    client = connect(url, role="learn")
    client.flushall()
    yield client
    client.close()


@pytest_asyncio.fixture
async def aclient(url: str, client: redis.Redis) -> AsyncIterator[redis.asyncio.Redis]:
    """The producers' client of the same server."""
    aclient = connect_async(url, role="serve")
    yield aclient
    await aclient.aclose()
