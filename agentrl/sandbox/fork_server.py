"""The service's end of one fork server: start it, send it runs with their descriptors, collect what comes back.

Waits for: the fork server's hello, the outcome of each run. The fork server enforces the wall time; should it be wedged,
the deadline here ends it, and with it all its runs.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentrl.errors import SandboxError
from agentrl.sandbox.fetch import fetch_files
from agentrl.sandbox.job import MAX_FILES_BYTES, Job, Limits, Outcome, Tier, encode
from agentrl.sandbox.kernel import Kernel
from agentrl.sandbox.output import CappedOutput, sealed_memory

log = logging.getLogger(__name__)

BOOT_TIMEOUT_S = 60.0
WEDGED_AFTER_S = 10.0
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(2)); from inside import zygote; del sys.path[0]; zygote.main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkServerConfig:
    """How to start a fork server."""

    tier: Tier
    python: str = sys.executable
    preload: Sequence[str] = ()
    uid_base: int = 0
    """First of the uids that runs get, one per slot; only with root."""
    readable: Sequence[str] = ()
    """Directories to show beyond libraries, programs and the interpreter."""
    cgroup_path: str | None = None
    """A writable cgroup v2 directory for the runs' own cgroups."""

    @property
    def is_root(self) -> bool:
        return os.geteuid() == 0

    def as_json(self, control_fd: int) -> str:
        return json.dumps(
            {
                "tier": self.tier,
                "control_fd": control_fd,
                "preload": list(self.preload),
                "uid_base": self.uid_base,
                "private_uids": self.is_root,
                "user_namespace": self.tier != "zygote-landlock" and not self.is_root,
                "readable": list(self.readable),
                "cgroup_path": self.cgroup_path,
                "cgroup": -1,
            }
        )


def clean_environment(python: str, home: str) -> dict[str, str]:
    """The environment of the fork server and its runs, written from nothing: the service's own is full of secrets."""
    return {
        "PATH": f"{os.path.dirname(python)}:/usr/local/bin:/usr/bin:/bin",
        "HOME": home,
        "USER": "sandbox",
        "LOGNAME": "sandbox",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": "/tmp",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",  # each arena reserves 64 MiB of address space: ten threads would meet RLIMIT_AS
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
    }


@dataclass(slots=True)
class _Pending:
    done: asyncio.Future[dict[str, Any]]
    slot: int
    killed: str = field(default="")


class ForkServer:
    """One fork server process. ``died`` is set when it is gone; a new object replaces it."""

    def __init__(self, config: ForkServerConfig) -> None:
        self.config = config
        self.died = asyncio.Event()
        self.hello: dict[str, Any] = {}
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._hello: asyncio.Future[dict[str, Any]] | None = None
        self._fatal = ""

    @property
    def load(self) -> int:
        """Runs in flight."""
        return len(self._pending)

    async def start(self) -> None:
        """Start the process and wait until it can take runs.

        Raises:
            SandboxError: it could not isolate itself, or did not come up in time.
        """
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._hello = loop.create_future()
        try:
            self._process = await asyncio.to_thread(self._spawn, theirs)
        except OSError as error:
            ours.close()
            raise SandboxError(
                f"cannot start {self.config.python}: {error}. It must be executable for uid {os.geteuid()}."
            ) from error
        finally:
            theirs.close()
        ours.setblocking(False)
        self._control = ours
        loop.add_reader(ours.fileno(), self._receive)
        try:
            async with asyncio.timeout(BOOT_TIMEOUT_S):
                self.hello = await self._hello
        except TimeoutError as error:
            await self.stop()
            raise SandboxError(f"the fork server did not come up within {BOOT_TIMEOUT_S:g} s; preload fewer modules") from error
        except BaseException:
            await self.stop()
            raise

    def _spawn(self, control: socket.socket) -> subprocess.Popen[bytes]:
        python = self.config.python
        # -P and -s keep the working directory and the user's site-packages out; -I would also drop PYTHONHASHSEED.
        arguments = [python, "-s", "-P", "-c", _BOOT, self.config.as_json(control.fileno()), str(Path(__file__).parent)]
        return subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,  # closing our end is what kills everything, also when this process is killed
            stdout=subprocess.DEVNULL,
            env=clean_environment(python, "/" if self.config.tier == "zygote-landlock" else "/work"),
            cwd="/",
            pass_fds=(control.fileno(),),
            start_new_session=True,
        )

    async def stop(self) -> None:
        """Kill it and everything it started. Safe to call twice."""
        self._lost("the sandbox is shutting down")
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.to_thread(process.wait, 5)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    async def run(self, job: Job, slot: int) -> Outcome:
        """Run one job to its end.

        Raises:
            SandboxError: the fork server died or could not prepare the run; the job may be repeated.
        """
        if self._control is None or self.died.is_set():
            raise SandboxError("the fork server is not running")
        self._next_id += 1
        run_id = self._next_id
        pending = _Pending(asyncio.get_running_loop().create_future(), slot)
        self._pending[run_id] = pending
        with contextlib.ExitStack() as stack:
            ready, outputs = self._open_run(stack, run_id, job, slot)
            try:
                async with asyncio.timeout(job.limits.wall_s + WEDGED_AFTER_S):
                    done = await asyncio.shield(pending.done)
                    for output in outputs:
                        await output.ended()
            except TimeoutError as error:
                self._lost(f"the fork server did not answer within {job.limits.wall_s + WEDGED_AFTER_S:g} s")
                raise SandboxError("the fork server was wedged and has been killed") from error
            finally:
                await self._settle(run_id, pending)
            directory_fd = _check_ready(ready, done, stack)
            files, file_errors = await self._fetch(job, directory_fd)
            stdout, stderr = outputs
            return Outcome(
                code=done["code"],
                reason=done["reason"],
                stdout=stdout.text(),
                stderr=stderr.text(),
                wall_s=done["wall_s"],
                cpu_s=done["cpu_s"],
                max_rss_kb=done["max_rss_kb"],
                truncated=stdout.truncated or stderr.truncated,
                files=files,
                file_errors=file_errors,
            )

    def _open_run(
        self, stack: contextlib.ExitStack, run_id: int, job: Job, slot: int
    ) -> tuple[socket.socket, tuple[CappedOutput, CappedOutput]]:
        """Make the descriptors of a run and hand the child's ends over."""
        with contextlib.ExitStack() as theirs:
            job_fd = sealed_memory(theirs, job.encode())
            stdin_fd = sealed_memory(theirs, job.stdin) if job.stdin else _null(theirs)
            ready, ready_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(ready.close)
            theirs.callback(ready_theirs.close)
            writers: list[int] = []
            outputs: list[CappedOutput] = []
            for _ in range(2):
                output, writer = CappedOutput.pipe(
                    keep_bytes=job.limits.kept_output_bytes,
                    limit_bytes=job.limits.killed_output_bytes,
                    on_limit=lambda: self.kill(run_id, "output"),
                )
                theirs.callback(os.close, writer)
                writers.append(writer)
                stack.callback(output.close)
                outputs.append(output)
            request = _request(run_id, slot, job.limits) | {
                "command": list(job.command),
                "source_name": job.source_name,
                "bound_address_space": job.bound_address_space,
                "fetch": bool(job.fetch),
                "session": False,
            }
            self._place(run_id, request, [job_fd, stdin_fd, *writers, ready_theirs.fileno()])
        return ready, (outputs[0], outputs[1])

    async def open_session(self, limits: Limits, slot: int) -> Kernel:
        """Start a jailed interpreter that runs cells until it is killed.

        Args:
            limits: of the session as a whole; ``wall_s`` bounds only its start.
            slot: its uid, as for a run; held until the session's end.

        Raises:
            SandboxError: the fork server died or could not prepare it.
        """
        if self._control is None or self.died.is_set():
            raise SandboxError("the fork server is not running")
        self._next_id += 1
        run_id = self._next_id
        pending = _Pending(asyncio.get_running_loop().create_future(), slot)
        self._pending[run_id] = pending
        with contextlib.ExitStack() as stack:
            with contextlib.ExitStack() as theirs:
                null = _null(theirs)
                job_fd = sealed_memory(theirs, encode("", {}))
                ready, ready_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                stack.callback(ready.close)
                theirs.callback(ready_theirs.close)
                channel, channel_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                failed = contextlib.ExitStack()
                failed.callback(channel.close)
                stack.push(failed)
                theirs.callback(channel_theirs.close)
                request = _request(run_id, slot, limits) | {
                    "command": [],
                    "source_name": None,
                    "bound_address_space": True,
                    "fetch": False,
                    "session": True,
                }
                self._place(run_id, request, [job_fd, null, null, null, ready_theirs.fileno(), channel_theirs.fileno()])
            try:
                directory_fd = await self._session_ready(ready, pending, limits.wall_s)
            except BaseException:
                await self._settle(run_id, pending)
                raise
            failed.pop_all()
        return Kernel(self, run_id, channel, directory_fd, pending.done, limits)

    async def _session_ready(self, ready: socket.socket, pending: _Pending, limit_s: float) -> int | None:
        """Wait until the session is in its jail; its working directory where the tier has one."""
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        ready.setblocking(False)
        loop.add_reader(ready.fileno(), readable.set)
        try:
            async with asyncio.timeout(limit_s):
                await readable.wait()
        except TimeoutError as error:
            raise SandboxError(f"the session was not ready within {limit_s:g} s; the machine is overloaded") from error
        finally:
            loop.remove_reader(ready.fileno())
        try:
            message, fds, _, _ = socket.recv_fds(ready, 4096, 1)
        except OSError:
            message, fds = b"", []
        if message != b"ready":
            detail = message.decode("utf-8", "replace") or "it ended before it was ready"
            raise SandboxError(f"the session could not be isolated: {detail}")
        return fds[0] if fds else None

    async def end_session(self, run_id: int) -> None:
        """Kill a session and wait until it is gone, so that its slot is free."""
        pending = self._pending.get(run_id)
        if pending is not None:
            await self._settle(run_id, pending)

    def _place(self, run_id: int, request: dict[str, Any], fds: list[int]) -> None:
        try:
            self._send(request, fds)
        except SandboxError:
            del self._pending[run_id]
            raise

    def interrupt(self, run_id: int) -> None:
        """Send a session SIGINT: its cell raises KeyboardInterrupt."""
        with contextlib.suppress(SandboxError):
            self._send({"op": "interrupt", "id": run_id}, [])

    def watch_closely(self, run_id: int, busy: bool) -> None:
        """Say whether a session runs a cell: its memory is looked at more often then."""
        with contextlib.suppress(SandboxError):
            self._send({"op": "busy", "id": run_id, "busy": busy}, [])

    def kill(self, run_id: int, reason: str) -> None:
        """Ask for the end of a run; its outcome still arrives."""
        with contextlib.suppress(SandboxError):
            self._send({"op": "kill", "id": run_id, "reason": reason}, [])

    def _send(self, message: dict[str, Any], fds: list[int]) -> None:
        if self._control is None:
            raise SandboxError("the fork server has died")
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], fds)
        except OSError as error:
            self._lost(f"the fork server does not take requests: {error}")
            raise SandboxError("the fork server has died") from error

    async def _settle(self, run_id: int, pending: _Pending) -> None:
        """Leave no run behind: its slot (and uid) may be used again only when it is dead."""
        if not pending.done.done():
            self.kill(run_id, "signal")
            with contextlib.suppress(TimeoutError, SandboxError):
                async with asyncio.timeout(WEDGED_AFTER_S):
                    await asyncio.shield(pending.done)
            if not pending.done.done():
                self._lost("a cancelled run did not end")
        self._pending.pop(run_id, None)
        if not pending.done.cancelled():
            pending.done.exception()  # retrieved: whoever waited has seen it or is gone

    async def _fetch(self, job: Job, directory_fd: int | None) -> tuple[dict[str, bytes], dict[str, str]]:
        if directory_fd is None:
            return {}, {}
        return await asyncio.to_thread(
            fetch_files, directory_fd, job.fetch, max_file_bytes=job.limits.file_bytes, max_total_bytes=MAX_FILES_BYTES
        )

    def _receive(self) -> None:
        assert self._control is not None
        try:
            message = self._control.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._lost(self._fatal or "the fork server died")
            return
        reply: dict[str, Any] = json.loads(message)
        if reply["op"] == "hello":
            if self._hello is not None and not self._hello.done():
                self._hello.set_result(reply)
        elif reply["op"] == "fatal":
            self._fatal = reply["error"]
        else:
            pending = self._pending.get(reply["id"])
            if pending is not None and not pending.done.done():
                pending.done.set_result(reply)

    def _lost(self, why: str) -> None:
        """The process is gone or given up: fail its runs, and only those."""
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        if self._hello is not None and not self._hello.done():
            self._hello.set_exception(SandboxError(why))
        for pending in self._pending.values():
            if not pending.done.done():
                pending.done.set_exception(SandboxError(f"{why}; this run was lost and may be repeated"))
        self.died.set()


def _check_ready(ready: socket.socket, done: dict[str, Any], stack: contextlib.ExitStack) -> int | None:
    """The run's working directory when it was asked for. The channel is closed before foreign code runs."""
    if "error" in done:
        raise SandboxError(f"the run could not be started: {done['error']}")
    ready.setblocking(False)
    try:
        message, fds, _, _ = socket.recv_fds(ready, 4096, 1)
    except OSError:
        message, fds = b"", []
    for fd in fds:
        stack.callback(os.close, fd)
    if message != b"ready":
        detail = message.decode("utf-8", "replace") or f"it ended with status {done['code']} before it was ready"
        if done["reason"] == "wall" and not message:
            detail = "the wall time passed before it was ready; the machine is overloaded"
        raise SandboxError(f"the run could not be isolated: {detail}")
    return fds[0] if fds else None


def _request(run_id: int, slot: int, limits: Limits) -> dict[str, Any]:
    return {
        "op": "run",
        "id": run_id,
        "slot": slot,
        "wall_s": limits.wall_s,
        "cpu_s": math.ceil(limits.cpu_s or limits.wall_s),
        "memory_bytes": limits.memory_bytes,
        "tmpfs_bytes": limits.tmpfs_bytes,
        "inodes": limits.inodes,
        "file_bytes": limits.file_bytes,
        "open_files": limits.open_files,
        "processes": limits.processes,
    }


def _null(stack: contextlib.ExitStack) -> int:
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
