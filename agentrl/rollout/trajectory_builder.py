"""Turns in, Trajectory out. Owns the response mask and the rule that a conversation is only ever extended.

Ids enter in two ways: `append_sampled` takes what an engine returned (mask True, its logprobs, its versions) and
`append_observed` takes ids of rendered text (mask False). No id that was appended is changed, moved or removed.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from agentrl.errors import GenerationError
from agentrl.types import Generation, Segment, Stop, Trajectory, Turn

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Sampled:
    """What an engine returned for ``ids[start : start + len(logprobs)]`` of its segment."""

    start: int
    logprobs: "array[float]"
    versions: "array[int] | int"
    """One number where one policy sampled it all, which is nearly always so."""


@dataclass(slots=True)
class _OpenSegment:
    prompt_length: int
    ids: "array[int]"
    sampled: list[_Sampled] = field(default_factory=list[_Sampled])

    @property
    def num_response_tokens(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def num_sampled(self) -> int:
        return sum(len(span.logprobs) for span in self.sampled)

    @classmethod
    def reopened(cls, segment: Segment) -> "_OpenSegment":
        edges = np.flatnonzero(np.diff(segment.mask.astype(np.int8), prepend=0, append=0)).tolist()
        sampled = [
            _Sampled(start, array("d", segment.logprobs[start:end].tolist()), array("q", segment.versions[start:end].tolist()))
            for start, end in zip(edges[::2], edges[1::2], strict=True)
        ]
        return cls(prompt_length=segment.prompt_length, ids=_checked_ids(segment.ids.tolist()), sampled=sampled)

    def close(self) -> Segment:
        n = len(self.ids)
        mask, logprobs = np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.float32)
        versions = np.full(n, -1, dtype=np.int32)
        for span in self.sampled:
            tokens = slice(span.start, span.start + len(span.logprobs))
            mask[tokens], logprobs[tokens], versions[tokens] = True, span.logprobs, span.versions
        return Segment(
            ids=np.array(self.ids, dtype=np.int32),
            mask=mask,
            logprobs=logprobs,
            versions=versions,
            prompt_length=self.prompt_length,
        )


class TrajectoryBuilder:
    """The token-level record of one rollout while it grows.

    Args:
        prompt_ids: the rendered prompt; None where the first segment opens later (`new_segment`).
        require_versions: refuse generations whose server reported no policy version. Off for evaluating servers that
            serve no policy of ours.

    Raises:
        GenerationError: the prompt is empty or holds something that is no token id.
    """

    def __init__(self, prompt_ids: Sequence[int] | None, *, require_versions: bool = True) -> None:
        self._require_versions = require_versions
        self._segments: list[_OpenSegment] = []
        self.turns: list[Turn] = []
        if prompt_ids is not None:
            self.new_segment(prompt_ids)

    @property
    def token_ids(self) -> "array[int]":
        """The current segment's ids: what the next generation continues. Not to be changed by the caller.

        An array, because all of it is sent with every turn: a client reads it as bytes rather than number by number.
        """
        return self._segments[-1].ids

    @property
    def segment(self) -> int:
        """Index of the current segment."""
        return len(self._segments) - 1

    @property
    def prompt_length(self) -> int:
        """Prompt tokens of the current segment."""
        return self._segments[-1].prompt_length

    @property
    def num_response_tokens(self) -> int:
        """Tokens after the prompts, sampled and observed, over all segments."""
        num_tokens = 0
        for segment in self._segments:
            num_tokens += segment.num_response_tokens
        return num_tokens

    @property
    def num_sampled(self) -> int:
        return sum(s.num_sampled for s in self._segments)

    def ids_of(self, segment: int) -> "array[int]":
        """Ids of one segment. Not to be changed by the caller."""
        return self._segments[segment].ids

    def response_ids(self) -> "array[int]":
        """Everything after the prompts, segment by segment."""
        ids = array("I")
        for segment in self._segments:
            ids.extend(segment.ids[segment.prompt_length :])
        return ids

    def tokens_left(self, max_tokens: int) -> int:
        """Response tokens (sampled and observed) that still fit under ``max_tokens``."""
        return max(0, max_tokens - self.num_response_tokens)

    def new_segment(self, prompt_ids: Sequence[int]) -> None:
        """Start another segment: an agent rewrote its history, so its tokens no longer extend the last segment's."""
        if not prompt_ids:
            raise GenerationError("the prompt has no tokens; check the task's messages and the chat template")
        self._segments.append(_OpenSegment(prompt_length=len(prompt_ids), ids=_checked_ids(prompt_ids)))

    def append_sampled(self, generation: Generation, *, segment: int = -1) -> tuple[int, int]:
        """Extend by what an engine sampled; returns the span [start, end) in the segment, by default the current one.

        Raises:
            GenerationError: ids, logprobs and versions differ in length or hold values that cannot be right.
        """
        num_ids, num_logprobs, num_versions = len(generation.ids), len(generation.logprobs), len(generation.versions)
        if not num_ids == num_logprobs == num_versions:
            raise GenerationError(
                f"{generation.server} returned {num_ids} ids, {num_logprobs} logprobs and {num_versions} versions; they must "
                "match. Check that the server returns a logprob and a version for every token"
            )
        logprobs = array("d", generation.logprobs)
        # The sum is the quick test: it is not finite if one of them is not.
        if not math.isfinite(np.add.reduce(np.frombuffer(logprobs))):
            bad = [logprob for logprob in logprobs if not math.isfinite(logprob)]
            if bad:
                raise GenerationError(
                    f"{generation.server} returned {len(bad)} of {num_ids} logprobs that are not finite (first: {bad[0]}). "
                    "Check the server's numerics; such a turn cannot be trained on"
                )
        versions, lowest = _as_versions(generation.versions)
        if self._require_versions and lowest < 0:
            raise GenerationError(
                f"{generation.server} reported no policy version for some tokens; it does not serve a policy of this run. "
                "Wait until the reconciler has brought it to the policy record"
            )
        ids = _checked_ids(generation.ids)
        record = self._segments[segment]
        start = len(record.ids)
        record.ids.extend(ids)
        record.sampled.append(_Sampled(start, logprobs, versions))
        return start, len(record.ids)

    def append_observed(self, ids: Sequence[int], *, segment: int = -1) -> tuple[int, int]:
        """Extend by ids of rendered text, never trained on; returns the span [start, end) in the segment, by default the current."""
        record = self._segments[segment]
        start = len(record.ids)
        record.ids.extend(_checked_ids(ids))
        return start, len(record.ids)

    def segments(self) -> tuple[Segment, ...]:
        """Everything appended so far."""
        return tuple(s.close() for s in self._segments)

    def restore(self, segments: Sequence[Segment], turns: Sequence[Turn]) -> None:
        """Go on from what `segments` and `turns` of an earlier builder gave, in place of what is here."""
        self._segments = [_OpenSegment.reopened(s) for s in segments]
        self.turns = list(turns)

    def add_turn(self, turn: Turn) -> None:
        """Record what a span was."""
        self.turns.append(turn)

    def finish(
        self,
        *,
        id: str,
        task_id: str,
        group_id: str,
        ordinal: int,
        sample_index: int,
        attempt: int,
        env: str,
        agent: str,
        data_source: str,
        split: str,
        reward: float,
        reward_terms: Mapping[str, float],
        stop: Stop,
        created: float,
        finished: float,
        turn_rewards: Sequence[tuple[int, int, float]] = (),
    ) -> Trajectory:
        """The trajectory of everything appended so far. ``created`` and ``finished`` are Unix seconds."""
        return Trajectory(
            id=id,
            task_id=task_id,
            group_id=group_id,
            ordinal=ordinal,
            sample_index=sample_index,
            attempt=attempt,
            env=env,
            agent=agent,
            data_source=data_source,
            split=split,
            segments=self.segments(),
            reward=float(reward),
            reward_terms=dict(reward_terms),
            turn_rewards=tuple(turn_rewards),
            turns=tuple(self.turns),
            stop=stop,
            created=created,
            finished=finished,
        )


def _as_versions(versions: Sequence[int]) -> "tuple[array[int] | int, int]":
    """The versions as they are kept, and the lowest of them."""
    if versions and versions.count(versions[0]) == len(versions):
        return versions[0], versions[0]
    return array("q", versions), min(versions, default=0)


def _checked_ids(ids: Sequence[int]) -> "array[int]":
    """A copy of the ids. Runs over every token, hence no loop in Python."""
    try:
        checked = array("I", ids)  # of its integer types, the one that converts without parsing a format
    except (TypeError, OverflowError) as error:
        raise GenerationError(f"one of {len(ids)} values is no token id ({error}); ids lie in [0, {_INT32_MAX}]") from error
    if len(checked) and np.maximum.reduce(np.frombuffer(checked, np.uint32)) > _INT32_MAX:
        raise GenerationError(f"{max(checked)} is no token id; ids lie in [0, {_INT32_MAX}]")
    return checked
