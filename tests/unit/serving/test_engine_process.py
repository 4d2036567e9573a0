"""EngineFleet with fake servers as real processes: start, death, restart, end; and what is left of a killed parent."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from agentrl.errors import StalledError
from agentrl.process import start_time
from agentrl.serving.engine_process import (
    AttachedServers,
    EmbeddedEngineSpec,
    EngineFleet,
    ProcessEntry,
    SGLangEngineSpec,
    kill_stale,
)
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.testing.fake_sglang import FakeSGLang, pseudo_tokens
from agentrl.testing.waits import until
from agentrl.types import SamplingParams

FAKE = (sys.executable, "-m", "agentrl.testing.fake_sglang")


@dataclass(frozen=True, slots=True)
class FailingSpec:
    """An engine that exits at once."""

    capacity: float = 1.0
    api_key: str | None = None
    probes_health: bool = False
    env: Mapping[str, str] = field(default_factory=dict[str, str])

    def command(self, host: str, port: int) -> list[str]:
        return [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]

    def environment(self) -> Mapping[str, str]:
        return self.env


class SilentSpec(FailingSpec):
    """An engine that never answers."""

    def command(self, host: str, port: int) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(600)"]


def fake_spec() -> SGLangEngineSpec:
    return SGLangEngineSpec(model_path="fake", command_prefix=FAKE)


@asynccontextmanager
async def running(
    specs: list[Any], tmp_path: Path, **options: Any
) -> AsyncGenerator[tuple[AsyncLLMServerManager, EngineFleet, list[list[ProcessEntry]]], None]:
    changes: list[list[ProcessEntry]] = []
    async with AsyncLLMServerManager() as manager, asyncio.TaskGroup() as group:
        fleet = EngineFleet(
            specs, manager=manager, log_dir=tmp_path, backoff_s=0.05, omp_threads=1, on_change=changes.append, **options
        )
        task = group.create_task(fleet.run())
        try:
            yield manager, fleet, changes
        finally:
            task.cancel()


@pytest.mark.asyncio
async def test_engines_start_serve_and_end_with_the_fleet(tmp_path: Path) -> None:
    async with running([fake_spec(), fake_spec()], tmp_path) as (manager, fleet, changes):
        await until(lambda: len(manager.urls) == 2)
        generation = await manager.generate(
            [1, 2], SamplingParams(max_new_tokens=5), trajectory_id="t", group_id="g", deadline=120
        )
        assert generation.ids == pseudo_tokens([1, 2], 5)
        entries = fleet.processes()
        assert sorted(entry["url"] for entry in entries) == sorted(manager.urls)
        assert changes[-1] == entries
        pids = [entry["pid"] for entry in entries]
        assert all(pid is not None and os.getpgid(pid) == pid for pid in pids)
    assert not any(psutil.pid_exists(pid) for pid in pids if pid is not None)
    assert changes[-1] == []
    assert (tmp_path / "engine-0.log").exists()


@pytest.mark.asyncio
async def test_the_port_of_an_engine_that_is_still_loading_is_given_to_nobody_else(tmp_path: Path) -> None:
    async with running([SilentSpec(), SilentSpec()], tmp_path) as (_, fleet, _):
        await until(lambda: len(fleet.processes()) == 2)
        ports = [urlsplit(entry["url"]).port for entry in fleet.processes()]
        assert len(set(ports)) == 2
        for port in ports:
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
    for port in ports:
        with socket.socket() as other:
            other.bind(("127.0.0.1", port))


@pytest.mark.asyncio
async def test_a_killed_engine_returns_on_its_port_and_unverified(tmp_path: Path) -> None:
    async with running([fake_spec()], tmp_path) as (manager, fleet, _):
        await until(lambda: len(manager.urls) == 1)
        before = fleet.processes()[0]
        manager.set_verified(before["url"], "e1-v0")
        manager.require_version("e1-v0")
        assert before["pid"] is not None
        os.kill(before["pid"], signal.SIGKILL)
        await until(lambda: manager.stats()[0].state == "quarantined")
        incarnation = manager.incarnation(before["url"])
        await until(lambda: manager.incarnation(before["url"]) > incarnation)
        after = fleet.processes()[0]
        assert after["url"] == before["url"]
        assert after["pid"] != before["pid"]
        assert manager.verified_label(after["url"]) is None


async def failure_of(spec: Any, tmp_path: Path, **options: Any) -> BaseException:
    """How a fleet of one engine ends."""
    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012  # the fleet fails while we wait
        async with running([spec], tmp_path, **options):
            await asyncio.Event().wait()
    failure: BaseException = caught.value
    while isinstance(failure, ExceptionGroup):
        (failure,) = failure.exceptions
    return failure


@pytest.mark.asyncio
async def test_an_engine_that_keeps_dying_ends_the_fleet_with_its_log(tmp_path: Path) -> None:
    stalled = await failure_of(FailingSpec(), tmp_path, max_deaths_per_minute=2)
    assert isinstance(stalled, StalledError)
    assert "died 3 times" in str(stalled)
    assert "exited with code 3" in str(stalled)
    assert "no such model" in str(stalled)


@pytest.mark.asyncio
async def test_an_engine_that_never_answers_is_ended_at_the_limit(tmp_path: Path) -> None:
    assert "start_timeout_s=0.3" in str(await failure_of(SilentSpec(), tmp_path, max_deaths_per_minute=0, start_timeout_s=0.3))


@pytest.mark.asyncio
async def test_engines_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import asyncio, sys
        from agentrl.serving.engine_process import EngineFleet, SGLangEngineSpec
        from agentrl.serving.server_manager import AsyncLLMServerManager
        spec = SGLangEngineSpec(model_path="fake", command_prefix={FAKE!r})
        async def main():
            async with AsyncLLMServerManager() as manager:
                def changed(entries):
                    if manager.urls and entries:
                        print(entries[0]["pid"], flush=True)
                await EngineFleet([spec], manager=manager, log_dir={str(tmp_path)!r}, on_change=changed).run()
        asyncio.run(main())
    """)
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        async with asyncio.timeout(250):
            pid = int(await parent.stdout.readline())
        assert psutil.pid_exists(pid)
    finally:
        parent.kill()
        await parent.wait()
    await until(lambda: is_gone(pid))


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_stale_engines_are_ended_only_when_pid_and_start_time_match() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        started = start_time(process.pid)
        other = {"role": "engine", "pid": process.pid, "url": "", "started": started - 100, "log": ""}
        not_engine = {"role": "learner", "pid": process.pid, "url": "", "started": started, "log": ""}
        attached = {"role": "engine", "pid": None, "url": "http://x", "started": None, "log": ""}
        assert kill_stale([other, not_engine, attached]) == []
        assert process.poll() is None
        assert kill_stale([{**other, "started": started}]) == [process.pid]
    finally:
        process.kill()
        process.wait()


@pytest.mark.asyncio
async def test_attached_servers_are_added_and_removed_but_never_ended() -> None:
    async with FakeSGLang() as server, AsyncLLMServerManager() as manager:
        attached = AttachedServers([server.url], manager=manager, capacity=2.0)
        task = asyncio.ensure_future(attached.run())
        await until(lambda: manager.urls == [server.url])
        assert manager.stats()[0].capacity == 2.0
        assert attached.processes()[0]["pid"] is None
        task.cancel()
        await asyncio.wait([task])
        assert manager.urls == []
        assert await manager_can_reach(server)


async def manager_can_reach(server: FakeSGLang) -> bool:
    async with AsyncLLMServerManager() as manager:
        manager.add_server(server.url)
        return await manager.client(server.url).is_ready(timeout_s=5)


def test_commands_carry_what_the_engines_need() -> None:
    embedded = EmbeddedEngineSpec(model_path="/m", python="py", max_running_requests=8, dtype="float32").command("127.0.0.1", 5)
    assert embedded[:4] == ["py", "-m", "agentrl.serving.embedded_engine", "--model-path"]
    for option, value in (("--port", "5"), ("--parent-pid", str(os.getpid())), ("--max-running-requests", "8")):
        assert embedded[embedded.index(option) + 1] == value
    assert "--incremental-streaming-output" in embedded
    assert "--device" not in embedded
    sglang = SGLangEngineSpec(model_path="/m", extra_args=["--tp", "2"], env={"A": "b"})
    assert sglang.command("127.0.0.1", 5)[-2:] == ["--tp", "2"]
    assert sglang.environment() == {"SGLANG_FORCE_STREAM_INTERVAL": "1", "A": "b"}
