"""Batches: staleness, zero spread, refill, failures; and every trajectory has exactly one outcome."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_rig import batch_of, close, segment, trajectory

from agentrl.errors import ConfigError
from agentrl.learner.batching import BatchBuilder
from agentrl.types import TrajectoryGroup


def group_with(
    ordinal: int, rewards: list[float], *, versions: list[int] | None = None, failed: dict[str, str] | None = None
) -> TrajectoryGroup:
    rng = np.random.default_rng(ordinal)
    versions = versions or [0] * len(rewards)
    members = [
        trajectory(ordinal, i, reward=r, segments=[segment(rng, prompt=2, turns=[(3, 1), (1, 0)], version=v)])
        for i, (r, v) in enumerate(zip(rewards, versions, strict=True))
    ]
    return close(ordinal, members, failed)


def builder(**options: Any) -> BatchBuilder:
    return BatchBuilder(**({"groups_per_step": 2, "max_staleness": 1} | options))


def test_drop_fills_a_place_with_a_group_without_spread_and_trains_the_rest() -> None:
    b = builder(zero_spread="drop")
    b.add(group_with(0, [1, 1]))
    assert not b.is_full(0)
    b.add(group_with(1, [1, 0]))
    assert b.is_full(0)
    batch = b.build(0)
    assert sorted(batch.outcomes.values()) == ["filtered", "filtered", "trained", "trained"]
    assert batch.counts["groups/trained"] == 1
    assert batch.counts["tokens/filtered"] == 8
    assert batch.counts["frac_reward_zero_std"] == 0.5
    assert len(b) == 0


def test_a_group_without_its_greedy_baseline_is_counted_as_failed_and_fills_no_place() -> None:
    b = builder(zero_spread="keep", min_group_size=1, needs_baseline=True)
    without = group_with(0, [1, 0], failed={"x": "deadline"})
    b.add(without)
    assert b.num_without_place(0) == 1
    for ordinal, baseline in ((1, 0.0), (2, 1.0)):
        group = group_with(ordinal, [1])
        b.add(dataclasses.replace(group, close=dataclasses.replace(group.close, baseline=baseline)))
    assert b.is_full(0)
    batch = b.build(0)
    assert sorted(batch.outcomes.values()) == [
        "failed:deadline",
        "failed:no_baseline",
        "failed:no_baseline",
        "trained",
        "trained",
    ]
    assert [row.baseline for row in batch.rows] == [0.0, 1.0]


def test_refill_pulls_until_there_are_enough_useful_groups() -> None:
    b = builder(zero_spread="refill")
    for ordinal, rewards in enumerate([[1, 1], [0, 0], [1, 0], [0, 0]]):
        b.add(group_with(ordinal, rewards))
        assert not b.is_full(0)
    b.add(group_with(4, [0, 1]))
    assert b.is_full(0)
    batch = b.build(0)
    assert (batch.counts["groups/consumed"], batch.counts["groups/trained"], batch.num_trained) == (5, 2, 4)


def test_refill_gives_up_at_its_limit(caplog: pytest.LogCaptureFixture) -> None:
    b = builder(zero_spread="refill", refill_limit=3)
    for ordinal in range(3):
        b.add(group_with(ordinal, [1, 1]))
    assert b.is_full(0)
    assert "batch is short: 0 of 2" in caplog.text
    assert b.build(0).num_trained == 0


def test_keep_trains_groups_without_spread() -> None:
    batch = batch_of([group_with(0, [1, 1])], zero_spread="keep")
    assert set(batch.outcomes.values()) == {"trained"}


def test_failed_and_empty_groups_fill_no_place_and_are_counted_by_reason() -> None:
    b = builder(groups_per_step=1)
    b.add(group_with(0, [], failed={"t0/0/0/0": "deadline", "t0/0/1/0": "sandbox"}))
    b.add(group_with(1, [1.0], failed={"t1/1/1/0": "deadline"}))
    assert not b.is_full(0)
    b.add(group_with(2, [1, 0]))
    assert b.is_full(0)
    batch = b.build(0)
    assert batch.outcomes["t0/0/1/0"] == "failed:sandbox"
    assert batch.outcomes["t1/1/0/0"] == "filtered"  # alone in its group: nothing to compare with
    assert (batch.counts["trajectories/failed"], batch.counts["groups/dropped"]) == (3, 2)


def test_staleness_is_judged_when_the_batch_is_formed_not_when_the_group_came() -> None:
    b = builder(groups_per_step=1)
    b.add(group_with(0, [1, 0], versions=[4, 5]))
    assert b.is_full(5)
    assert not b.is_full(7)
    assert set(b.build(7).outcomes.values()) == {"stale"}


def test_a_version_ahead_of_the_learner_is_as_stale_as_one_behind() -> None:
    batch = batch_of([group_with(0, [1, 0], versions=[3, 9])], version=4, max_staleness=2)
    assert list(batch.outcomes.values()) == ["trained", "stale"]
    assert [row.staleness for row in batch.rows] == [1, 5]


def test_downweight_trains_stale_trajectories_less() -> None:
    batch = batch_of([group_with(0, [1, 0], versions=[5, 2])], version=5, max_staleness=1, staleness_policy="downweight")
    assert [row.weight for row in batch.rows] == [1.0, 0.25]
    assert batch.counts["trajectories/over_stale"] == 1
    assert batch.counts["trajectories/stale"] == 0


def test_wait_trains_and_counts_what_is_over_the_bound() -> None:
    batch = batch_of([group_with(0, [1, 0], versions=[0, 0])], version=5, max_staleness=1, staleness_policy="wait")
    assert set(batch.outcomes.values()) == {"trained"}
    assert batch.counts["trajectories/over_stale"] == 2


def test_requeue_gives_back_the_whole_group_fills_no_place_and_counts_the_tokens() -> None:
    b = builder(groups_per_step=1, staleness_policy="requeue")
    b.add(group_with(0, [1, 0], versions=[5, 0], failed={"t0/0/2/0": "deadline"}))
    assert not b.is_full(5)
    assert b.num_without_place(5) == 1
    b.add(group_with(1, [1, 0], versions=[5, 4]))
    assert b.is_full(5)
    batch = b.build(5)
    assert sorted(batch.outcomes.values()) == ["failed:deadline", "stale:requeued", "stale:requeued", "trained", "trained"]
    counts = ("groups/requeued", "groups/trained", "trajectories/stale", "trajectories/over_stale", "tokens/stale")
    assert [batch.counts[name] for name in counts] == [1, 1, 2, 1, 8]


def test_a_group_is_given_back_no_more_often_than_allowed_and_a_replay_never() -> None:
    def outcomes(mark: str) -> set[str]:
        group = group_with(0, [1, 0])
        group = TrajectoryGroup(dataclasses.replace(group.close, group_id=f"t0/0{mark}"), group.trajectories)
        return set(batch_of([group], version=5, max_staleness=1, staleness_policy="requeue", max_requeues=2).outcomes.values())

    assert outcomes("") == outcomes("+again1") == {"stale:requeued"}
    assert outcomes("+again2") == outcomes("+replay7-0") == {"stale"}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"reward": float("nan")}, "nonfinite_reward"),
        ({"logprobs": np.float32("nan")}, "nonfinite_logprob"),
        ({"mask": False}, "nothing_sampled"),
    ],
)
def test_what_cannot_be_trained_on_fails_alone(broken: dict[str, Any], reason: str) -> None:
    group = group_with(0, [1, 0, 0])
    first = group.trajectories[0]
    if "reward" in broken:
        bad = dataclasses.replace(first, **broken)
    else:
        bad_segment = dataclasses.replace(
            first.segments[0], **{k: np.full_like(getattr(first.segments[0], k), v) for k, v in broken.items()}
        )
        bad = dataclasses.replace(first, segments=(bad_segment,))
    members = [bad, dataclasses.replace(group.trajectories[1], reward=1.0), group.trajectories[2]]
    batch = batch_of([TrajectoryGroup(group.close, tuple(members))])
    assert list(batch.outcomes.values()) == [f"failed:{reason}", "trained", "trained"]
    assert len(batch.rows) == 2


@pytest.mark.parametrize("options", [{"staleness_policy": "x"}, {"zero_spread": "x"}, {"groups_per_step": 0}])
def test_modes_that_do_not_exist_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        builder(**options)


@settings(max_examples=100, deadline=None)
@given(
    rewards=st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=0, max_size=4), min_size=1, max_size=6),
    version=st.integers(0, 4),
    zero_spread=st.sampled_from(["keep", "drop", "refill"]),
    policy=st.sampled_from(["wait", "drop", "downweight", "requeue"]),
)
def test_every_member_has_one_outcome_and_the_counts_close(
    rewards: list[list[float]], version: int, zero_spread: str, policy: str
) -> None:
    groups = [
        group_with(i, r, versions=[i % 3] * len(r), failed={f"t{i}/{i}/9/0": "deadline"} if i % 2 else {})
        for i, r in enumerate(rewards)
    ]
    batch = batch_of(groups, version=version, max_staleness=1, zero_spread=zero_spread, staleness_policy=policy)
    members = [m for g in groups for m in (*g.close.members, *g.close.failed)]
    assert sorted(batch.outcomes) == sorted(members)
    causes = ("trained", "filtered", "stale", "failed")
    assert sum(batch.counts[f"trajectories/{cause}"] for cause in causes) == len(members)
    assert sum(batch.counts[f"tokens/{cause}"] for cause in causes) == sum(t.num_sampled for g in groups for t in g)
    assert batch.num_trained == batch.counts["trajectories/trained"]
    assert {row.group for row in batch.rows} == set(range(int(batch.counts["groups/trained"])))
