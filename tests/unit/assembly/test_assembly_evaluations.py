"""What is due for evaluation beside a run, oldest first, once each."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from agentrl.assembly import evaluations as module
from agentrl.assembly.evaluations import Evaluations
from agentrl.config import parse_config
from agentrl.telemetry.run_dir import RunDir, read_jsonl


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that writes down how it was called, and fails for step 4."""
    called = tmp_path / "called.jsonl"
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nopen({str(called)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "sys.exit(3 if 'step_4' in sys.argv else 0)\n"
    )
    os.chmod(program, 0o755)
    monkeypatch.setattr(module.sys, "executable", str(program))
    return called


def waited(seconds: float) -> bool:
    import time

    time.sleep(0.05)
    return True


def evaluations_of(directory: RunDir, every: int) -> Evaluations:
    config = parse_config({"eval": {"every": every}}, place="test")
    return Evaluations(config, directory, ["-c", "run.yaml", "learn.steps=6"])


def test_each_due_checkpoint_is_measured_once_and_a_failure_stops_nothing(tmp_path: Path, stand_in: Path) -> None:
    directory = RunDir(tmp_path / "run").create()
    for step in (2, 3, 4, 6):
        (directory.checkpoints / f"step_{step}").mkdir()
    (directory.checkpoints / "step_8.tmp").mkdir()
    first = evaluations_of(directory, every=2)
    first.finish(waited)
    calls = [json.loads(line) for line in stand_in.read_text().splitlines()]
    assert [call[-1] for call in calls] == ["step_2", "step_4", "step_6"]
    assert calls[0][:6] == ["-m", "agentrl", "eval", "-c", "run.yaml", "learn.steps=6"]
    assert calls[0][6:8] == ["serve.urls=[]", "serve.router_url=null"], "servers of the run's serve its newest policy"
    assert calls[0][-3] == str(directory.checkpoints / "step_2")
    events: list[dict[str, Any]] = list(read_jsonl(directory.events))
    assert [(e["event"], e["checkpoint"]) for e in events] == [
        ("evaluated", "step_2"), ("evaluation_failed", "step_4"), ("evaluated", "step_6"),
    ]  # fmt: skip
    (directory.evals / "step_6.json").write_text("{}")
    again = evaluations_of(directory, every=6)
    again.finish(waited)
    assert len(stand_in.read_text().splitlines()) == 3, "a restarted run measures nothing twice"


def test_without_a_period_nothing_is_measured(tmp_path: Path, stand_in: Path) -> None:
    directory = RunDir(tmp_path / "run").create()
    (directory.checkpoints / "step_2").mkdir()
    evaluations_of(directory, every=0).finish(waited)
    assert not stand_in.exists()
