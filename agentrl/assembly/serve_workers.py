"""``serve.workers`` processes that play rollouts over one process's servers: started, watched, drained, and summed up.

A single asyncio process plays some thousand turns per second at most; beyond that the CPU of one core is the limit, not the
servers. Workers share nothing in memory: tasks are leased over the stream, servers are followed on the fleet board.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from agentrl.assembly.worker_status import fresh_statuses, summed
from agentrl.config import Config
from agentrl.errors import StalledError
from agentrl.process import die_with_parent
from agentrl.telemetry.run_dir import RunDir

log = logging.getLogger(__name__)

MAX_DEATHS_PER_MINUTE = 5
RESTART_AFTER_S = 0.5
KILL_AFTER_S = 5.0
"""Beyond the drain's own limit."""


class WorkerOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker process is told, over its standard input: it may hold secrets, so it is on no command line."""

    config: dict[str, Any]
    root: str
    """The run directory."""
    name: str
    """Also the name under which it leases tasks: a restarted worker takes its own back."""
    in_flight: int
    stream: str
    sandbox_url: str | None


def worker_name(index: int) -> str:
    return f"serve-{index}"


def orders(config: Config, directory: RunDir, *, stream: str, sandbox_url: str | None) -> list[WorkerOrder]:
    """One per worker; together they keep ``serve.in_flight`` rollouts running."""
    workers = config.serve.workers
    return [
        WorkerOrder(
            config=config.model_dump(mode="json"),
            root=str(directory.root.resolve()),
            name=worker_name(index),
            in_flight=-(-config.serve.in_flight // workers),
            stream=stream,
            sandbox_url=sandbox_url,
        )
        for index in range(workers)
    ]


class WorkerProcesses:
    """Plays rollouts in processes of this machine.

    Args:
        config: with ``serve.workers``.
        directory: of the run.
        stream: url of the stream's server.
        sandbox_url: of the run's sandbox, where there is one.
        fleet: what the servers do, for the status.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDir,
        *,
        stream: str,
        sandbox_url: str | None,
        fleet: Callable[[], dict[str, Any]],
    ) -> None:
        self._orders = orders(config, directory, stream=stream, sandbox_url=sandbox_url)
        self._directory, self._fleet = directory, fleet
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._draining = asyncio.Event()

    async def run(self) -> None:
        """Keep every worker running until cancelled.

        Raises:
            StalledError: one keeps dying.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for order in self._orders:
                    group.create_task(self._keep(order), name=order.name)
        finally:
            for process in self._processes.values():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    async def drain(self, *, limit_s: float) -> None:
        """Tell every worker to finish what it has open, and wait for them."""
        self._draining.set()
        processes = list(self._processes.values())
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s + KILL_AFTER_S):
                await asyncio.gather(*(process.wait() for process in processes))

    def status(self) -> dict[str, Any]:
        """The workers' statuses, summed, beside the servers'."""
        statuses = fresh_statuses(self._directory, [order.name for order in self._orders])
        return {**self._fleet(), **summed(statuses), "workers": len(self._processes), "draining": self._draining.is_set()}

    async def _keep(self, order: WorkerOrder) -> None:
        deaths: deque[float] = deque(maxlen=MAX_DEATHS_PER_MINUTE + 1)
        log_path = self._directory.logs / f"{order.name}.log"
        while not self._draining.is_set():
            code = await self._play(order, log_path)
            if self._draining.is_set():
                break
            self._directory.event("child_exited", role=order.name, code=code)
            deaths.append(time.monotonic())
            if len(deaths) == deaths.maxlen and deaths[-1] - deaths[0] < 60:
                raise StalledError(
                    f"{order.name} died {len(deaths)} times within a minute, the last time with code {code}. Read {log_path}"
                )
            log.warning("worker died name=%s code=%s restart_in_s=%g log=%s", order.name, code, RESTART_AFTER_S, log_path)
            await asyncio.sleep(RESTART_AFTER_S)
        await asyncio.Event().wait()

    async def _play(self, order: WorkerOrder, log_path: Path) -> int:
        with log_path.open("ab") as sink:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "agentrl.assembly.serve_worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                preexec_fn=die_with_parent,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._processes[order.name] = process
        self._directory.register(order.name, pid=process.pid)
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(msgspec.json.encode(order))
            process.stdin.write_eof()
        try:
            return await process.wait()
        finally:
            self._processes.pop(order.name, None)
            self._directory.deregister(order.name)
