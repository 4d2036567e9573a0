"""What one ``serve`` knows of its servers, for the rollout processes that share them; and which of those have seen it.

One process starts the servers and brings them to the policy. The others must know what each server serves, and above all that an
update is coming *before* a response can carry the new label: without that, they would take the new weights for a restarted server's.
So the owner posts the state with a growing number, and waits until every living reader has repeated that number.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import msgspec
import redis.asyncio

from agentrl.errors import StreamError
from agentrl.stream.connection import retry_async
from agentrl.stream.keys import Keys

READER_GONE_S: Final = 5.0
"""A reader that has not moved for this long is not waited for."""

_STATE: Final = "state"
_SEEN: Final = "seen:"


class PostedServer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server, as its owner sees it."""

    url: str
    capacity: float
    incarnation: int
    """Grows when the engine behind the url is a new process."""
    verified: str | None
    """The label that the server was asked for and reported; None takes no traffic."""
    installing: str | None
    is_draining: bool
    adapter: str | None = None
    """LoRA adapter that requests must ask for."""
    labels: tuple[str, ...] = ()
    """The newest that were verified there, oldest first: requests in flight may carry tokens of all of them."""


class FleetState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All servers, and which labels may be served."""

    servers: tuple[PostedServer, ...] = ()
    required: str | None = None
    also: tuple[str, ...] = ()
    coming: tuple[str, ...] = ()
    """Labels that responses may carry from now on, on any server: the last that was announced, and the one before, with which an update
    may have begun meanwhile."""
    run_epoch: int = 0
    version: int = -1
    """Of the policy that the servers are being brought to; -1 before the first."""


@dataclass(frozen=True, slots=True)
class Posted:
    """A state and its number."""

    number: int
    state: FleetState


class FleetBoard:
    """The ``fleet`` hash of a run, for its owner and its readers."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self._client: Any = client
        self._key = keys.fleet
        self._beats: dict[str, tuple[str, float]] = {}
        self._beat = 0

    # the owner

    async def post(self, number: int, state: FleetState) -> None:
        """Replace the state."""
        value = msgspec.json.encode((number, state))
        await retry_async(lambda: self._client.hset(self._key, _STATE, value), "posting the servers", patience_s=None)

    async def lagging(self, number: int) -> list[str]:
        """Living readers that have not seen ``number`` yet."""
        fields = await retry_async(lambda: self._client.hgetall(self._key), "reading the fleet's readers", patience_s=None)
        now = time.monotonic()
        behind: list[str] = []
        for name, value in cast("Mapping[bytes, bytes]", fields).items():
            reader = name.decode()
            if not reader.startswith(_SEEN):
                continue
            beat = value.decode()
            if self._beats.get(reader, ("", 0.0))[0] != beat:
                self._beats[reader] = (beat, now)
            is_alive = now - self._beats[reader][1] < READER_GONE_S
            if is_alive and int(beat.partition(":")[0]) < number:
                behind.append(reader.removeprefix(_SEEN))
        return behind

    async def clear(self) -> None:
        """Take the board down: readers park until somebody posts again."""
        await retry_async(lambda: self._client.delete(self._key), "clearing the servers", patience_s=5.0)

    # a reader

    async def read(self) -> Posted | None:
        """The state, or None when nobody owns servers now.

        Raises:
            StreamError: the entry was written by another version of this program.
        """
        value = await retry_async(lambda: self._client.hget(self._key, _STATE), "reading the servers", patience_s=None)
        if value is None:
            return None
        try:
            number, state = msgspec.json.decode(cast("bytes", value), type=tuple[int, FleetState])
        except msgspec.DecodeError as error:
            raise StreamError(f"{self._key}: {error}. Are all serve processes of the same version?") from error
        return Posted(number, state)

    async def saw(self, reader: str, number: int) -> None:
        """This reader acts on state ``number``; also its sign of life, so call it well within `READER_GONE_S`."""
        self._beat += 1
        value = f"{number}:{self._beat}"
        await retry_async(lambda: self._client.hset(self._key, _SEEN + reader, value), "reporting to the fleet", patience_s=None)

    async def leave(self, reader: str) -> None:
        """This reader ends."""
        await retry_async(lambda: self._client.hdel(self._key, _SEEN + reader), "leaving the fleet", patience_s=5.0)
