"""A team of one, a tiny model, and trajectories whose logprobs come from that model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from learner_rig import tiny_dir

from agentrl.learner.batching import StepBatch
from agentrl.learner.distributed import Team, start_team, stop_team
from agentrl.learner.learner import Learner
from agentrl.telemetry.metrics import undeclared


@pytest.fixture(autouse=True)
def every_metric_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test here makes the learner emit must be described in `agentrl.telemetry.metrics`."""
    step = Learner.step

    def checked(self: Learner, batch: StepBatch | None) -> dict[str, float]:
        metrics = step(self, batch)
        assert undeclared(list(metrics)) == []
        return metrics

    monkeypatch.setattr(Learner, "step", checked)


@pytest.fixture(scope="session")
def team() -> Iterator[Team]:
    yield start_team(device="cpu")
    stop_team()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dir(tmp_path_factory.mktemp("model"))
