"""Doubles for the trajectory stream: made-up trajectories, and a TCP proxy that loses replies on command."""

import contextlib
import socket
import threading
from collections.abc import Sequence

import numpy as np

from agentrl.types import GroupClose, Segment, Trajectory, Turn


def make_trajectory(
    ordinal: int = 0,
    sample_index: int = 0,
    *,
    attempt: int = 0,
    num_tokens: int = 24,
    prompt_length: int = 8,
    version: int = 0,
    reward: float = 1.0,
    seed: int = 0,
) -> Trajectory:
    """A valid trajectory of one segment, the same for the same arguments."""
    rng = np.random.default_rng([seed, ordinal, sample_index, attempt])
    mask = np.zeros(num_tokens, np.bool_)
    mask[prompt_length:] = True
    logprobs = np.where(mask, -rng.exponential(1.0, num_tokens), 0.0).astype(np.float32)
    segment = Segment(
        ids=rng.integers(0, 50_000, num_tokens, dtype=np.int32),
        mask=mask,
        logprobs=logprobs,
        versions=np.where(mask, version, -1).astype(np.int32),
        prompt_length=prompt_length,
    )
    task_id = f"made-up/train/{ordinal % 100}"
    return Trajectory(
        id=f"{task_id}/{ordinal}/{sample_index}/{attempt}",
        task_id=task_id,
        group_id=f"{task_id}/{ordinal}",
        ordinal=ordinal,
        sample_index=sample_index,
        attempt=attempt,
        env="made-up",
        agent="single_turn",
        data_source="made-up",
        split="train",
        segments=(segment,),
        reward=reward,
        reward_terms={"correct": reward},
        turns=(Turn(kind="model", segment=0, start=prompt_length, end=num_tokens, ms=1.0, finish="stop", text="hi"),),
        created=1.0,
        finished=2.0,
    )


def make_close(members: Sequence[Trajectory], *, size: int | None = None, failed: dict[str, str] | None = None) -> GroupClose:
    """The close of the group to which these members belong."""
    first = members[0]
    return GroupClose(
        group_id=first.group_id,
        task_id=first.task_id,
        ordinal=first.ordinal,
        size=size if size is not None else len(members) + len(failed or {}),
        members=tuple(t.id for t in members),
        failed=failed or {},
    )


class LossyProxy:
    """A TCP port before a server's unix socket. ``lose_replies(n)`` lets n requests through and cuts before the answer;
    ``go_silent`` leaves connections half-open; ``corrupt`` flips a byte.

    Use as a context manager; ``url`` is where clients connect.
    """

    def __init__(self, upstream_url: str) -> None:
        self._upstream = upstream_url.removeprefix("unix://")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._marker = b""
        self._to_lose = 0
        self.lost = 0
        self._silent = False
        self._mute: set[socket.socket] = set()
        self._to_corrupt = 0
        self.corrupted = 0
        self._open: set[socket.socket] = set()
        self._all: list[socket.socket] = []
        self._closed = False
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}"

    def lose_replies(self, count: int = 1, *, marker: bytes = b"") -> None:
        """Lose the replies to the next ``count`` requests that contain ``marker``."""
        with self._lock:
            self._to_lose, self._marker = count, marker

    def go_silent(self) -> None:
        """From now on nothing passes and nothing is closed, as when a cable is pulled; new connections are taken and stay silent."""
        with self._lock:
            self._silent = True
            self._mute |= self._open

    def heal(self) -> None:
        """New connections work again. Those that fell silent stay so: their far end has forgotten them."""
        with self._lock:
            self._silent = False

    def corrupt(self, count: int, *, marker: bytes) -> None:
        """Flip one byte, 60 behind ``marker``, in the next ``count`` requests that hold so much."""
        with self._lock:
            self._to_corrupt, self._marker = count, marker

    def _is_mute(self, connection: socket.socket) -> bool:
        with self._lock:
            return connection in self._mute

    def _damaged(self, data: bytes) -> bytes:
        at = data.find(self._marker) + 60
        with self._lock:
            if not self._to_corrupt or self._marker not in data or at >= len(data) - 20:
                return data
            self._to_corrupt -= 1
            self.corrupted += 1
        return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]

    def cut_all(self) -> None:
        """Cut every connection now, as a network does."""
        with self._lock:
            for connection in self._open:
                _cut(connection)

    def __enter__(self) -> "LossyProxy":
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        _cut(self._listener)
        self._listener.close()
        self.cut_all()
        for thread in list(self._threads):
            thread.join(5)
        for connection in self._all:
            connection.close()

    def _spawn(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # pyright: ignore[reportArgumentType]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            upstream = socket.socket(socket.AF_UNIX)
            try:
                upstream.connect(self._upstream)
            except OSError:
                upstream.close()
                client.close()
                continue
            doomed = threading.Event()
            with self._lock:
                self._open |= {client, upstream}
                self._all += [client, upstream]
                if self._silent:
                    self._mute |= {client, upstream}
            self._spawn(self._forward_requests, client, upstream, doomed)
            self._spawn(self._forward_replies, client, upstream, doomed)

    def _forward_requests(self, client: socket.socket, upstream: socket.socket, doomed: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                with self._lock:
                    if self._to_lose and self._marker in data:
                        self._to_lose -= 1
                        self.lost += 1
                        doomed.set()
                if not self._is_mute(client):
                    upstream.sendall(self._damaged(data))
        self._drop(client, upstream)

    def _forward_replies(self, client: socket.socket, upstream: socket.socket, doomed: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := upstream.recv(1 << 16):
                if doomed.is_set():
                    break
                if not self._is_mute(client):
                    client.sendall(data)
        self._drop(client, upstream)

    def _drop(self, *connections: socket.socket) -> None:
        with self._lock:
            for connection in connections:
                if connection in self._open:
                    self._open.discard(connection)
                    _cut(connection)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
