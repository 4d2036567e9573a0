"""Completed turns of unfinished rollouts, kept outside the process, so that a restarted ``serve`` goes on from them.

A snapshot is taken after each turn whose tools have answered, or the environment: a rollout continues there by generating. What
a tool class, a tool's ``ctx.state`` or an Env that does not save holds cannot be brought back, so a rollout that used such
starts again, and its tokens are counted as wasted. Losing a snapshot costs work, never correctness, so a store that fails is a warning.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from agentrl.errors import AgentRLError
from agentrl.rollout.context import ResultSpan
from agentrl.rollout.trajectory_builder import TrajectoryBuilder
from agentrl.types import CallRecord, Segment, Turn

logger = logging.getLogger(__name__)

SCHEMA = 1
MAX_BYTES = 8 << 20
"""A larger snapshot is not kept: one rollout must not crowd out the stream."""
STORE_TIMEOUT_S = 5.0
_ARRAYS = (("ids", "<i4"), ("mask", "u1"), ("logprobs", "<f4"), ("versions", "<i4"))


class PartialStore(Protocol):
    """Where snapshots are, by trajectory id."""

    async def load(self, trajectory_id: str) -> bytes | None: ...

    async def save(self, trajectory_id: str, data: bytes) -> None: ...

    async def delete(self, *trajectory_ids: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a loop knows besides tokens: everything of it comes back with them."""

    num_turns: int
    num_invalid: int
    tool_rewards: float
    final_from: int
    texts: list[str]
    calls: list[CallRecord]
    result_spans: list[ResultSpan]
    turn_rewards: list[tuple[int, int, float]]
    created: float
    env_saved: str | None = None
    """What ``Env.save`` gave, as JSON; None in loops without an Env."""


class _Snapshot(msgspec.Struct, forbid_unknown_fields=True):
    v: int
    num_sampled: int
    segments: list[dict[str, Any]]
    """Empty where the rollout cannot go on: then only ``num_sampled`` is of use."""
    turns: list[Turn]
    progress: Progress | None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Snapshot)


def snapshot(builder: TrajectoryBuilder, progress: Progress | None) -> bytes:
    """The bytes of a rollout so far; without ``progress`` it says only how much was sampled."""
    segments: list[dict[str, Any]] = []
    for segment in builder.segments() if progress is not None else ():
        arrays = {name: np.ascontiguousarray(getattr(segment, name), dtype=kind).tobytes() for name, kind in _ARRAYS}
        segments.append({**arrays, "prompt_length": segment.prompt_length})
    turns = builder.turns if progress is not None else []
    return _encoder.encode(
        {
            "v": SCHEMA, "num_sampled": builder.num_sampled, "segments": segments, "turns": turns,
            "progress": None if progress is None else asdict(progress),
        }
    )  # fmt: skip


def restore(data: bytes, builder: TrajectoryBuilder, *, with_env: bool) -> tuple[Progress | None, int]:
    """Bring a rollout back into a builder that holds its prompt only.

    Args:
        data: the snapshot.
        builder: of the rollout.
        with_env: the loop has an Env, whose state must come back too.

    Returns:
        Its progress and the tokens it had sampled; no progress where it cannot go on: it must start again, the builder is as
        it was.
    """
    try:
        kept = _decoder.decode(data)
        if kept.v != SCHEMA or kept.progress is None or not kept.segments:
            return None, kept.num_sampled
        if (kept.progress.env_saved is not None) != with_env:  # another loop's
            return None, kept.num_sampled
        segments = [_segment(fields) for fields in kept.segments]
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
        logger.warning("partial_rollout_unreadable: %s. It starts again", error)
        return None, 0
    if segments[0].ids[: segments[0].prompt_length].tolist() != builder.token_ids.tolist():
        return None, kept.num_sampled  # the row, the tools or the template changed
    builder.restore(segments, kept.turns)
    return kept.progress, kept.num_sampled


def _segment(fields: Mapping[str, Any]) -> Segment:
    arrays: dict[str, Any] = {name: np.frombuffer(fields[name], dtype=kind) for name, kind in _ARRAYS}
    arrays["mask"] = arrays["mask"].astype(np.bool_)
    return Segment(**arrays, prompt_length=int(fields["prompt_length"]))


class PartialRollouts:
    """The store with its failures contained, and what came of the snapshots."""

    def __init__(self, store: PartialStore) -> None:
        self._store = store
        self.resumed = self.resumed_tokens = self.wasted_tokens = 0

    def stats(self) -> dict[str, int]:
        return {"resumed": self.resumed, "resumed_tokens": self.resumed_tokens, "wasted_tokens": self.wasted_tokens}

    async def load(self, trajectory_id: str, builder: TrajectoryBuilder, *, with_env: bool = False) -> Progress | None:
        """Bring back what there is of a rollout (see `restore`); None starts it from its prompt."""
        data = await self._try(self._store.load(trajectory_id))
        if not isinstance(data, bytes):
            return None
        progress, num_sampled = restore(data, builder, with_env=with_env)
        if progress is None:
            self.wasted_tokens += num_sampled
            return None
        self.resumed += 1
        self.resumed_tokens += num_sampled
        logger.info("rollout_resumed id=%s turns=%d tokens=%d", trajectory_id, progress.num_turns, num_sampled)
        return progress

    async def save(self, trajectory_id: str, data: bytes) -> None:
        if len(data) <= MAX_BYTES:
            await self._try(self._store.save(trajectory_id, data))

    async def delete(self, *trajectory_ids: str) -> None:
        await self._try(self._store.delete(*trajectory_ids))

    async def _try(self, call: Any) -> Any:
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                return await call
        except (AgentRLError, OSError, TimeoutError) as error:
            logger.warning("partial_rollout_store_failed: %s: %s. Only work is at stake", type(error).__name__, error)
            return None
