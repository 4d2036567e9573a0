"""The nouns, in the order data meets them: Task, Generation, Turn, Segment, Trajectory, GroupClose; PolicyRecord.

Every per-token array is ``[T]``; entry ``t`` describes token ``t``. Nothing here knows Redis, HTTP or torch.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Message: TypeAlias = dict[str, Any]
"""A chat message as a Hugging Face template reads it: ``role``, ``content``, for the assistant ``tool_calls``."""

Stop: TypeAlias = str
"""Why a rollout ended: ``answered | max_turns | max_tokens | tool_limit | deadline | aborted | error:<kind>``."""

FinishReason: TypeAlias = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row: a prompt and what scoring needs. The ground truth never reaches the model or a tool."""

    id: str
    """Stable name of the row, e.g. ``openai/gsm8k/train/17``."""
    prompt: Sequence[Message]
    data_source: str
    ground_truth: Any = None
    split: str = "train"
    agent: str | None = None
    """Name of the agent loop; None takes the run's default."""
    extra_info: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tools_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tool_selection: Sequence[str] | None = None
    """Names of the tools offered for this row; None offers all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the policy samples. Logprobs are those of the temperature-scaled distribution."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What an engine sampled for one request (possibly stitched from several servers)."""

    ids: list[int]
    logprobs: list[float]
    """Of the sampled token, natural log, temperature-scaled."""
    versions: list[int]
    """Policy version that sampled each token, as the server reported it."""
    finish: FinishReason
    server: str
    """Url of the server that finished it."""
    cached_tokens: int = 0
    """Prompt tokens that were not computed again."""
    ms: float = 0.0


class SampledTokens(NamedTuple):
    """The newest tokens of a generation that goes on, each with what `Generation` says of it."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[int]
    server: str
    """Url of the server that sampled them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One step of a rollout: a generation (``kind='model'``) or one tool result (``kind='tool'``)."""

    kind: Literal["model", "tool", "env"]
    segment: int
    start: int
    """First token of the turn within its segment."""
    end: int
    """One past its last token."""
    ms: float
    server: str = ""
    finish: str = ""
    name: str = ""
    arguments: str = ""
    """The call's arguments as the model wrote them (JSON text)."""
    ok: bool = True
    error_kind: str = ""
    """Empty, or ``parse | unknown_tool | arguments | tool | tool_infra | timeout | sandbox``."""
    text: str = ""
    """What the model wrote or what the tool answered, decoded for people; never read back."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segment:
    """A run of tokens that was only ever extended. Most trajectories have one."""

    ids: NDArray[np.int32]
    """[T] prompt, sampled and observed tokens, as the model saw them."""
    mask: NDArray[np.bool_]
    """[T] response mask: True only where the policy sampled the token."""
    logprobs: NDArray[np.float32]
    """[T] as the server reported; 0 where the mask is False."""
    versions: NDArray[np.int32]
    """[T] policy version that sampled the token; -1 where the mask is False."""
    prompt_length: int
    """Tokens before the first one the policy could have sampled."""

    def __post_init__(self) -> None:
        n = len(self.ids)
        for name in ("mask", "logprobs", "versions"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"segment has {n} ids but {len(getattr(self, name))} {name}; they must match")
        if not 0 <= self.prompt_length <= n:
            raise ValueError(f"prompt_length={self.prompt_length} is outside the segment's {n} tokens")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """The finished, token-level record of one rollout: the only thing the stream carries besides group closes."""

    id: str
    """``{task_id}/{ordinal}/{sample_index}/{attempt}``: a retry of the same work has the same id."""
    task_id: str
    group_id: str
    """``{task_id}/{ordinal}``."""
    ordinal: int
    """Position of the group in the run's task order."""
    sample_index: int
    attempt: int
    env: str
    agent: str
    data_source: str
    split: str
    segments: tuple[Segment, ...]
    reward: float
    reward_terms: Mapping[str, float]
    turn_rewards: tuple[tuple[int, int, float], ...] = ()
    """Per-turn rewards as (segment, token, value)."""
    turns: tuple[Turn, ...] = ()
    stop: Stop = "answered"
    created: float = 0.0
    """Unix seconds at which the rollout started."""
    finished: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(len(s.ids) for s in self.segments)

    @property
    def num_sampled(self) -> int:
        return int(sum(s.mask.sum() for s in self.segments))

    @property
    def min_version(self) -> int:
        """Version of the oldest sampled token; -1 when nothing was sampled."""
        return min((int(s.versions[s.mask].min()) for s in self.segments if s.mask.any()), default=-1)

    @property
    def max_version(self) -> int:
        return max((int(s.versions[s.mask].max()) for s in self.segments if s.mask.any()), default=-1)


def content_digest(trajectory: Trajectory) -> str:
    """``sha256:<hex>`` over ids, mask, logprobs and versions of all segments: equal digests mean equal training data."""
    digest = hashlib.sha256(f"segments={len(trajectory.segments)}".encode())
    for segment in trajectory.segments:
        digest.update(b"%d:" % len(segment.ids))
        for array, dtype in ((segment.ids, "<i4"), (segment.mask, "u1"), (segment.logprobs, "<f4"), (segment.versions, "<i4")):
            digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupClose:
    """Says that a group is complete: which members came, which failed and why."""

    group_id: str
    task_id: str
    ordinal: int
    size: int
    """Rollouts that were asked for."""
    members: tuple[str, ...]
    """Ids of the trajectories on the stream."""
    failed: Mapping[str, str] = field(default_factory=dict[str, str])
    """Trajectory id -> reason, for rollouts that produced nothing to train on."""
    baseline: float | None = None
    """Reward of one greedy rollout of the task, where the estimator compares with it (remax); that rollout is not a member."""

    @property
    def id(self) -> str:
        return f"{self.group_id}/close"


AGAIN_MARK = "+again"
"""Between a group's ordinal and its round, where it was given back to be sampled again."""


REQUEUED = "stale:requeued"
"""Outcome of a member whose group was over-stale and given back to be sampled again; a kind of ``stale``."""


def group_id_of(task_id: str, ordinal: int, round_: int = 0) -> str:
    """The id of a task's group; another one each time the group is given back, so that no id ever names two samplings."""
    return f"{task_id}/{ordinal}" + (f"{AGAIN_MARK}{round_}" if round_ else "")


def round_of(group_id: str) -> int | None:
    """How often the group was given back before; None for an id that no `group_id_of` made (a replayed dead letter's, say)."""
    ordinal, mark, again = group_id.rpartition("/")[2].partition(AGAIN_MARK)
    if not ordinal.isdigit() or (mark and not again.isdigit()):
        return None
    return int(again) if mark else 0


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """The siblings of one task, assembled on the learner's side."""

    close: GroupClose
    trajectories: tuple[Trajectory, ...]

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    @property
    def rewards(self) -> list[float]:
        return [t.reward for t in self.trajectories]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRecord:
    """What the learner announces: every server must serve exactly this."""

    run_epoch: int
    """Incarnation of the learner; a server never goes back to an older epoch."""
    version: int
    """Optimizer steps behind the weights; 0 is the start."""
    kind: Literal["full", "delta", "lora"] = "full"
    path: str
    """Hugging Face directory (safetensors); for ``delta`` one with what changed since an earlier snapshot beside it."""
    digest: str
    """``sha256:<hex>`` over the weight files' bytes, in name order; for ``delta`` of the files that it gives."""

    @property
    def label(self) -> str:
        """The ``weight_version`` string that servers report, e.g. ``e1-v12``."""
        return f"e{self.run_epoch}-v{self.version}"


def version_of_label(label: str) -> int:
    """The policy version in a server's ``weight_version`` string; -1 when it is not one of ours."""
    epoch, dash, version = label.partition("-v")
    return int(version) if dash and epoch[:1] == "e" and epoch[1:].isdigit() and version.isdigit() else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call found in sampled text."""

    name: str
    arguments: Mapping[str, Any]
    raw: str = ""
    """The text between the call's markers."""
    id: str = ""
    """The id that the model gave the call, in formats that have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """A call and what came of it, as scoring sees it."""

    name: str
    arguments: Mapping[str, Any]
    ok: bool
    error_kind: str
    result: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """What scoring sees of a finished rollout. ``assistant_text`` and ``final`` hold only what the policy wrote."""

    task: Task
    assistant_text: str
    """All assistant text, turns joined by newlines, tool calls included as written."""
    final: str
    """Assistant text after the last tool result."""
    transcript: str
    """Everything after the prompt, tool results included."""
    calls: Sequence[CallRecord]
    stop: Stop
    num_turns: int
    texts: Sequence[str] = ()
    """What the assistant wrote, one entry a turn."""
    state: Any = None
    """What the Env's ``open`` returned for this rollout (loop ``env``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A reward and its named terms. ``correct`` is the success measure that eval reports."""

    correct: float
    terms: Mapping[str, float] = field(default_factory=dict[str, float])
    """Further named terms that are added to the reward."""
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Not part of the reward: logged (``pred``, ``strict``, ``lenient`` …)."""

    @property
    def reward(self) -> float:
        return float(self.correct) + float(sum(self.terms.values()))
