"""Completed turns of unfinished rollouts: one field per trajectory of the hash ``partial``, gone once the trajectory is put."""

from collections.abc import Awaitable
from typing import Any, cast

import redis.asyncio
from redis.exceptions import RedisError

from agentrl.errors import StreamError
from agentrl.stream.keys import Keys
from agentrl.supervise import heeding_cancellation


class RedisPartials:
    """The ``PartialStore`` on Redis. One attempt per call: whoever calls knows that only work is at stake.

    Raises, in every method:
        StreamError: the server did not answer, or refused.
    """

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self._client: Any = client
        self._key = keys.partial

    async def load(self, trajectory_id: str) -> bytes | None:
        return cast("bytes | None", await self._call(self._client.hget(self._key, trajectory_id)))

    async def save(self, trajectory_id: str, data: bytes) -> None:
        await self._call(self._client.hset(self._key, trajectory_id, data))

    async def delete(self, *trajectory_ids: str) -> None:
        if trajectory_ids:
            await self._call(self._client.hdel(self._key, *trajectory_ids))

    async def _call(self, call: Awaitable[Any]) -> Any:
        try:
            with heeding_cancellation():
                return await call
        except RedisError as error:
            raise StreamError(f"partial rollouts: {error}") from error
