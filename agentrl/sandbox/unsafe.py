"""The backend behind ``allow_unsafe``: a plain subprocess with a clean environment and rlimits. It contains nothing.

The code can read what this user can read, use the network and outlive its run by leaving the process group.
"""

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from agentrl.errors import SandboxError
from agentrl.sandbox.fetch import fetch_files
from agentrl.sandbox.fork_server import clean_environment
from agentrl.sandbox.job import MAX_FILES_BYTES, Job, Outcome, Reason
from agentrl.sandbox.output import CappedOutput


class UnsafeRunner:
    """Runs each job as an ordinary child process."""

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python

    async def run(self, job: Job, slot: int) -> Outcome:
        """Run one job; ``slot`` is of no use here."""
        with contextlib.ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentrl-unsafe-", ignore_cleanup_errors=True)))
            command, stdin = await asyncio.to_thread(self._prepare, job, work)
            stack.callback(stdin.close)
            killer = _Killer()
            outputs: list[CappedOutput] = []
            writers: list[int] = []
            for _ in range(2):
                reader, writer = os.pipe()
                writers.append(writer)
                output = CappedOutput(
                    reader,
                    keep_bytes=job.limits.kept_output_bytes,
                    limit_bytes=job.limits.killed_output_bytes,
                    on_limit=lambda: killer.kill("output"),
                )
                stack.callback(output.close)
                outputs.append(output)
            started = time.monotonic()
            try:
                killer.process = await asyncio.to_thread(self._spawn, command, stdin, writers, work, job)
            finally:
                for writer in writers:
                    os.close(writer)
            try:
                usage = await self._wait(killer, outputs, job.limits.wall_s)
            finally:
                killer.kill("signal")
            wall_s = time.monotonic() - started
            directory_fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, directory_fd)
            files, errors = await asyncio.to_thread(
                fetch_files, directory_fd, job.fetch, max_file_bytes=job.limits.file_bytes, max_total_bytes=MAX_FILES_BYTES
            )
            code = killer.code
            return Outcome(
                code=code,
                reason=killer.reason or ("signal" if code < 0 else "exit" if code else "ok"),
                stdout=outputs[0].text(),
                stderr=outputs[1].text(),
                wall_s=wall_s,
                cpu_s=usage.ru_utime + usage.ru_stime,
                max_rss_kb=usage.ru_maxrss,
                truncated=outputs[0].truncated or outputs[1].truncated,
                files=files,
                file_errors=errors,
            )

    def _prepare(self, job: Job, work: Path) -> tuple[list[str], Any]:
        for path, data in job.files.items():
            target = work / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            if path in job.executables:
                target.chmod(0o755)
        script = work / (job.source_name or "main.py")
        if job.source_name or not job.command:
            script.write_text(job.code, encoding="utf-8", errors="replace")
        stdin = tempfile.TemporaryFile()  # noqa: SIM115 - the caller's ExitStack closes it
        stdin.write(job.stdin or b"")
        stdin.seek(0)
        return list(job.command) or [self._python, "-s", script.name], stdin

    def _spawn(self, command: list[str], stdin: Any, writers: list[int], work: Path, job: Job) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                command,
                cwd=work,
                env=clean_environment(self._python, str(work)),
                stdin=stdin,
                stdout=writers[0],
                stderr=writers[1],
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"cannot start {command[0]}: {error}") from error
        with contextlib.suppress(OSError, ValueError):
            if job.bound_address_space:
                resource.prlimit(process.pid, resource.RLIMIT_AS, (job.limits.memory_bytes, job.limits.memory_bytes))
        return process

    async def _wait(self, killer: "_Killer", outputs: list[CappedOutput], wall_s: float) -> resource.struct_rusage:
        """The process's end, by its pidfd; then what is left of its group is killed so that the pipes end."""
        assert killer.process is not None
        pid = killer.process.pid
        ended = asyncio.Event()
        pidfd = os.pidfd_open(pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, ended.set)
        try:
            try:
                async with asyncio.timeout(wall_s):
                    await ended.wait()
            except TimeoutError:
                killer.kill("wall")
                await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        _, status, usage = os.wait4(pid, 0)  # noqa: ASYNC222 - it has ended, so this only reaps
        killer.ended(os.waitstatus_to_exitcode(status))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):  # a daemon that left the group may hold them for ever
                for output in outputs:
                    await output.ended()
        return usage


class _Killer:
    """Kills the process group once, and remembers why."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.reason: Literal["wall", "output", ""] = ""
        self.code = -signal.SIGKILL

    def kill(self, reason: Reason) -> None:
        if self.process is None or self.process.returncode is not None:
            return
        if not self.reason and reason in ("wall", "output"):
            self.reason = reason
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ended(self, code: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it left behind in its group
        self.process.returncode = code
        self.code = code
