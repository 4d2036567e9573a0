"""What the tools did between two steps reaches the step's metrics."""

import json
from pathlib import Path

import pytest

from agentrl.assembly import tool_meter
from agentrl.assembly.learn import _Report  # pyright: ignore[reportPrivateUsage]
from agentrl.assembly.tool_meter import ToolMeter
from agentrl.assembly.watchdog import LearnStatus
from agentrl.config import load_config
from agentrl.errors import ToolInfraError
from agentrl.rollout.tool_loading import load_tools
from agentrl.telemetry.metrics import undeclared
from agentrl.telemetry.run_dir import RunDir
from agentrl.types import Task, ToolCall


def counters(calls: int, infra: int, **more: float) -> dict[str, float]:
    return {"calls": calls, "ok": calls - infra, "model_errors": 0, "timeouts": 0, "infra_errors": infra, "p99_ms": 5.0, **more}


@pytest.mark.asyncio
async def test_infrastructure_errors_show_in_the_metrics_of_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "shaky.py").write_text(
        "async def shaky(ok: bool) -> str:\n    '''S.'''\n    if not ok: raise OSError('down')\n    return 'up'\n"
    )
    box = load_tools(["shaky:shaky"], base_dir=tmp_path)
    async with box.session(task=Task(id="t", prompt=[], data_source="d"), trajectory_id="t", sample_index=0) as tools:
        for ok in (True, True, True):
            await tools.run([ToolCall(name="shaky", arguments={"ok": ok})])
        with pytest.raises(ToolInfraError):
            await tools.run([ToolCall(name="shaky", arguments={"ok": False})])
    directory = RunDir(tmp_path / "run").create()
    directory.write_status("serve", {"tools": box.stats()})  # as serve does every second
    report = _Report(load_config(None), directory, LearnStatus(directory))
    report.step({"step": 1.0, "policy_version": 1.0, "reward/mean": 0.5})
    report.close()
    (line,) = [json.loads(text) for text in directory.metrics.read_text().splitlines()]
    assert (line["tools/shaky/calls"], line["tools/shaky/infra_error_rate"], line["tools/shaky/circuit_open"]) == (4, 0.25, 0)
    assert undeclared(line) == []


def test_rates_are_of_the_time_since_the_last_step_and_of_all_processes(tmp_path: Path) -> None:
    directory = RunDir(tmp_path).create()
    meter = ToolMeter(directory)
    assert meter.read() == {}
    directory.write_status("serve", {"tools": {"a": counters(100, 50)}})
    directory.write_status("serve-1", {"tools": {"a": counters(100, 0, p99_ms=9.0)}})
    first = meter.read()
    assert (first["tools/a/calls"], first["tools/a/infra_error_rate"], first["tools/a/p99_ms"]) == (200, 0.25, 9.0)
    directory.write_status("serve", {"tools": {"a": counters(110, 51)}})
    assert meter.read()["tools/a/infra_error_rate"] == 0.1
    assert meter.read()["tools/a/infra_error_rate"] == 0.0
    assert meter.read()["tools/a/calls"] == 0


def test_a_status_of_a_process_that_is_gone_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDir(tmp_path).create()
    directory.write_status("serve", {"tools": {"a": counters(1, 1)}})
    monkeypatch.setattr(tool_meter, "STALE_S", -1.0)
    assert ToolMeter(directory).read() == {}
