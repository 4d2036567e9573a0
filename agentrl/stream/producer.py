"""Put trajectories and group closes on the stream: once each, bounded, never dropped.

Every call is one idempotent Lua script, so it is repeated until the server answers: a lost reply, a killed server or a
restarted worker still leaves one entry per id.

Three rules keep the bounds from ever deadlocking:

* ``max_items`` bounds the entries no learner has taken yet. What the learner has read but not committed (it waits for a
  checkpoint) does not count, so a checkpoint interval longer than ``max_items`` cannot stop the producers.
* ``max_bytes`` bounds everything that lives in the server's memory, except for members of a group that already began:
  the learner can only consume whole groups, so refusing the last member would keep the others there for ever. It is
  exceeded by at most the unfinished members of the groups in flight. An entry larger than ``max_bytes`` is admitted alone.
* A group close is always admitted: it is small, and it is what lets the learner free its members.

What waits for the stream: ``put_trajectory``, while full; the learner unblocks it by reading (``items``) or by committing
behind a checkpoint (``bytes``; ``TrajectoryConsumer.producers_blocked`` tells the learner to checkpoint early).
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar, cast

import redis.asyncio
from redis.exceptions import OutOfMemoryError

from agentrl.errors import MembersLost, StreamError
from agentrl.stream import scripts
from agentrl.stream.codec import encode
from agentrl.stream.connection import SOCKET_TIMEOUT_S, retry_async
from agentrl.stream.keys import Keys
from agentrl.stream.lines import Lines
from agentrl.types import GroupClose, Trajectory

log = logging.getLogger(__name__)

T = TypeVar("T")

SIDE_KEY_BYTES: Final = 1 << 20
"""An encoded entry above this goes to its own key: reading the stream past it then costs nothing."""
FULL_FIRST_S: Final = 0.002
FULL_MAX_S: Final = 0.250
_POLLS_PER_S: Final = 500
"""Cheap checks per second over all waiting puts of this producer: with many waiters each asks less often."""
_SLOTS: Final = 16
"""Scripts in flight. More would only hold their payloads in memory: the server handles one at a time."""
_CHUNK: Final = 512
_OFFLOAD_TOKENS: Final = 262_144
"""Above this, encoding takes longer than a millisecond or two and moves to a thread."""


class TrajectoryProducer:
    """The ``TrajectorySink`` on Redis. One per process; any number of tasks may put at once.

    Args:
        client: from ``connect_async``; it must not retry by itself.
        keys: of the run.
        max_items: undelivered entries at which a put waits.
        max_bytes: encoded bytes on the server at which the first member of a group waits.
        on_wait: called before every pause with ``stream:full`` or ``stream:down`` and the seconds waited so far.
        patience_s: seconds of unreachable server after which a call raises; None waits for ever (the caller's deadline
            still applies). Waiting because the stream is full is never limited here.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        keys: Keys,
        *,
        max_items: int = 512,
        max_bytes: int = 1 << 30,
        on_wait: Callable[[str, float], None] | None = None,
        patience_s: float | None = None,
    ) -> None:
        if max_items < 1 or max_bytes < 1:
            raise ValueError(f"max_items={max_items} and max_bytes={max_bytes} must be at least 1")
        self._client: Any = client
        self._keys = keys
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._on_wait = on_wait
        self._patience_s = patience_s
        self._slots = asyncio.Semaphore(_SLOTS)
        self._waiting = 0
        timeout_s = client.connection_pool.connection_kwargs.get("socket_timeout")
        self._lines = Lines(client, timeout_s=SOCKET_TIMEOUT_S if timeout_s is None else timeout_s)
        self._put = self._client.register_script(scripts.PUT)
        self._room = self._client.register_script(scripts.ROOM)
        self._close = self._client.register_script(scripts.CLOSE)
        self._known = self._client.register_script(scripts.KNOWN)

    @property
    def waiting(self) -> int:
        """Puts that wait for room right now."""
        return self._waiting

    async def put_trajectory(self, trajectory: Trajectory) -> None:
        """Store one trajectory. Waits while the stream is full; returns once the server has it.

        A repeated id is no new entry. A trajectory whose group closed without it is counted as superseded, not stored.

        Raises:
            CodecError: the trajectory is malformed; nothing was written.
            StreamError: the server refuses to write (disk full, no permission) or stayed away too long.
        """
        if trajectory.num_tokens > _OFFLOAD_TOKENS:
            payload = await asyncio.to_thread(encode, trajectory)
        else:
            payload = encode(trajectory)
        # While others wait the stream is probably still full: ask before sending the payload.
        answer = "FULL" if self._waiting else await self._try_put(trajectory, payload)
        if answer == "FULL":
            answer = await self._put_when_room(trajectory, payload)
        if answer == "LATE":
            log.info("trajectory superseded, its group closed without it: id=%s", trajectory.id)

    async def close_group(self, close: GroupClose) -> None:
        """Say that a group is complete. Always admitted. Call it after its members were put.

        Raises:
            CodecError: the close is malformed (for example more members and failures than its size).
            MembersLost: the server knows nothing of a listed member.
            StreamError: another group closed this ordinal.
        """
        payload = encode(close)
        reasons = [part for reason, count in Counter(close.failed.values()).items() for part in (reason, count)]
        args = [self._keys.prefix, close.id, close.group_id, close.ordinal, close.size, payload, len(close.members)]
        args += [*close.members, *reasons]
        keys = self._stream_keys(close.group_id)
        answer = await self._call(lambda: self._run(self._close, keys, args), f"closing {close.group_id}")
        status, *missing = [part.decode() for part in cast("list[bytes]", answer)]
        if status == "MISSING":
            raise MembersLost(
                f"group {close.group_id} closes with {len(missing)} members that the stream does not know (first: {missing[0]}): "
                "the server lost them (run it with appendfsync always), or put_trajectory was not awaited for every member"
            )
        if status == "TAKEN":
            raise StreamError(
                f"ordinal {close.ordinal} of group {close.group_id} was already closed by another group: "
                "ordinals must be unique in a run"
            )

    async def present(self, ids: Sequence[str]) -> set[str]:
        """Which of these trajectory ids were ever put, so that a restarted worker re-rolls only the others."""
        found: set[str] = set()
        for start in range(0, len(ids), _CHUNK):
            chunk = list(ids[start : start + _CHUNK])
            args = [self._keys.prefix, *chunk]
            known = cast(
                "list[int]", await self._call(lambda args=args: self._known(keys=[self._keys.dedupe], args=args), "reading ids")
            )
            found.update(entry for entry, is_known in zip(chunk, known, strict=True) if is_known)
        return found

    async def next_open_ordinal(self) -> int:
        """The lowest ordinal whose group has not closed: where a resumed run starts to deal out tasks."""
        return int(await self._call(lambda: self._client.bitpos(self._keys.closed, 0), "reading closed groups"))

    async def is_closed(self, ordinals: Iterable[int]) -> set[int]:
        """Which of these ordinals belong to closed groups."""
        wanted = list(ordinals)
        closed: set[int] = set()
        for start in range(0, len(wanted), _CHUNK):
            chunk = wanted[start : start + _CHUNK]
            command = ["BITFIELD_RO", self._keys.closed]
            for ordinal in chunk:
                command += ["GET", "u1", str(ordinal)]
            bits = cast(
                "list[int]",
                await self._call(lambda command=command: self._client.execute_command(*command), "reading closed groups"),
            )
            closed.update(ordinal for ordinal, bit in zip(chunk, bits, strict=True) if bit)
        return closed

    async def requeued(self) -> dict[int, int]:
        """Ordinal -> round of the groups that the learner gave back and that have not closed again, lowest ordinal first."""
        pairs = cast(
            "list[tuple[bytes, float]]",
            await self._call(lambda: self._client.zrange(self._keys.requeued, 0, -1, withscores=True), "reading requeued groups"),
        )
        return dict(sorted((int(ordinal), int(round_)) for ordinal, round_ in pairs))

    # -- one round trip each ------------------------------------------------------------------------------------------

    def _stream_keys(self, group_id: str) -> list[str]:
        keys = self._keys
        return [keys.traj, keys.dedupe, keys.stats, keys.closed, keys.open, keys.requeued, keys.members(group_id)]

    async def _put_when_room(self, t: Trajectory, payload: bytes) -> str:
        """Poll with the cheap check until there is room; only then send the payload."""
        pause_s, began = FULL_FIRST_S, time.monotonic()
        self._waiting += 1
        try:
            while True:
                answer = await self._ask_room(t, len(payload))
                if answer == "ROOM":
                    answer = await self._try_put(t, payload)
                if answer != "FULL":
                    return answer
                if self._on_wait is not None:
                    self._on_wait("stream:full", time.monotonic() - began)
                await asyncio.sleep(max(pause_s, self._waiting / _POLLS_PER_S) * random.uniform(0.5, 1.0))  # noqa: S311
                pause_s = min(2 * pause_s, FULL_MAX_S)
        finally:
            self._waiting -= 1

    async def _ask_room(self, t: Trajectory, size: int) -> str:
        keys = self._stream_keys(t.group_id)
        args = [self._keys.prefix, t.id, t.group_id, t.ordinal, self._max_items, self._max_bytes, size]
        answer = await self._call(lambda: self._run(self._room, keys, args), f"asking room for {t.id}")
        return cast("bytes", answer).decode()

    async def _try_put(self, t: Trajectory, payload: bytes) -> str:
        side = int(len(payload) > SIDE_KEY_BYTES)
        args = [self._keys.prefix, t.id, t.group_id, t.ordinal, self._max_items, self._max_bytes, side, payload]
        keys = [*self._stream_keys(t.group_id), self._keys.blob(t.id)]
        try:
            answer = await self._call(lambda: self._run(self._put, keys, args), f"putting {t.id}")
        except StreamError as error:
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
            log.warning("Redis reached its maxmemory, waiting for the learner: id=%s", t.id)
            return "FULL"
        return cast("bytes", answer).decode()

    async def _run(self, script: Any, keys: list[str], args: list[Any]) -> Any:
        return await self._lines.script(script.script, script.sha, keys, args)

    async def _call(self, call: Callable[[], Any], what: str) -> Any:
        async def once() -> Any:
            async with self._slots:
                return await call()

        return await retry_async(once, what, patience_s=self._patience_s, on_wait=self._on_wait)
