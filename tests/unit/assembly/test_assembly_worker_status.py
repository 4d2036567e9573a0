"""Several workers read as one: counts add up, waits and ages are the worst, progress is the best."""

import time
from pathlib import Path
from typing import Any

from agentrl.assembly.worker_status import fresh_statuses, summed
from agentrl.telemetry.run_dir import RunDir


def status(**fields: Any) -> dict[str, Any]:
    return {"finished": 3, "policy_version": 4, "quiet_s": 1.0, "finished_s": 2.0, "oldest_rollout_s": 5.0, **fields}


def test_counts_add_up_and_the_run_moves_when_one_worker_does() -> None:
    one = status(quiet_s=90.0, oldest_rollout="a", failed={"tool": 1}, tokens_per_s=10.5, requests={"retries": 2, "parked": 0})
    other = status(quiet_s=0.5, oldest_rollout="b", oldest_rollout_s=9.0, failed={"tool": 2, "reward": 1}, tokens_per_s=1.5)
    both = summed([one, other])
    assert (both["finished"], both["tokens_per_s"], both["policy_version"]) == (6, 12.0, 4)
    assert (both["quiet_s"], both["oldest_rollout_s"], both["oldest_rollout"]) == (0.5, 9.0, "b")
    assert both["failed"] == {"tool": 3, "reward": 1}
    assert both["requests"] == {"retries": 2, "parked": 0}


def test_the_oldest_wait_comes_first_and_tools_show_their_worst_rate() -> None:
    tool = {"calls": 4, "infra_errors": 1, "infra_error_rate": 0.25, "p99_ms": 10.0}
    one = status(waits={"server": {"count": 2, "oldest_s": 3.0}}, tools={"calc": tool})
    other = status(
        waits={"server": {"count": 1, "oldest_s": 1.0}, "trainer": {"count": 1, "oldest_s": 8.0}},
        tools={"calc": {**tool, "infra_error_rate": 0.5, "p99_ms": 2.0}},
    )
    both = summed([one, other])
    assert both["wait"] == "trainer"
    assert both["waits"]["server"] == {"count": 3, "oldest_s": 3.0}
    assert both["tools"]["calc"] == {"calls": 8, "infra_errors": 2, "infra_error_rate": 0.5, "p99_ms": 10.0}
    assert summed([]) == {}


def test_a_worker_that_no_longer_writes_is_left_out(tmp_path: Path) -> None:
    directory = RunDir(tmp_path).create()
    directory.write_status("serve-0", {"finished": 1})
    directory.write_status("serve-1", {"finished": 2, "time": time.time() - 60})
    assert [s["finished"] for s in fresh_statuses(directory, ["serve-0", "serve-1", "serve-2"])] == [1]
