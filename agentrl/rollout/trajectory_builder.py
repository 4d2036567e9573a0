"""Turns in, Trajectory out. Owns the response mask and the rule that a conversation is only ever extended.

Ids enter in two ways: `append_sampled` takes what an engine returned (mask True, its logprobs, its versions) and
`append_observed` takes ids of rendered text (mask False). No id that was appended is changed, moved or removed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from agentrl.errors import GenerationError
from agentrl.types import Generation, Segment, Stop, Trajectory, Turn

_INT32_MAX = 2**31 - 1


@dataclass(slots=True)
class _OpenSegment:
    prompt_length: int
    ids: list[int]
    mask: list[bool] = field(default_factory=list[bool])
    logprobs: list[float] = field(default_factory=list[float])
    versions: list[int] = field(default_factory=list[int])

    @classmethod
    def reopened(cls, segment: Segment) -> "_OpenSegment":
        n = segment.prompt_length
        return cls(
            prompt_length=n,
            ids=segment.ids.tolist(),
            mask=segment.mask[n:].tolist(),
            logprobs=segment.logprobs[n:].tolist(),
            versions=segment.versions[n:].tolist(),
        )

    def close(self) -> Segment:
        n = self.prompt_length
        return Segment(
            ids=np.asarray(self.ids, dtype=np.int32),
            mask=np.asarray([False] * n + self.mask, dtype=np.bool_),
            logprobs=np.asarray([0.0] * n + self.logprobs, dtype=np.float32),
            versions=np.asarray([-1] * n + self.versions, dtype=np.int32),
            prompt_length=n,
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
    def token_ids(self) -> list[int]:
        """The current segment's ids: what the next generation continues. Not to be changed by the caller."""
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
        return sum(len(s.mask) for s in self._segments)

    @property
    def num_sampled(self) -> int:
        return sum(sum(s.mask) for s in self._segments)

    def ids_of(self, segment: int) -> list[int]:
        """Ids of one segment. Not to be changed by the caller."""
        return self._segments[segment].ids

    def response_ids(self) -> list[int]:
        """Everything after the prompts, segment by segment."""
        return [i for s in self._segments for i in s.ids[s.prompt_length :]]

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
        bad = [x for x in generation.logprobs if not math.isfinite(x)]
        if bad:
            raise GenerationError(
                f"{generation.server} returned {len(bad)} of {num_ids} logprobs that are not finite (first: {bad[0]}). "
                "Check the server's numerics; such a turn cannot be trained on"
            )
        if self._require_versions and any(v < 0 for v in generation.versions):
            raise GenerationError(
                f"{generation.server} reported no policy version for some tokens; it does not serve a policy of this run. "
                "Wait until the reconciler has brought it to the policy record"
            )
        ids = _checked_ids(generation.ids)
        record = self._segments[segment]
        start = len(record.ids)
        record.ids.extend(ids)
        record.mask.extend([True] * num_ids)
        record.logprobs.extend(float(x) for x in generation.logprobs)
        record.versions.extend(int(v) for v in generation.versions)
        return start, len(record.ids)

    def append_observed(self, ids: Sequence[int], *, segment: int = -1) -> tuple[int, int]:
        """Extend by ids of rendered text, never trained on; returns the span [start, end) in the segment, by default the current."""
        record = self._segments[segment]
        start = len(record.ids)
        record.ids.extend(_checked_ids(ids))
        record.mask.extend([False] * len(ids))
        record.logprobs.extend([0.0] * len(ids))
        record.versions.extend([-1] * len(ids))
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


def _checked_ids(ids: Sequence[int]) -> list[int]:
    checked = [int(i) for i in ids]
    if any(i < 0 or i > _INT32_MAX for i in checked):
        wrong = next(i for i in checked if i < 0 or i > _INT32_MAX)
        raise GenerationError(f"{wrong} is no token id; ids lie in [0, {_INT32_MAX}]")
    return checked
