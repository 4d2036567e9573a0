"""Weights straight into a running SGLang's memory: a sender process per engine broadcasts the announced snapshot's bytes.

The record and the files stay the truth: restarts, new engines and embedded engines load them as ever. What changes is who reads
them: only this machine, so engines elsewhere need no shared file system.

One process group per engine (rank 0 the sender, the engine's tensor-parallel ranks after it), not one for all: a collective waits for
its slowest member, and an engine that died in it would hold up every other. The price is that the bytes leave this machine once per
engine. A group outlives updates and is made anew when the engine or the sender was started again.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from agentrl.errors import WeightSyncError
from agentrl.serving.sglang_client import SGLangClient
from agentrl.types import PolicyRecord
from agentrl.weights.buckets import plan_buckets

log = logging.getLogger(__name__)

BroadcastBackend: TypeAlias = Literal["gloo", "nccl"]

_LINE_LIMIT = 1 << 20
_CLEAN_UP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Link:
    """A sender and the group that it shares with one incarnation of one engine."""

    client: SGLangClient
    incarnation: int
    group: str
    process: Process
    log_path: Path

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None

    async def ask(self, command: dict[str, Any] | None) -> dict[str, Any]:
        """Send a command, if any, and take the next line that the sender says."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        line = b""
        with contextlib.suppress(ConnectionError):
            if command is not None:
                stdin.write(json.dumps(command).encode() + b"\n")
                await stdin.drain()
            line = await stdout.readline()
        if not line.endswith(b"\n"):
            raise WeightSyncError(f"the weight sender for {self.client.url} died. Read {self.log_path}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WeightSyncError(f"the weight sender for {self.client.url} failed: {answer['error']}. Read {self.log_path}.")
        return answer


class WeightBroadcaster:
    """Sends snapshots to engines; an async context that ends its senders.

    Args:
        backend: ``gloo`` over TCP from host memory, ``nccl`` from this machine's first visible GPU.
        bucket_bytes: bytes per broadcast, at most, unless one tensor is larger; each engine needs this much free memory.
        log_dir: for the senders' logs.
        connect_timeout_s: limit of starting a sender and of both joining their group.
        retry_s: how long a server that could not be connected is left alone.
    """

    def __init__(
        self,
        *,
        backend: BroadcastBackend = "gloo",
        bucket_bytes: int = 512 << 20,
        log_dir: str | Path,
        connect_timeout_s: float = 120.0,
        retry_s: float = 300.0,
    ) -> None:
        self._backend: BroadcastBackend = backend
        self._bucket_bytes = bucket_bytes
        self._log_dir = Path(log_dir)
        self._connect_timeout_s, self._retry_s = connect_timeout_s, retry_s
        self._links: dict[str, _Link] = {}
        self._left_alone: dict[str, tuple[int, float]] = {}
        """Url -> incarnation that could not be connected, and the event-loop time of the next try."""

    async def __aenter__(self) -> "WeightBroadcaster":
        return self

    async def __aexit__(self, *_: object) -> None:
        for url in list(self._links):
            await self.disconnect(url)

    @property
    def sender_pids(self) -> dict[str, int]:
        """Server url -> pid of its running sender."""
        return {url: link.process.pid for url, link in self._links.items() if link.is_alive}

    async def keep_only(self, urls: list[str]) -> None:
        """End the senders of servers that are gone."""
        for url in [url for url in self._links if url not in urls]:
            await self.disconnect(url)

    async def connect(self, client: SGLangClient, *, incarnation: int, send_timeout_s: float) -> bool:
        """Start a sender for this server and let both join a group, unless they have. The server goes on sampling meanwhile.

        Args:
            client: the server.
            incarnation: changes when the server was started again, which lost its group.
            send_timeout_s: limit of each later broadcast.

        Returns:
            Whether the server can be sent to. If not, it is as it was, the log says why, and it is left alone for a while.
        """
        link = self._links.get(client.url)
        if link is not None and link.is_alive and link.incarnation == incarnation:
            return True
        await self.disconnect(client.url)
        now = asyncio.get_running_loop().time()
        failed_incarnation, not_before = self._left_alone.get(client.url, (incarnation, now))
        if failed_incarnation == incarnation and now < not_before:
            return False
        problem = f"not joined within {self._connect_timeout_s:g} s"
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._join(client, incarnation, send_timeout_s)
        except (WeightSyncError, OSError, TimeoutError) as error:
            problem = str(error) or problem
        except BaseException:
            await self.disconnect(client.url)
            raise
        else:
            return True
        log.warning("no broadcast to this server, weights go by disk url=%s retry_s=%g: %s", client.url, self._retry_s, problem)
        await self.disconnect(client.url)
        self._left_alone[client.url] = incarnation, asyncio.get_running_loop().time() + self._retry_s
        return False

    async def _join(self, client: SGLangClient, incarnation: int, send_timeout_s: float) -> None:
        timeout_s = self._connect_timeout_s
        layout = await client.parallel_layout(timeout_s=timeout_s)
        if layout.pipeline > 1 or layout.data > 1:
            raise WeightSyncError(
                f"{client.url} runs with pipeline size {layout.pipeline} and data-parallel size {layout.data}; SGLang receives "
                "broadcasts only where both are 1. Start one server per replica, or set serve.weight_transport=disk."
            )
        address = await _address_towards(client.url)
        link = await self._start(client, incarnation, address, send_timeout_s)
        port = int((await link.ask(None))["port"])
        world_size = 1 + layout.tensor
        await _both(
            client.join_weights_group(
                link.group, address=address, port=port, world_size=world_size, backend=self._backend, timeout_s=timeout_s
            ),
            link.ask({"join": link.group, "world_size": world_size}),
        )
        log.info(
            "weight sender joined url=%s pid=%d backend=%s ranks=%d", client.url, link.process.pid, self._backend, world_size
        )

    async def _start(self, client: SGLangClient, incarnation: int, address: str, send_timeout_s: float) -> _Link:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        where = urlsplit(client.url)
        log_path = self._log_dir / f"weight-sender-{where.hostname}-{where.port}.log"
        with log_path.open("ab") as log_file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "agentrl.serving.weight_sender"),
                *("--address", address, "--backend", self._backend, "--timeout-s", str(send_timeout_s)),
                stdin=PIPE,
                stdout=PIPE,
                stderr=log_file,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                limit=_LINE_LIMIT,
                start_new_session=True,
            )
        link = _Link(client, incarnation, f"agentrl-{uuid.uuid4().hex}", process, log_path)
        self._links[client.url] = link
        return link

    async def send(self, client: SGLangClient, record: PolicyRecord, *, flush_cache: bool, timeout_s: float) -> None:
        """Broadcast the record's files to a server that is connected and paused. Its label changes with the last bucket only.

        Raises:
            WeightSyncError: it broke off. The server holds a mixture, and its group is gone.
        """
        link = self._links.get(client.url)
        if link is None:
            raise WeightSyncError(f"{client.url} has no weight sender: connect comes first.")
        try:
            async with asyncio.timeout(timeout_s):
                buckets = await asyncio.to_thread(plan_buckets, record.path, max_bytes=self._bucket_bytes)
                await client.begin_weight_update(timeout_s=timeout_s)
                for bucket in buckets:
                    is_last = bucket is buckets[-1]
                    await _both(
                        client.receive_weights(
                            bucket,
                            group=link.group,
                            label=record.label if is_last else None,
                            flush_cache=flush_cache and is_last,
                            timeout_s=timeout_s,
                        ),
                        link.ask({"send": bucket.pieces}),
                    )
                await client.end_weight_update(timeout_s=timeout_s)
        except BaseException as error:
            await self._break_off(link)
            if isinstance(error, TimeoutError):
                raise WeightSyncError(f"{client.url} did not receive {record.path} within {timeout_s:g} s.") from error
            raise

    async def _break_off(self, link: _Link) -> None:
        """The sender first: that ends a broadcast which the server waits in. Then no session stays open, and no group."""
        await _kill(link.process)
        with contextlib.suppress(WeightSyncError):  # there may be no session, or no server
            await link.client.end_weight_update(timeout_s=_CLEAN_UP_TIMEOUT_S)
        await self.disconnect(link.client.url)

    async def disconnect(self, url: str) -> None:
        """End the server's sender and let the server forget their group."""
        link = self._links.pop(url, None)
        if link is None:
            return
        await _kill(link.process)
        with contextlib.suppress(WeightSyncError):  # it was restarted, or is gone
            await link.client.leave_weights_group(link.group, timeout_s=_CLEAN_UP_TIMEOUT_S)


async def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _both(server: Coroutine[Any, Any, object], sender: Coroutine[Any, Any, object]) -> None:
    """Two ends of one collective: when one fails, the other is not waited for.

    Raises:
        WeightSyncError: what failed first.
    """
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(server)
            group.create_task(sender)
    except* WeightSyncError as errors:
        problem = "; ".join(str(error) for error in errors.exceptions)
    else:
        return
    raise WeightSyncError(problem)


async def _address_towards(url: str) -> str:
    """This machine's address on the way to the server; nothing is sent."""
    where = urlsplit(url)
    found = await asyncio.get_running_loop().getaddrinfo(where.hostname, where.port, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
