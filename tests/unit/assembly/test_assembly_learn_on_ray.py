"""What the Ray launcher decides before and between the starts of its ranks."""

import os
from pathlib import Path

import pytest

from agentrl.assembly.learn import main
from agentrl.assembly.learn_on_ray import _resuming, _started_file
from agentrl.config import load_config
from agentrl.errors import ConfigError
from agentrl.telemetry.run_dir import RunDir


def test_resume_is_for_the_first_start_and_restarted_ranks_take_this_jobs_checkpoint(tmp_path: Path) -> None:
    directory = RunDir(tmp_path).create()
    config = load_config(None, ["learn.launcher=ray", "learn.resume=disable"])
    old = directory.checkpoints / "step_7"
    old.mkdir()
    os.utime(old, ns=(1_000, 1_000))
    (directory.checkpoints / "latest").symlink_to("step_7")
    _started_file(directory).touch()
    os.utime(_started_file(directory), ns=(2_000, 2_000))
    assert _resuming(config, directory).learn.resume == "disable"
    os.utime(old, ns=(3_000, 3_000))
    assert _resuming(config, directory).learn.resume == "auto"


def test_torchrun_and_ray_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="not to both"):
        main(load_config(None, ["learn.launcher=ray"]), [])
