"""Admission bounds staleness whatever is discarded or late, and never deadlocks."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.rollout.admission import admit, group_budget

SETTINGS = {
    "groups_per_step": st.integers(1, 6),
    "max_staleness": st.integers(0, 4),
    "pipeline_depth": st.integers(0, 6),
    "seed": st.integers(0, 2**16),
}


@given(**SETTINGS, discard=st.floats(0, 0.9))
def test_in_order_no_group_is_older_than_the_bound_when_it_is_trained(
    groups_per_step: int, max_staleness: int, pipeline_depth: int, seed: int, discard: float
) -> None:
    rng = random.Random(seed)
    version, consumed = 0, 0
    admitted_at: list[int] = []  # version at admission, in order
    closed: list[int] = []  # ordinals in order; FIFO
    batch: list[int] = []
    for _ in range(400):
        room = admit(
            open_groups=len(admitted_at) - len(closed), closed_groups=len(closed), consumed_groups=consumed,
            groups_per_step=groups_per_step, max_staleness=max_staleness, pipeline_depth=pipeline_depth,
        )  # fmt: skip
        admitted_at += [version] * min(room, rng.randint(0, 3))
        for _ in range(rng.randint(0, 3)):
            if len(closed) < len(admitted_at):
                closed.append(len(closed))
        while len(batch) < groups_per_step and consumed + len(batch) < len(closed) and rng.random() < 0.7:
            ordinal = consumed + len(batch)
            if rng.random() < discard and not batch:
                consumed += 1  # thrown away: it leaves, and holds no place
            else:
                assert version - admitted_at[ordinal] <= min(max_staleness, pipeline_depth)
                batch.append(ordinal)
        if len(batch) == groups_per_step:
            consumed += groups_per_step
            version += 1
            batch = []
    assert consumed <= len(closed) <= len(admitted_at)


@given(**SETTINGS, group_size=st.integers(1, 8), in_flight=st.integers(1, 12))
def test_late_and_failed_groups_never_stop_the_run_for_good(
    groups_per_step: int, max_staleness: int, pipeline_depth: int, seed: int, group_size: int, in_flight: int
) -> None:
    rng = random.Random(seed)
    left: dict[int, int] = {}  # open groups -> unfinished members
    admitted, closed, consumed, steps = 0, 0, 0, 0
    waiting = 0  # closed, not consumed
    for _ in range(3000):
        room = admit(
            open_groups=len(left), closed_groups=closed, consumed_groups=consumed, groups_per_step=groups_per_step,
            max_staleness=max_staleness, pipeline_depth=pipeline_depth, unfinished_rollouts=sum(left.values()),
            in_flight=in_flight, group_size=group_size,
        )  # fmt: skip
        for _ in range(room):
            left[admitted] = group_size
            admitted += 1
        assert sum(left.values()) < in_flight + group_size
        assert left or waiting >= groups_per_step or room, "nothing runs and nothing can be trained: a deadlock"
        if left and rng.random() < 0.9:  # any member of any group finishes, the oldest rarely
            ordinal = rng.choice(list(left)[len(left) // 2 :] if rng.random() < 0.8 else list(left))
            left[ordinal] -= 1
            if not left[ordinal]:
                del left[ordinal]
                closed += 1
                if rng.random() < 0.2:
                    consumed += 1  # failed as a whole: the learner counts it and moves on
                else:
                    waiting += 1
        if waiting >= groups_per_step:
            waiting -= groups_per_step
            consumed += groups_per_step
            steps += 1
    assert steps > 0


def test_hand_computed_budgets() -> None:
    assert group_budget(groups_per_step=32, max_staleness=0, pipeline_depth=9) == 32
    assert group_budget(groups_per_step=32, max_staleness=4, pipeline_depth=1) == 64
    with pytest.raises(ValueError, match="groups_per_step=0"):
        group_budget(groups_per_step=0, max_staleness=0, pipeline_depth=0)
    settings = {"groups_per_step": 4, "max_staleness": 1, "pipeline_depth": 1}
    assert admit(open_groups=0, closed_groups=0, consumed_groups=0, **settings) == 8
    assert admit(open_groups=3, closed_groups=10, consumed_groups=6, **settings) == 1
    assert admit(open_groups=9, closed_groups=10, consumed_groups=6, **settings) == 0
    load = {"open_groups": 0, "closed_groups": 0, "consumed_groups": 0, "group_size": 4, **settings}
    assert admit(unfinished_rollouts=0, in_flight=10, **load) == 3  # two whole groups and a part of the third
    assert admit(unfinished_rollouts=10, in_flight=10, **load) == 0
