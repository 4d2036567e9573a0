"""What the learner announces and what admission reads back: the policy record and the progress of the run.

Written only by ``TrajectoryConsumer.publish_policy`` and ``report_progress``, which are fenced: the word of a learner
that was replaced never arrives here.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import redis
import redis.asyncio

from agentrl.errors import StreamError
from agentrl.stream.connection import retry, retry_async
from agentrl.stream.keys import Keys
from agentrl.types import PolicyRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where the run stands, as of one instant. Groups in the pipeline: ``open + closed_groups - consumed_groups``."""

    run_epoch: int
    """Incarnation of the learner; 0 before the first one."""
    version: int
    """Last announced policy version; 0 before the first announcement, as it is for the start."""
    consumed_groups: int
    """Groups whose fate the learner has decided, committed or not, as it last reported."""
    closed_groups: int
    """Groups that ever closed."""
    committed_groups: int
    """Groups that left the stream behind a checkpoint; never above ``consumed_groups`` for long."""
    items: int
    """Entries on the stream, closes included."""
    bytes: int
    """Encoded bytes of those entries."""


def policy_fields(record: PolicyRecord) -> list[str]:
    """The policy hash's fields and values, flat."""
    return [
        "run_epoch",
        str(record.run_epoch),
        "version",
        str(record.version),
        "kind",
        record.kind,
        "path",
        record.path,
        "digest",
        record.digest,
        "published",
        f"{time.time():.3f}",
    ]


async def read_policy(client: redis.asyncio.Redis, keys: Keys, *, patience_s: float | None = 30.0) -> PolicyRecord | None:
    """The announced policy, or None before the first announcement. Waits out a restart of the server."""
    untyped: Any = client
    answer = await retry_async(lambda: untyped.hgetall(keys.policy), "reading the policy", patience_s=patience_s)
    return _policy(cast("dict[bytes, bytes]", answer))


def read_policy_sync(client: redis.Redis, keys: Keys, *, patience_s: float | None = 30.0) -> PolicyRecord | None:
    """``read_policy`` for processes without a loop."""
    answer = retry(lambda: client.hgetall(keys.policy), "reading the policy", patience_s=patience_s)
    return _policy(cast("dict[bytes, bytes]", answer))


async def read_progress(client: redis.asyncio.Redis, keys: Keys, *, patience_s: float | None = 30.0) -> Progress:
    """Where the run stands, in one round trip. Waits out a restart of the server."""
    untyped: Any = client

    async def once() -> list[Any]:
        async with untyped.pipeline(transaction=True) as pipe:
            return await _queue_progress(pipe, keys).execute()

    return _progress(await retry_async(once, "reading progress", patience_s=patience_s))


def read_progress_sync(client: redis.Redis, keys: Keys, *, patience_s: float | None = 30.0) -> Progress:
    """``read_progress`` for processes without a loop."""

    def once() -> list[Any]:
        with client.pipeline(transaction=True) as pipe:
            return _queue_progress(pipe, keys).execute()

    return _progress(retry(once, "reading progress", patience_s=patience_s))


def _queue_progress(pipe: Any, keys: Keys) -> Any:
    pipe.hgetall(keys.progress)
    pipe.hmget(keys.stats, "closed_groups", "committed_groups", "bytes")
    pipe.xlen(keys.traj)
    return pipe


def _progress(answers: list[Any]) -> Progress:
    learner = cast("Mapping[bytes, bytes]", answers[0])
    closed, committed, size = (int(value or 0) for value in answers[1])
    return Progress(
        run_epoch=int(learner.get(b"run_epoch", 0)),
        version=int(learner.get(b"version", 0)),
        consumed_groups=int(learner.get(b"consumed_groups", 0)),
        closed_groups=closed,
        committed_groups=committed,
        items=int(answers[2]),
        bytes=size,
    )


def _policy(fields: Mapping[bytes, bytes]) -> PolicyRecord | None:
    if not fields:
        return None
    try:
        return PolicyRecord(
            run_epoch=int(fields[b"run_epoch"]),
            version=int(fields[b"version"]),
            kind=cast("Literal['full', 'delta', 'lora']", fields[b"kind"].decode()),
            path=fields[b"path"].decode(),
            digest=fields[b"digest"].decode(),
        )
    except (KeyError, ValueError) as error:
        raise StreamError(f"the policy record is malformed ({error!r}): was it written by another program?") from error
