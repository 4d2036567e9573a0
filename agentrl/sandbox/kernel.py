"""The service's end of one session: hand it a cell with fresh pipes, keep the time, say how it ended.

What the session says about a cell (its errors, its displays, that it is done) comes from the process that runs the code and
is believed only for that session. Output is read here, time is kept here, and the process's end comes from the fork server.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from agentrl.errors import SandboxError
from agentrl.sandbox.fetch import fetch_files
from agentrl.sandbox.job import MAX_FILES_BYTES, MIB, CellOutcome, Limits, Reason, encode
from agentrl.sandbox.output import CappedOutput, sealed_memory

INTERRUPT_GRACE_S = 1.0
"""How long a cell that ran out of time may take to raise KeyboardInterrupt before its session is killed."""
_CLOSE_LOOK_AFTER_S = 0.05
_MAX_REPORT_BYTES = 8 * MIB


class Host(Protocol):
    """What a session needs of its fork server."""

    def kill(self, run_id: int, reason: str) -> None: ...
    def interrupt(self, run_id: int) -> None: ...
    def watch_closely(self, run_id: int, busy: bool) -> None: ...
    async def end_session(self, run_id: int) -> None: ...


class Kernel:
    """One running session. One cell at a time: the caller sees to that."""

    def __init__(
        self,
        host: Host,
        run_id: int,
        channel: socket.socket,
        directory_fd: int | None,
        ended: "asyncio.Future[dict[str, Any]]",
        limits: Limits,
    ) -> None:
        self._host = host
        self._run_id = run_id
        self._channel = channel
        self._directory_fd = directory_fd
        self._ended = ended
        self._limits = limits
        self._cells = 0
        self._closed = False
        channel.setblocking(False)

    @property
    def is_alive(self) -> bool:
        return not self._closed and not self._ended.done()

    @property
    def has_files(self) -> bool:
        """Whether it has a working directory to write input files to and to fetch from."""
        return self._directory_fd is not None

    async def run(
        self,
        code: str,
        *,
        wall_s: float,
        echo: bool,
        rich: bool,
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
    ) -> CellOutcome:
        """Run one cell to its end.

        Args:
            code: the cell.
            wall_s: then it is interrupted, and killed with its session when that does not help.
            echo: show the value of a last expression.
            rich: collect values as displays and errors as data, as a notebook does, instead of printing them.
            files: written below /work first.
            fetch: paths below /work to return afterwards.

        Raises:
            SandboxError: the session or its fork server is gone, and not by the cell's doing.
        """
        if not self.is_alive:
            raise SandboxError("the session has ended")
        self._cells += 1
        number = self._cells
        stopped: list[Literal["wall", "output"]] = []

        def flooded() -> None:
            stopped.append("output")
            self._host.interrupt(self._run_id)
            grace.append(loop.call_later(INTERRUPT_GRACE_S, self._host.kill, self._run_id, "output"))

        loop = asyncio.get_running_loop()
        grace: list[asyncio.TimerHandle] = []
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [timer.cancel() for timer in grace])
            stdout, stderr, report = self._send_cell(stack, code, files or {}, number, echo=echo, rich=rich, on_limit=flooded)
            close_look = loop.call_later(_CLOSE_LOOK_AFTER_S, self._host.watch_closely, self._run_id, True)
            try:
                answer = await self._answer(number, wall_s, stopped)
            except asyncio.CancelledError:
                self._host.kill(self._run_id, "signal")
                raise
            finally:
                if close_look.when() <= loop.time():
                    self._host.watch_closely(self._run_id, False)
                close_look.cancel()
            for output in (stdout, stderr, report):
                output.drain()
            said = _parse_report(report)
            reason, returned = self._reason(answer, stopped)
            fetched, file_errors = await self._fetch(fetch)
            return CellOutcome(
                code=returned,
                reason=reason,
                stdout=stdout.text(),
                stderr=stderr.text(),
                wall_s=time.monotonic() - started,
                cpu_s=0.0,
                max_rss_kb=0,
                truncated=stdout.truncated or stderr.truncated,
                files=fetched,
                file_errors=file_errors,
                is_alive=self.is_alive,
                display=said["display"],
                error=said["error"],
            )

    def _send_cell(
        self,
        stack: contextlib.ExitStack,
        code: str,
        files: Mapping[str, bytes],
        number: int,
        *,
        echo: bool,
        rich: bool,
        on_limit: Any,
    ) -> tuple[CappedOutput, CappedOutput, CappedOutput]:
        keep, limit = self._limits.kept_output_bytes, self._limits.killed_output_bytes
        with contextlib.ExitStack() as theirs:
            fds = [sealed_memory(theirs, encode(code, files))]
            outputs: list[CappedOutput] = []
            for kept_bytes, limit_bytes in ((keep, limit), (keep, limit), (2 * _MAX_REPORT_BYTES, _MAX_REPORT_BYTES)):
                output, writer = CappedOutput.pipe(keep_bytes=kept_bytes, limit_bytes=limit_bytes, on_limit=on_limit)
                theirs.callback(os.close, writer)
                stack.callback(output.close)
                outputs.append(output)
                fds.append(writer)
            try:
                socket.send_fds(self._channel, [json.dumps({"n": number, "echo": echo, "rich": rich}).encode()], fds)
            except OSError as error:
                raise SandboxError(f"the session does not take cells: {error}") from error
        return outputs[0], outputs[1], outputs[2]

    async def _answer(self, number: int, wall_s: float, stopped: list[Literal["wall", "output"]]) -> dict[str, Any] | None:
        """What the session says at the cell's end; None when it died. Interrupts at the deadline, kills when that fails."""
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        fd = self._channel.fileno()

        def wake(_: "asyncio.Future[dict[str, Any]]") -> None:
            readable.set()

        self._ended.add_done_callback(wake)
        loop.add_reader(fd, readable.set)
        limit_s = wall_s
        try:
            while True:
                try:
                    async with asyncio.timeout(limit_s):
                        await readable.wait()
                except TimeoutError:
                    if "wall" in stopped:
                        self._host.kill(self._run_id, "wall")
                        await asyncio.wait({self._ended}, timeout=10.0)
                        return None
                    stopped.append("wall")
                    limit_s = INTERRUPT_GRACE_S
                    self._host.interrupt(self._run_id)
                    continue
                readable.clear()
                try:
                    message = self._channel.recv(65536)
                except BlockingIOError:
                    if self._ended.done():
                        return None
                    continue
                except OSError:
                    message = b""
                if not message:  # it died, or closed its end, which is as good
                    loop.remove_reader(fd)
                    self._host.kill(self._run_id, "signal")
                    await asyncio.wait({self._ended}, timeout=10.0)
                    return None
                answer = _parse_answer(message)
                if answer is not None and answer["n"] == number:
                    return answer
        finally:
            loop.remove_reader(fd)
            self._ended.remove_done_callback(wake)

    @property
    def end_reason(self) -> str:
        """Why it is no longer alive, from the kernel's account."""
        if not self._ended.done() or self._ended.cancelled():
            return "closed"
        return "lost" if self._ended.exception() is not None else str(self._ended.result().get("reason", "lost"))

    def _reason(self, answer: dict[str, Any] | None, stopped: list[Literal["wall", "output"]]) -> tuple[Reason, int]:
        if answer is not None:
            if stopped:
                return stopped[0], answer["code"] or 1
            return ("exit" if answer["code"] else "ok"), answer["code"]
        if not self._ended.done() or self._ended.cancelled():
            raise SandboxError("the session was lost: its fork server does not answer")
        if (error := self._ended.exception()) is not None:
            raise SandboxError(f"the session was lost: {error}") from error
        done = self._ended.result()
        reason: Reason = done["reason"] if not stopped else stopped[0]
        return ("exit" if reason == "ok" else reason), done["code"]

    async def _fetch(self, paths: Sequence[str]) -> tuple[dict[str, bytes], dict[str, str]]:
        if self._directory_fd is None or not paths:
            return {}, {}
        return await asyncio.to_thread(
            fetch_files, self._directory_fd, paths, max_file_bytes=self._limits.file_bytes, max_total_bytes=MAX_FILES_BYTES
        )

    async def close(self) -> None:
        """Kill it and everything in it. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._channel.close()
        if self._directory_fd is not None:
            os.close(self._directory_fd)
            self._directory_fd = None
        await self._host.end_session(self._run_id)


def _parse_answer(message: bytes) -> dict[str, Any] | None:
    """A session's word that a cell is done, or None when it is no such thing: foreign code may write here too."""
    try:
        answer = json.loads(message)
        return {"n": int(answer["n"]), "code": int(answer["code"]) & 0xFF}
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None


def _parse_report(report: CappedOutput) -> dict[str, list[Any]]:
    """Displays and errors; a torn or forged report is an empty one."""
    empty: dict[str, list[Any]] = {"display": [], "error": []}
    try:
        said = json.loads(report.text() or "{}")
        found = {name: [item for item in said.get(name, []) if isinstance(item, dict)] for name in empty}
    except (ValueError, AttributeError, TypeError, RecursionError):
        return empty
    return found
