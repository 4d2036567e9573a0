"""A wave of failures costs its own time and no other, and its end says what failed."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from agentrl.assembly.failure_budget import EXIT_GAVE_UP, FailureBudget, FailureBudgetSpent
from agentrl.assembly.run import Child, RunFailed, _restart
from agentrl.cli.main import _exit_code
from agentrl.supervise import running
from agentrl.telemetry.run_dir import RunDir, read_jsonl


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def status(failing: str = "", *, finished: int = 5, waits: str = "", **failed: int) -> dict[str, Any]:
    return {"failing": failing, "finished": finished, "failed": failed, "waits": {waits: {"count": 1}} if waits else {}}


@pytest.fixture
def clock() -> Clock:
    return Clock()


def budget_of(clock: Clock, limit_s: float | None = 100.0) -> FailureBudget:
    budget = FailureBudget(limit_s, events=Path("run/events.jsonl"), clock=clock)
    budget.look(status(generation=3))
    return budget


def test_when_every_rollout_fails_for_too_long_the_error_names_the_kinds_of_this_wave(clock: Clock) -> None:
    budget = budget_of(clock)
    clock.now = 99.0
    budget.look(status("reward", generation=5, reward=40))
    clock.now = 101.0
    with pytest.raises(FailureBudgetSpent) as caught:
        budget.look(status("reward", generation=5, reward=44))
    text = str(caught.value)
    assert "every rollout failed for 101 s" in text
    assert "serve.failure_budget_s=100" in text
    assert "reward 44, generation 2, the last failure: reward" in text
    assert "run/events.jsonl" in text


def test_a_rollout_that_finishes_ends_the_wave(clock: Clock) -> None:
    budget = budget_of(clock)
    clock.now = 90.0
    budget.look(status("reward", reward=40))
    assert budget.spent_s == 90
    clock.now = 95.0
    budget.look(status("reward", finished=6, reward=44))  # of another worker process: this one still fails
    assert budget.spent_s == 0
    clock.now = 185.0
    budget.look(status("reward", finished=6, reward=80))
    budget.look(status(finished=7, reward=80))
    assert budget.spent_s == 0


def test_failures_of_a_wave_that_began_between_two_looks_are_counted(clock: Clock) -> None:
    budget = budget_of(clock)
    budget.look(status("reward", finished=9, generation=3, reward=32))
    clock.now = 101.0
    with pytest.raises(FailureBudgetSpent, match="lost by kind: reward 32, the last failure: reward"):
        budget.look(status("reward", finished=9, generation=3, reward=32))


def test_time_in_which_the_learner_makes_no_room_does_not_count(clock: Clock) -> None:
    budget = budget_of(clock)
    for clock.now in (10.0, 1000.0, 5000.0):
        budget.look(status("reward", waits="trainer", reward=20))
    assert budget.spent_s == 0
    clock.now = 5050.0
    budget.look(status("reward", waits="failing:reward", reward=24))
    assert budget.spent_s == 50


def test_without_a_budget_it_goes_on_for_ever(clock: Clock) -> None:
    budget = budget_of(clock, None)
    clock.now = 1e9
    budget.look(status("reward", reward=10**6))


@pytest.mark.asyncio
async def test_the_watch_ends_what_runs_beside_it_with_that_error() -> None:
    budget = FailureBudget(0.02, events=Path("events.jsonl"))
    with pytest.raises(FailureBudgetSpent, match="rollouts lost by kind: none, the last failure: sandbox"):
        async with running(budget=budget.watch(lambda: status("sandbox"))):
            await asyncio.sleep(60)


def test_the_supervisor_does_not_start_a_process_again_that_gave_up(tmp_path: Path) -> None:
    def gives_up() -> None:
        raise FailureBudgetSpent("every rollout failed for 1800 s")

    assert _exit_code(gives_up) == EXIT_GAVE_UP
    run = RunDir(tmp_path).create()
    log = run.logs / "serve.log"
    log.write_text("error: FailureBudgetSpent: every rollout failed for 1800 s")
    child = Child("serve", [sys.executable, "-c", "pass"], {}, log, starts=[0.0])
    with pytest.raises(RunFailed, match="every rollout failed for 1800 s"):
        _restart(child, EXIT_GAVE_UP, run, max_restarts=5)
    assert [e["event"] for e in read_jsonl(run.events)] == ["child_exited"]
    assert child.process is None
