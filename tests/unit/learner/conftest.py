"""A team of one, a tiny model, and trajectories whose logprobs come from that model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from learner_rig import tiny_dir

from agentrl.learner.distributed import Team, start_team, stop_team


@pytest.fixture(scope="session")
def team() -> Iterator[Team]:
    yield start_team(device="cpu")
    stop_team()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dir(tmp_path_factory.mktemp("model"))
