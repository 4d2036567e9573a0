"""The loop: announce first, acknowledge behind the checkpoint, wait with a reason, and resume as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from learner_rig import MemorySource, assert_same_weights, make_learner, random_group, weights_of

from agentrl.errors import DataError, StalledError
from agentrl.learner.batching import BatchBuilder
from agentrl.learner.checkpoint import Checkpoints, read_jsonl
from agentrl.learner.distributed import Team
from agentrl.learner.learner import Learner
from agentrl.learner.loop import run_learning
from agentrl.learner.weight_publisher import WeightPublisher
from agentrl.telemetry.metrics import undeclared
from agentrl.types import PolicyRecord, TrajectoryGroup


class Rig:
    """A run directory and everything that a learner process builds in it."""

    def __init__(self, model_dir: Path, team: Team, directory: Path, *, num_groups: int = 12) -> None:
        self.model_dir, self.team, self.directory = model_dir, team, directory
        self.source = MemorySource([random_group(g, size=2) for g in range(num_groups)])
        self.announced: list[tuple[str, int]] = []
        self.losses: dict[int, float] = {}
        self.metrics: list[dict[str, float]] = []

    def run(self, *, num_steps: int, on_stage: Callable[[str], None] | None = None, **options: Any) -> Learner:
        learner = make_learner(self.model_dir, self.team, lr=1e-3)
        on_step = options.pop("on_step", lambda _: None)

        def note(metrics: dict[str, float]) -> None:
            self.losses[int(metrics["step"])] = metrics["actor/pg_loss"]
            self.metrics.append(metrics)
            assert undeclared(list(metrics)) == []
            on_step(metrics)

        run_learning(
            self.source,
            BatchBuilder(groups_per_step=2, max_staleness=options.pop("max_staleness", 100)),
            learner,
            Checkpoints(self.directory / "checkpoints", on_stage=on_stage),
            WeightPublisher(self.directory / "weights"),
            self._announce,
            num_steps=num_steps,
            save_every=options.pop("save_every", 2),
            on_step=note,
            **{"prefetch": True} | options,
        )
        return learner

    def _announce(self, record: PolicyRecord, consumed_groups: int) -> None:
        self.announced.append((record.label, consumed_groups))

    def trained(self) -> list[str]:
        return [e["id"] for e in read_jsonl(self.directory / "checkpoints" / "latest" / "trained_ids.jsonl")]


class Killed(BaseException):
    """Stands for SIGKILL within one process; nothing of ours catches it."""


@pytest.fixture
def rig(model_dir: Path, team: Team, tmp_path: Path) -> Rig:
    return Rig(model_dir, team, tmp_path)


def test_policies_are_announced_from_the_start_with_the_groups_behind_them(rig: Rig) -> None:
    rig.run(num_steps=3)
    assert rig.announced == [("e1-v0", 0), ("e1-v1", 2), ("e1-v2", 4), ("e1-v3", 6)]
    assert rig.source.progress == [2, 4, 6]


def test_groups_are_acknowledged_behind_checkpoints_only_and_once(rig: Rig) -> None:
    commits_at_step: list[int] = []
    rig.run(num_steps=5, on_step=lambda _: commits_at_step.append(len(rig.source.commits)))
    assert commits_at_step == [0, 0, 1, 1, 2]
    assert [len(ids) for ids in rig.source.commits] == [8, 8, 4]
    assert sorted(rig.trained()) == sorted(rig.source.acknowledged)
    assert len(rig.trained()) == 20


def test_ack_at_step_commits_every_step(rig: Rig) -> None:
    rig.run(num_steps=3, ack_at="step")
    assert [len(ids) for ids in rig.source.commits] == [4, 4, 4]


def test_a_stop_request_ends_with_a_checkpoint_and_leaves_the_rest_on_the_stream(rig: Rig) -> None:
    rig.run(num_steps=100, save_every=50, should_stop=lambda: len(rig.metrics) >= 3)
    assert len(rig.trained()) == 12
    assert sorted(rig.source.acknowledged) == sorted(rig.trained())


def test_waiting_too_long_names_what_is_missing_and_saves_what_was_learned(rig: Rig) -> None:
    waits: list[str] = []
    with pytest.raises(StalledError, match=r"trainer waits: group \(step 7: 0 collected, 2 per step"):
        rig.run(num_steps=7, save_every=50, stall_timeout_s=0.05, prefetch=False, on_wait=lambda reason, _: waits.append(reason))
    assert waits[0] == "group"
    assert len(rig.trained()) == 24


@pytest.mark.parametrize(
    ("stage", "nth_save"),
    [("shards", 1), ("weights", 2), ("records", 1), ("state", 2), ("sync", 2), ("rename", 2), ("latest", 1), ("prune", 2)],
)
def test_a_killed_and_resumed_run_equals_one_without_a_crash(
    model_dir: Path, team: Team, tmp_path: Path, stage: str, nth_save: int
) -> None:
    calm = Rig(model_dir, team, tmp_path / "calm")
    final = calm.run(num_steps=6, save_every=6)
    crashed = Rig(model_dir, team, tmp_path / "crashed")
    seen = 0

    def die(at: str) -> None:
        nonlocal seen
        seen += at == stage
        if at == stage and seen == nth_save:
            raise Killed

    with pytest.raises(Killed):
        crashed.run(num_steps=6, on_stage=die)
    resumed = crashed.run(num_steps=6)
    assert crashed.losses == calm.losses
    assert_same_weights(weights_of(resumed), weights_of(final), atol=0)
    trained = crashed.trained()
    assert len(trained) == len(set(trained)) == 24
    assert sorted(trained) == sorted(crashed.source.acknowledged)
    assert {label.split("-")[0] for label, _ in crashed.announced} == {"e1", "e2"}


def test_a_kill_between_checkpoint_and_acknowledgement_trains_nothing_twice(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(rig.source, "commit", die)
        with pytest.raises(Killed):
            rig.run(num_steps=4)
    assert len(rig.trained()) == 8
    assert rig.source.acknowledged == {}
    rig.run(num_steps=4)
    trained = rig.trained()
    assert len(trained) == len(set(trained)) == 16
    assert sorted(trained) == sorted(rig.source.acknowledged)
    assert rig.announced[-1] == ("e2-v4", 8)


def test_an_idle_learner_makes_room_on_the_stream_before_its_checkpoint_is_due(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    # The stream holds no more groups until those of the first step are acknowledged.
    monkeypatch.setattr("agentrl.learner.loop.IDLE_CHECKPOINT_S", 0.0)
    later = rig.source.groups[2:]
    del rig.source.groups[2:]
    commit = rig.source.commit

    def commit_and_refill(*args: Any) -> None:
        commit(*args)
        rig.source.groups += [later.pop(0), later.pop(0)] if later else []

    monkeypatch.setattr(rig.source, "commit", commit_and_refill)
    rig.run(num_steps=3, save_every=50, stall_timeout_s=250)
    assert [len(ids) for ids in rig.source.commits] == [4, 4, 4]
    assert len(rig.trained()) == 12


def test_metrics_have_timings_and_running_totals(rig: Rig) -> None:
    rig.run(num_steps=3)
    last = rig.metrics[-1]
    assert {"timing_s/wait", "timing_s/publish", "timing_s/checkpoint", "timing_s/step", "timing_s/update"} <= last.keys()
    assert "timing_s/checkpoint" not in rig.metrics[0]
    assert (last["agentrl/groups/consumed_total"], last["agentrl/trajectories/trained_total"]) == (6, 12)


def test_a_completed_run_announces_itself_and_does_nothing_more(rig: Rig) -> None:
    rig.run(num_steps=2)
    rig.run(num_steps=2)
    assert rig.announced[-1] == ("e2-v2", 4)
    assert len(rig.metrics) == 2


class AdmittedSource(MemorySource):
    """Delivers no more groups than admission would have started: two beyond those reported as consumed."""

    def next_group(self, timeout_s: float) -> TrajectoryGroup | None:
        allowed = max(self.progress, default=0) + 2
        return super().next_group(timeout_s) if self._next < allowed else None


def test_a_stale_group_frees_its_place_at_once_or_generation_and_training_would_wait_for_each_other(rig: Rig) -> None:
    stale, fresh = random_group(0, size=2, version=5), [random_group(g, size=2) for g in (1, 2)]
    rig.source = AdmittedSource([stale, *fresh])
    rig.run(num_steps=1, max_staleness=0, stall_timeout_s=250)
    assert rig.source.progress == [1, 3]
    assert {o for i, o in rig.source.acknowledged.items() if i in stale.close.members} == {"stale"}
    assert sorted(rig.trained()) == sorted(i for g in fresh for i in g.close.members)


def test_reading_ahead_changes_no_loss(model_dir: Path, team: Team, tmp_path: Path) -> None:
    ahead, plain = Rig(model_dir, team, tmp_path / "ahead"), Rig(model_dir, team, tmp_path / "plain")
    ahead.run(num_steps=4)
    plain.run(num_steps=4, prefetch=False)
    assert ahead.losses == plain.losses
    assert sorted(ahead.source.acknowledged) == sorted(plain.source.acknowledged)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_trajectory_that_cannot_be_trained_on_is_blamed_by_name(
    model_dir: Path, team: Team, tmp_path: Path, prefetch: bool
) -> None:
    rig = Rig(model_dir, team, tmp_path)
    poison = rig.source.groups[1].trajectories[0]
    poison.segments[0].ids[0] = 100_000
    blamed: list[str] = []
    rig.source.blame = lambda ids: blamed.extend(ids)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"1 trajectories hold token ids outside the model's vocabulary of 320"):
        rig.run(num_steps=4, prefetch=prefetch)
    assert blamed == [poison.id]
    assert rig.source.acknowledged == {}


def test_an_error_that_says_nothing_about_the_data_blames_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Learner, "step", fail)
    blamed: list[str] = []
    rig.source.blame = lambda ids: blamed.extend(ids)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="out of memory"):
        rig.run(num_steps=2)
    assert blamed == []
