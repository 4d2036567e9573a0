"""The best checkpoint keeps its directory and its name, by a training metric or by evaluations that come later."""

import os
from pathlib import Path

import pytest
from learner_rig import make_learner

from agentrl.learner.best import KeepBest
from agentrl.learner.checkpoint import Checkpoints
from agentrl.learner.distributed import Team
from agentrl.learner.learner import Learner


@pytest.fixture(scope="module")
def learner(model_dir: Path, team: Team) -> Learner:
    return make_learner(model_dir, team)


def save(checkpoints: Checkpoints, learner: Learner, step: int, *rewards: float) -> None:
    for reward in rewards:
        checkpoints.note({"reward/mean": reward, "actor/pg_loss": 1.0})
    checkpoints.save(learner, step=step, state={})


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_the_best_outlives_the_rotation_until_a_better_one_comes(learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, best=KeepBest(metric="reward/mean"))
    save(checkpoints, learner, 1, 0.1)
    save(checkpoints, learner, 2, 0.9, 0.7)  # a score is the mean since the checkpoint before: 0.8
    assert os.readlink(tmp_path / "best") == "step_2"
    save(checkpoints, learner, 3, 0.2)
    save(checkpoints, learner, 4, 0.79)
    save(checkpoints, learner, 5)  # no step, no score
    assert names(tmp_path) == ["best", "latest", "step_2", "step_4", "step_5"]
    assert os.readlink(tmp_path / "best") == "step_2"
    again = Checkpoints(tmp_path, keep=2, best=KeepBest(metric="reward/mean"))  # after a restart
    assert again.load(learner, "auto") is not None
    save(again, learner, 6, 0.81)
    assert names(tmp_path) == ["best", "latest", "step_5", "step_6"]
    assert os.readlink(tmp_path / "best") == "step_6"


def test_least_may_be_best_and_what_is_not_a_number_never_is(learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, best=KeepBest(metric="actor/pg_loss", mode="min"))
    for step, value in enumerate((3.0, 2.0, float("nan"), 2.0), start=1):
        checkpoints.note({"actor/pg_loss": value})
        checkpoints.save(learner, step=step, state={})
    assert names(tmp_path) == ["best", "latest", "step_2", "step_3", "step_4"]
    assert os.readlink(tmp_path / "best") == "step_2"


def test_an_evaluation_that_comes_after_the_checkpoint_decides_at_the_next_save(learner: Learner, tmp_path: Path) -> None:
    measured = {"step_1": 0.5}
    checkpoints = Checkpoints(tmp_path, best=KeepBest(metric="eval/success", measured=lambda path: measured.get(path.name)))
    for step in (1, 2):
        checkpoints.save(learner, step=step, state={})
    assert os.readlink(tmp_path / "best") == "step_1"
    measured["step_2"] = 0.6
    checkpoints.save(learner, step=3, state={})
    assert os.readlink(tmp_path / "best") == "step_2"
    assert names(tmp_path) == ["best", "latest", "step_2", "step_3"]


def test_a_checkpoint_that_is_written_anew_by_another_lineage_is_judged_anew(learner: Learner, tmp_path: Path) -> None:
    best = KeepBest(metric="reward/mean")
    checkpoints = Checkpoints(tmp_path, keep=3, best=best)
    for step, reward in ((1, 0.3), (2, 0.9)):
        save(checkpoints, learner, step, reward)
    again = Checkpoints(tmp_path, keep=3, best=best)
    again.load(learner, tmp_path / "step_1")
    save(again, learner, 2, 0.2)
    assert os.readlink(tmp_path / "best") == "step_1"
