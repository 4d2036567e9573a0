"""The fork servers behind the service: which tier this machine can give, keeping the servers alive, placing runs."""

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from agentrl.errors import SandboxError
from agentrl.sandbox.fork_server import ForkServer, ForkServerConfig
from agentrl.sandbox.inside import cgroup
from agentrl.sandbox.job import Job, Limits, Outcome, Tier
from agentrl.sandbox.kernel import Kernel
from agentrl.sandbox.languages import directories, installed
from agentrl.sandbox.self_test import SelfTest, run_self_test
from agentrl.sandbox.unsafe import UnsafeRunner

log = logging.getLogger(__name__)

TierChoice = Literal["auto", "zygote", "zygote-landlock", "bubblewrap", "nsjail", "unsafe"]

MAX_RESTARTS_PER_MINUTE = 5
RESPAWN_WAIT_S = 10.0
# Above the ranges that distributions and container managers hand out; lower where a container maps only 65536 ids.
_UID_BASE = 1_900_000_000
UIDS_PER_SERVICE = 4096
_ONE_ROOT = (
    "read-only root with libraries, programs and the interpreter only; private bounded tmpfs; /proc shows only the run",
    "no capabilities, no_new_privs, seccomp filter, rlimits, memory watchdog over the whole process tree",
    "every process of a run dies with it",
)

GUARANTEES: dict[Tier, tuple[str, ...]] = {
    "zygote": (
        "own user or uid, mount, pid, network, ipc and uts namespaces; a nested pid, mount and ipc namespace per run",
        *_ONE_ROOT,
    ),
    "zygote-landlock": (
        "Landlock: reads only libraries and the interpreter, writes nothing",
        "seccomp: no sockets, no processes, signals and limits only for itself",
        "no capabilities, no_new_privs, rlimits",
        "degraded: no private /proc, pid namespace or writable files; files and bash are refused",
    ),
    "bubblewrap": ("bubblewrap, per run: own user or uid, mount, pid, network, ipc and uts namespaces", *_ONE_ROOT),
    "nsjail": ("nsjail, per run: own user or uid, mount, pid, network, ipc and uts namespaces", *_ONE_ROOT),
    "unsafe": ("none: code runs as a plain subprocess of this user",),
}


@dataclass(slots=True, kw_only=True)
class Pool:
    """Fork servers of one tier. Use ``async with pool.running()``.

    Attributes:
        workers: fork servers; one per core is plenty.
        tier: "auto" takes the first that isolates on this machine.
        allow_unsafe: fall back to a plain subprocess instead of refusing.
        python: the interpreter inside; its prefix is shown read-only to the code.
    """

    workers: int = 1
    tier: TierChoice = "auto"
    allow_unsafe: bool = False
    preload: Sequence[str] = ()
    python: str = sys.executable
    active_tier: Tier | None = None
    self_test: SelfTest = field(default_factory=SelfTest)
    refused: dict[str, str] = field(default_factory=dict[str, str])
    """Tiers that were tried and why they were not taken."""
    restarts: int = 0
    cgroup_path: str | None = None
    """Where runs get cgroups of their own; found at the start, None where cgroup v2 is not writable."""
    _servers: list[ForkServer] = field(default_factory=list[ForkServer])
    _unsafe: UnsafeRunner | None = None
    _restart_times: deque[float] = field(default_factory=deque[float])
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Start, and stop everything that was started at the end.

        Raises:
            SandboxError: no tier isolates here and ``allow_unsafe`` is not set.
        """
        try:
            await self._start()
            async with asyncio.TaskGroup() as group:
                keepers = [group.create_task(self._keep_alive(index)) for index in range(len(self._servers))]
                try:
                    yield
                finally:
                    for keeper in keepers:
                        keeper.cancel()
        finally:
            for server in self._servers:
                await server.stop()
            self.active_tier = None

    @property
    def healthy(self) -> bool:
        """Could a run be placed now?"""
        return self._unsafe is not None or any(not server.died.is_set() for server in self._servers)

    @property
    def is_degraded(self) -> bool:
        """Whether something of the full isolation is missing."""
        return self.active_tier not in ("zygote", "bubblewrap", "nsjail")

    @property
    def landlock_abi(self) -> int | None:
        return self._servers[0].hello.get("landlock_abi") if self._servers else None

    @property
    def preload_missing(self) -> list[str]:
        return self._servers[0].hello.get("missing", []) if self._servers else []

    def unsupported(self, job: Job) -> str | None:
        """Why this tier cannot honour the job, instead of ignoring a part of it."""
        if self.active_tier == "zygote-landlock":
            if job.command:
                return f"{job.language} needs processes, which the tier zygote-landlock denies; supported: python"
            if job.files or job.fetch:
                return "files and fetch_files need a private file system, which the tier zygote-landlock does not have"
        return None

    async def run(self, job: Job, slot: int) -> Outcome:
        """Run one job on the least loaded fork server.

        Raises:
            SandboxError: the service, not the code, failed; the job may be repeated.
        """
        if self._unsafe is not None:
            log.warning("unsafe run language=%s code_bytes=%d", job.language, len(job.code))
            return await self._unsafe.run(job, slot)
        server = await self._alive()
        return await server.run(job, slot)

    async def open_session(self, limits: Limits, slot: int) -> Kernel:
        """Start a session on the least loaded fork server; it lives and dies with it.

        Raises:
            SandboxError: the service failed, or runs without isolation, where there are no sessions.
        """
        if self._unsafe is not None:
            raise SandboxError("there are no sessions without isolation (tier unsafe)")
        server = await self._alive()
        return await server.open_session(limits, slot)

    async def _alive(self) -> ForkServer:
        try:
            async with asyncio.timeout(RESPAWN_WAIT_S), self._changed:
                while True:
                    alive = [server for server in self._servers if not server.died.is_set()]
                    if alive:
                        return min(alive, key=lambda server: server.load)
                    await self._changed.wait()
        except TimeoutError as error:
            raise SandboxError(f"no fork server is alive; {self.restarts} restarts so far, see the service's log") from error

    async def _start(self) -> None:
        if self.tier == "unsafe":
            if not self.allow_unsafe:
                raise SandboxError("tier unsafe isolates nothing and needs allow_unsafe=True (--allow-unsafe)")
            self._start_unsafe()
            return
        tiers: tuple[Tier, ...] = ("zygote", "zygote-landlock") if self.tier == "auto" else (self.tier,)
        for tier in tiers:
            try:
                await self._start_tier(tier)
            except SandboxError as error:
                self.refused[tier] = str(error)
                log.warning("sandbox tier refused tier=%s reason=%s", tier, error)
                await self._stop_servers()
            else:
                log.info("sandbox tier=%s workers=%d restarts=0", tier, self.workers)
                return
        if self.allow_unsafe:
            self._start_unsafe()
            return
        reasons = "; ".join(f"{tier}: {reason}" for tier, reason in self.refused.items())
        raise SandboxError(
            f"this machine cannot isolate code ({reasons}). Allow user namespaces or Landlock (kernel 5.13 or newer), "
            "run the service in a VM, or accept running foreign code unprotected with allow_unsafe=True (--allow-unsafe)."
        )

    def _start_unsafe(self) -> None:
        log.warning("sandbox tier=unsafe: code runs UNPROTECTED as uid %d", os.geteuid())
        self._unsafe = UnsafeRunner(self.python)
        self.active_tier = "unsafe"

    async def _start_tier(self, tier: Tier) -> None:
        self.cgroup_path = cgroup.find_writable() if tier != "zygote-landlock" else None
        config = ForkServerConfig(
            tier=tier,
            python=self.python,
            preload=tuple(self.preload),
            uid_base=_uid_base(),
            readable=directories(list(installed().values())),
            cgroup_path=self.cgroup_path,
        )
        self._servers = [ForkServer(config) for _ in range(self.workers)]
        for server in self._servers:
            await server.start()
        self.self_test = await run_self_test(lambda job: self._servers[0].run(job, 0))
        if not self.self_test.passed:
            raise SandboxError("the self-test reached the host: " + "; ".join(self.self_test.breaches))
        for name in self.preload_missing:
            log.warning("preload skipped module=%s: not installed for %s", name, self.python)
        self.active_tier = tier

    async def _stop_servers(self) -> None:
        for server in self._servers:
            await server.stop()
        self._servers = []

    async def _keep_alive(self, index: int) -> None:
        """Replace one fork server whenever it dies; give up placing runs on it while it dies too often."""
        while True:
            await self._servers[index].died.wait()
            await self._servers[index].stop()
            await self._pause_if_dying_often()
            server = ForkServer(self._servers[index].config)
            self.restarts += 1
            log.warning("fork server died, restarting index=%d restarts=%d", index, self.restarts)
            try:
                await server.start()
            except SandboxError as error:
                log.error("fork server restart failed index=%d reason=%s", index, error)
                server.died.set()
            self._servers[index] = server
            async with self._changed:
                self._changed.notify_all()

    async def _pause_if_dying_often(self) -> None:
        now = time.monotonic()
        self._restart_times.append(now)
        while self._restart_times and self._restart_times[0] < now - 60:
            self._restart_times.popleft()
        excess = len(self._restart_times) - MAX_RESTARTS_PER_MINUTE
        if excess > 0:
            delay_s = min(60.0, 2.0**excess)
            log.error("fork servers die often restarts_last_minute=%d pause_s=%g", len(self._restart_times), delay_s)
            await asyncio.sleep(delay_s)

    def describe(self) -> dict[str, Any]:
        """What isolates the code here, for people and for ``/v1/isolation``."""
        tier = self.active_tier
        return {
            "tier": tier,
            "degraded": self.is_degraded,
            "limits_by": "cgroup v2, rlimits and a watchdog" if self.cgroup_path else "rlimits and a watchdog",
            "guarantees": list(GUARANTEES[tier]) if tier else [],
            "refused_tiers": self.refused,
            "self_test": {
                "passed": self.self_test.passed,
                "attacks": self.self_test.attacks,
                "breaches": list(self.self_test.breaches),
            },
            "kernel": os.uname().release,
            "machine": os.uname().machine,
            "root": os.geteuid() == 0,
            "landlock_abi": self.landlock_abi,
        }


def _uid_base() -> int:
    """The first of this service's run uids: unlikely to belong to anyone, and mapped in our own user namespace."""
    wanted = _UID_BASE + (os.getpid() % 20_000) * UIDS_PER_SERVICE
    ranges: list[tuple[int, int]] = []
    with contextlib.suppress(OSError, ValueError), open("/proc/self/uid_map") as file:
        ranges = [(int(line.split()[0]), int(line.split()[2])) for line in file]
    if not ranges or any(first <= wanted and wanted + UIDS_PER_SERVICE <= first + count for first, count in ranges):
        return wanted
    first, count = max(ranges, key=lambda item: item[1])
    return max(first + count - UIDS_PER_SERVICE - 2, first + 1)
