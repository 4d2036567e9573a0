"""Checkpoints that are written while training goes on: acknowledged when durable, one at a time, errors at the next look."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from learner_rig import MemorySource, assert_same_weights, batch_of, make_learner, random_group, weights_of

from agentrl.errors import CheckpointError, DataError
from agentrl.learner.batching import BatchBuilder
from agentrl.learner.checkpoint import Checkpoints, damage, read_jsonl
from agentrl.learner.distributed import Team
from agentrl.learner.learner import Learner
from agentrl.learner.loop import run_learning
from agentrl.learner.weight_publisher import WeightPublisher

DEADLINE_S = 250.0


class Gate:
    """Holds the writing thread at one stage until it is opened."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, stage: str) -> None:
        if stage == self.stage and threading.current_thread() is not threading.main_thread():
            self.reached.set()
            assert self.opened.wait(DEADLINE_S)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate("latest")
    yield gate
    gate.opened.set()


def run(
    source: MemorySource, model_dir: Path, team: Team, directory: Path, *, num_steps: int, on_stage: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[Learner, dict[int, float]]:  # fmt: skip
    learner = make_learner(model_dir, team, lr=1e-3)
    losses: dict[int, float] = {}
    on_step = options.pop("on_step", lambda _: None)

    def note(metrics: dict[str, float]) -> None:
        losses[int(metrics["step"])] = metrics["actor/pg_loss"]
        on_step(metrics)

    run_learning(
        source, BatchBuilder(groups_per_step=2, max_staleness=100), learner,
        Checkpoints(directory / "checkpoints", on_stage=on_stage), WeightPublisher(directory / "weights"),
        lambda record, consumed: None, num_steps=num_steps, on_step=note, **{"save_every": 2, "async_save": True} | options,
    )  # fmt: skip
    return learner, losses


@pytest.fixture(scope="module")
def calm_losses(model_dir: Path, team: Team, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Six steps of a learner that nothing happens to and that waits for its checkpoints."""
    return run(groups(12), model_dir, team, tmp_path_factory.mktemp("calm"), num_steps=6, async_save=False)[1]


def trained(directory: Path) -> list[str]:
    return [entry["id"] for entry in read_jsonl(directory / "checkpoints" / "latest" / "trained_ids.jsonl")]


def groups(count: int) -> MemorySource:
    return MemorySource([random_group(g, size=2) for g in range(count)])


def test_the_copy_is_of_the_moment_it_was_taken_though_the_weights_move_on(
    model_dir: Path, team: Team, tmp_path: Path, gate: Gate
) -> None:
    gate.stage = "shards"
    learner = make_learner(model_dir, team)
    learner.step(batch_of([random_group(0)]))
    frozen = weights_of(learner)
    checkpoints = Checkpoints(tmp_path, on_stage=gate)
    path = checkpoints.begin(learner, step=1, state={"consumed_groups": 1})
    assert gate.reached.wait(DEADLINE_S)
    expected = learner.step(batch_of([random_group(1)]))
    assert not checkpoints.is_durable()
    assert checkpoints.latest() is None
    gate.opened.set()
    assert checkpoints.is_durable(wait=True, timeout_s=DEADLINE_S)
    assert damage(path) is None
    fresh = make_learner(model_dir, team)
    loaded = Checkpoints(tmp_path).load(fresh, "auto")
    assert loaded is not None
    assert (loaded.step, fresh.policy_version) == (1, 1)
    assert_same_weights(weights_of(fresh), frozen, atol=0)
    metrics = fresh.step(batch_of([random_group(1)]))
    assert (metrics["actor/pg_loss"], metrics["actor/grad_norm"]) == (expected["actor/pg_loss"], expected["actor/grad_norm"])


def test_training_goes_on_and_nothing_is_acknowledged_before_the_checkpoint_is_durable(
    model_dir: Path, team: Team, tmp_path: Path, gate: Gate
) -> None:
    source = groups(10)
    commits: list[int] = []

    def on_step(metrics: dict[str, float]) -> None:
        commits.append(len(source.commits))
        if metrics["step"] == 3:  # the third step was made while the checkpoint of the second is held before `latest`
            assert gate.reached.wait(DEADLINE_S)
            assert not (tmp_path / "checkpoints" / "latest").exists()
            gate.opened.set()

    run(source, model_dir, team, tmp_path, num_steps=5, on_stage=gate, on_step=on_step)
    assert commits[:3] == [0, 0, 0]
    assert [len(ids) for ids in source.commits] == [8, 8, 4]
    assert sorted(trained(tmp_path)) == sorted(source.acknowledged)
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step_5"


def test_it_learns_exactly_what_a_learner_that_waits_for_its_checkpoints_learns(
    model_dir: Path, team: Team, tmp_path: Path
) -> None:
    calm, calm_losses = run(groups(8), model_dir, team, tmp_path / "calm", num_steps=4, async_save=False, save_every=1)
    ahead, losses = run(groups(8), model_dir, team, tmp_path / "async", num_steps=4, save_every=1)
    assert losses == calm_losses
    assert_same_weights(weights_of(ahead), weights_of(calm), atol=0)
    assert trained(tmp_path / "async") == trained(tmp_path / "calm")


@pytest.mark.parametrize("stage", ["shards", "rename", "latest", "prune"])
def test_what_fails_while_writing_stops_the_learner_and_a_restart_loses_and_repeats_nothing(
    model_dir: Path, team: Team, tmp_path: Path, calm_losses: dict[int, float], stage: str
) -> None:
    source = groups(12)
    seen = 0

    def full_disk(at: str) -> None:
        nonlocal seen
        seen += at == stage
        if at == stage and seen == 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step_4 could not be written: OSError.*No space left.*Check space"):
        run(source, model_dir, team, tmp_path, num_steps=6, on_stage=full_disk)
    # The group of the checkpoint that failed stayed on the stream, durable or not.
    assert [len(ids) for ids in source.commits] == [8]
    _, losses = run(source, model_dir, team, tmp_path, num_steps=6)
    assert losses == {step: calm_losses[step] for step in losses}
    assert len(trained(tmp_path)) == len(set(trained(tmp_path))) == 24
    assert sorted(trained(tmp_path)) == sorted(source.acknowledged)


def test_an_error_in_training_leaves_the_checkpoint_in_flight_to_be_found_by_the_next_start(
    model_dir: Path, team: Team, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = groups(8)
    step = Learner.step

    def fail_third(self: Learner, batch: Any) -> dict[str, float]:
        if self.policy_version == 2:
            gate.opened.set()
            raise DataError("an input that cannot be trained on")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", fail_third)
        with pytest.raises(DataError, match="cannot be trained on"):
            run(source, model_dir, team, tmp_path, num_steps=4, on_stage=gate)
    assert source.acknowledged == {}
    assert len(trained(tmp_path)) == 8
    run(source, model_dir, team, tmp_path, num_steps=4)
    assert len(trained(tmp_path)) == len(set(trained(tmp_path))) == 16
    assert sorted(trained(tmp_path)) == sorted(source.acknowledged)


def test_a_checkpoint_does_not_move_latest_away_from_another_learners(
    model_dir: Path, team: Team, tmp_path: Path, gate: Gate
) -> None:
    gate.stage = "sync"
    learner = make_learner(model_dir, team)
    slow, other = Checkpoints(tmp_path, on_stage=gate), Checkpoints(tmp_path)
    other.save(learner, step=1, state={})
    slow.begin(learner, step=2, state={})
    assert gate.reached.wait(DEADLINE_S)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step_7")
    gate.opened.set()
    with pytest.raises(CheckpointError, match=r"named step_1 .* names step_7 now: another learner writes here"):
        slow.is_durable(wait=True)
    assert not (tmp_path / "step_2").exists()
    with pytest.raises(CheckpointError, match="another learner"):  # asking again does not make it durable
        slow.is_durable()
