"""Groups in, step batches out: the staleness bound at consumption, filters, and what was dropped and why.

Every group that comes in leaves in exactly one `StepBatch`, with an outcome for each of its trajectories (invariant I7):
``trained | filtered | stale | stale:requeued | failed:<reason>``. Nothing here waits or knows Redis; `loop.py` feeds it.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from agentrl.errors import ConfigError
from agentrl.types import REQUEUED, Trajectory, TrajectoryGroup, round_of

logger = logging.getLogger(__name__)

StalenessPolicy = Literal["wait", "drop", "downweight", "requeue"]
ZeroSpread = Literal["keep", "drop", "refill"]

SPREAD_TOLERANCE = 1e-8
"""Rewards closer than this are equal: they carry no preference, only rounding."""

REFILL_FACTOR = 10
"""``refill`` looks at this many times ``groups_per_step`` before it trains with what it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """One finished trajectory of a batch."""

    trajectory: Trajectory
    group: int
    """Index of its group among the batch's rows; siblings share it."""
    staleness: int
    """Policy versions between its oldest sampled token and the learner, at consumption."""
    is_trained: bool
    """False: it counts in its group's statistics but its tokens are not in the loss."""
    weight: float = 1.0
    """Factor on its advantages (staleness policy ``downweight``)."""
    baseline: float | None = None
    """Reward of the greedy rollout of its task, where there was one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """What one step consumes: the rows it learns from, and everything that was discarded on the way."""

    groups: tuple[TrajectoryGroup, ...]
    """Every group consumed, trained or not; to be committed together."""
    rows: tuple[BatchRow, ...]
    """Finished members of the groups that are trained on; statistics use all of them."""
    outcomes: Mapping[str, str]
    """Trajectory id -> how it ended, for every member of every group."""
    version: int
    """The learner's policy version when the batch was formed."""
    counts: Mapping[str, float] = field(default_factory=dict[str, float])
    """Groups, trajectories and tokens by what became of them, as metrics."""

    @property
    def num_trained(self) -> int:
        return sum(row.is_trained for row in self.rows)


class BatchBuilder:
    """Collects groups until a step's batch is complete.

    ``add`` only collects; `build` decides with the learner's version at that moment, because that is consumption.

    Args:
        groups_per_step: groups that fill a batch. Groups without a trainable trajectory never fill a place.
        max_staleness: policy versions a trained trajectory may lag behind.
        staleness_policy: what becomes of a trajectory beyond it. ``drop``: counted as stale, not trained (it still counts in its
            group's statistics). ``downweight``: trained with its advantages times ``downweight ** excess``. ``wait``: admission
            alone bounds staleness, so the trajectory is trained and counted; the bound may then be exceeded, for instance after
            a resume from an older checkpoint. ``requeue``: its whole group is given back to be sampled again by newer weights,
            behind the next checkpoint; siblings that were sampled at different times would compare policies, not answers.
        max_requeues: times a group is given back; after that ``drop`` applies, so that a task slower than the bound cannot
            circle for ever.
        zero_spread: what becomes of a group whose rewards are all equal. ``keep``: trained with zero advantage. ``drop``: fills a
            place, is not trained. ``refill``: fills no place, so the step gets ``groups_per_step`` useful groups.
        min_group_size: finished members below which a group says nothing about its task; 1 for algorithms without groups.
        needs_baseline: a group whose greedy rollout failed cannot be trained on: its members end as ``failed:no_baseline``.
        refill_limit: groups looked at per step before training with fewer; default ``10 * groups_per_step``.

    Raises:
        ConfigError: an unknown mode.
    """

    def __init__(
        self,
        *,
        groups_per_step: int,
        max_staleness: int,
        staleness_policy: StalenessPolicy = "drop",
        zero_spread: ZeroSpread = "drop",
        min_group_size: int = 2,
        needs_baseline: bool = False,
        downweight: float = 0.5,
        max_requeues: int = 3,
        refill_limit: int | None = None,
    ) -> None:
        if staleness_policy not in ("wait", "drop", "downweight", "requeue"):
            raise ConfigError(f"staleness_policy={staleness_policy!r} is not known: use wait, drop, downweight or requeue.")
        if zero_spread not in ("keep", "drop", "refill"):
            raise ConfigError(f"zero_spread={zero_spread!r} is not known: use keep, drop or refill.")
        if groups_per_step < 1 or max_staleness < 0:
            raise ConfigError(
                f"groups_per_step={groups_per_step} must be at least 1 and max_staleness={max_staleness} at least 0."
            )
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self._staleness_policy = staleness_policy
        self._zero_spread = zero_spread
        self._min_group_size = min_group_size
        self._needs_baseline = needs_baseline
        self._downweight = downweight
        self._max_requeues = max_requeues
        self._limit = refill_limit if refill_limit is not None else REFILL_FACTOR * groups_per_step
        self._groups: list[TrajectoryGroup] = []
        self._verdicts: list[_Verdict] = []
        self._verdicts_version = 0

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, group: TrajectoryGroup) -> None:
        """Take a complete group."""
        self._groups.append(group)

    def is_full(self, version: int) -> bool:
        """Whether a batch at ``version`` is complete."""
        filled = sum(self._fills_a_place(verdict) for verdict in self._examined(version))
        if filled < self.groups_per_step and len(self._groups) >= max(self._limit, self.groups_per_step):
            logger.warning(
                "batch is short: %d of %d useful groups after %d (zero_spread=%s, max_staleness=%d); training with what there is",
                filled, self.groups_per_step, len(self._groups), self._zero_spread, self.max_staleness,
            )  # fmt: skip
            return True
        return filled >= self.groups_per_step

    def num_without_place(self, version: int) -> int:
        """Collected groups that fill no place in a batch at ``version``: others must be generated instead of them."""
        return sum(not self._fills_a_place(verdict) for verdict in self._examined(version))

    def build(self, version: int) -> StepBatch:
        """Form a batch of everything collected, and start anew.

        It may train nothing at all (every group without spread, say); the step is then a step without an update.
        """
        verdicts = self._examined(version)
        groups = self.take_collected()
        rows: list[BatchRow] = []
        outcomes: dict[str, str] = {}
        tally = Counter[str]()
        trained_groups = 0
        for verdict in verdicts:
            outcomes |= verdict.outcomes
            tally.update(verdict.counts)
            if verdict.is_trained:
                rows += [row.placed(trained_groups) for row in verdict.rows]
                trained_groups += 1
        counts: dict[str, float] = {
            "groups/consumed": len(groups), "groups/trained": trained_groups, "groups/dropped": len(groups) - trained_groups,
            "groups/requeued": 0,
            **{f"trajectories/{cause}": 0 for cause in ("trained", "filtered", "stale", "failed")},
            **{f"tokens/{cause}": 0 for cause in ("trained", "filtered", "stale", "failed")},
            **tally,
        }  # fmt: skip
        spreads = [_has_no_spread(group) for group in groups if len(group.trajectories) >= self._min_group_size]
        counts["frac_reward_zero_std"] = float(np.mean(spreads)) if spreads else 0.0
        counts["groups/effective_size/mean"] = float(np.mean([len(g.trajectories) for g in groups])) if groups else 0.0
        return StepBatch(groups=groups, rows=tuple(rows), outcomes=outcomes, version=version, counts=counts)

    def take_collected(self) -> tuple[TrajectoryGroup, ...]:
        """Give up what was collected but not built (at shutdown): it stays unacknowledged on the stream."""
        groups = tuple(self._groups)
        self._groups, self._verdicts = [], []
        return groups

    def _fills_a_place(self, verdict: "_Verdict") -> bool:
        return verdict.is_trained or (verdict.is_zero_spread and self._zero_spread == "drop")

    def _examined(self, version: int) -> "list[_Verdict]":
        """One verdict per collected group; kept until the version changes."""
        if version != self._verdicts_version:
            self._verdicts, self._verdicts_version = [], version
        self._verdicts += [self._examine(group, version) for group in self._groups[len(self._verdicts) :]]
        return self._verdicts

    def _examine(self, group: TrajectoryGroup, version: int) -> "_Verdict":
        outcomes = {member: f"failed:{reason}" for member, reason in group.close.failed.items()}
        counts = Counter({"trajectories/failed": len(outcomes)})
        finished: list[Trajectory] = []
        for trajectory in group:
            fault = _fault(trajectory)
            if fault is None:
                finished.append(trajectory)
            else:
                _count(counts, outcomes, trajectory, f"failed:{fault}")
        if self._needs_baseline and group.close.baseline is None:
            for trajectory in finished:
                _count(counts, outcomes, trajectory, "failed:no_baseline")
            return _Verdict(outcomes=outcomes, counts=counts)
        if len(finished) < self._min_group_size:
            for trajectory in finished:
                _count(counts, outcomes, trajectory, "filtered")
            return _Verdict(outcomes=outcomes, counts=counts)
        is_zero_spread = len(finished) > 1 and _spread(finished) <= SPREAD_TOLERANCE
        if is_zero_spread and self._zero_spread != "keep":
            for trajectory in finished:
                _count(counts, outcomes, trajectory, "filtered")
            return _Verdict(outcomes=outcomes, counts=counts, is_zero_spread=True)
        if self._is_given_back(group, finished, version):
            counts["groups/requeued"] += 1
            for trajectory in finished:
                counts["trajectories/over_stale"] += _staleness(trajectory, version) > self.max_staleness
                _count(counts, outcomes, trajectory, REQUEUED)
            return _Verdict(outcomes=outcomes, counts=counts, is_zero_spread=is_zero_spread)
        rows: list[_Row] = []
        for trajectory in finished:
            staleness = _staleness(trajectory, version)
            excess = max(0, staleness - self.max_staleness)
            is_trained = excess == 0 or self._staleness_policy not in ("drop", "requeue")
            weight = self._downweight**excess if self._staleness_policy == "downweight" else 1.0
            if excess:
                counts["trajectories/over_stale"] += 1
            _count(counts, outcomes, trajectory, "trained" if is_trained else "stale")
            rows.append(_Row(trajectory, staleness, is_trained, weight, group.close.baseline))
        return _Verdict(outcomes=outcomes, counts=counts, rows=rows, is_zero_spread=is_zero_spread)

    def _is_given_back(self, group: TrajectoryGroup, finished: list[Trajectory], version: int) -> bool:
        if self._staleness_policy != "requeue":
            return False
        round_ = round_of(group.close.group_id)
        if round_ is None or round_ >= self._max_requeues:
            return False
        return any(_staleness(trajectory, version) > self.max_staleness for trajectory in finished)


@dataclass(slots=True)
class _Row:
    trajectory: Trajectory
    staleness: int
    is_trained: bool
    weight: float
    baseline: float | None

    def placed(self, group: int) -> BatchRow:
        return BatchRow(
            trajectory=self.trajectory, group=group, staleness=self.staleness, is_trained=self.is_trained, weight=self.weight,
            baseline=self.baseline,
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class _Verdict:
    outcomes: dict[str, str]
    counts: Counter[str]
    rows: list[_Row] = field(default_factory=list[_Row])
    is_zero_spread: bool = False

    @property
    def is_trained(self) -> bool:
        return any(row.is_trained for row in self.rows)


def _count(counts: Counter[str], outcomes: dict[str, str], trajectory: Trajectory, outcome: str) -> None:
    outcomes[trajectory.id] = outcome
    cause = outcome.partition(":")[0]
    counts[f"trajectories/{cause}"] += 1
    counts[f"tokens/{cause}"] += trajectory.num_sampled


def _staleness(trajectory: Trajectory, version: int) -> int:
    # After a resume from an older checkpoint a token may come from a version ahead of the learner: equally off-policy.
    return max(abs(version - trajectory.min_version), abs(version - trajectory.max_version))


def _fault(trajectory: Trajectory) -> str | None:
    """Why a trajectory cannot be trained on, whatever the algorithm; None when it can."""
    if trajectory.num_sampled == 0:
        return "nothing_sampled"
    if not math.isfinite(trajectory.reward):
        return "nonfinite_reward"
    for segment in trajectory.segments:
        if not np.isfinite(segment.logprobs[segment.mask]).all():
            return "nonfinite_logprob"
        if len(segment.mask) and segment.mask[0]:
            return "empty_prompt"
    return None


def _spread(trajectories: list[Trajectory]) -> float:
    rewards = [t.reward for t in trajectories]
    return max(rewards) - min(rewards)


def _has_no_spread(group: TrajectoryGroup) -> bool:
    rewards = [r for r in group.rewards if math.isfinite(r)]
    return not rewards or max(rewards) - min(rewards) <= SPREAD_TOLERANCE
