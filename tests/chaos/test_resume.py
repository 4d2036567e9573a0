"""Resume equals no crash: one rollout at a time makes the schedule deterministic, and then kills change nothing that is learned."""

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos_rig import Process, agentrl, kill, logs_of, until, write_config, write_project

from agentrl.assembly.audit import audit_run, newest_checkpoint
from agentrl.telemetry.run_dir import RunDir, read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

STEPS = 8
VOLATILE = ("time", "timing", "perf", "tokens_per", "staleness", "memory", "mfu", "version_", "tools/")
"""Metrics that tell of the clock, of serve's work or of which weights sampled a token, not of what was learned."""


def config_of(project: Path, name: str) -> Path:
    return write_config(
        project, name=name,
        run={"name": name, "dir": str(project / "runs"), "seed": 3},
        # No rollout runs out of time while a part is away: its next attempt would have another id.
        serve={
            "replicas": 1, "n": 2, "in_flight": 1, "attempts": 5,
            "turn_timeout_s": 900, "rollout_timeout_s": 900, "group_timeout_s": 900,
        },
        learn={"steps": STEPS, "groups": 2, "save_every": 3, "advantage": "reinforce_plus_plus", "lr": 1e-3},
    )  # fmt: skip


def run_to_the_end(project: Path, name: str, disturb: Callable[[RunDir, Process], None] | None = None) -> RunDir:
    directory = RunDir(project / "runs" / name)
    process = agentrl("run", "-c", str(config_of(project, name)), folder=project, name=name)
    try:
        if disturb is not None:
            disturb(directory, process)
        try:
            code: int | None = process.process.wait(600)
        except subprocess.TimeoutExpired:
            code = None
        assert code == 0, f"exit code {code}\n{process.text()[-3000:]}\n{logs_of(directory)}"
    finally:
        process.close()
    return directory


def kill_each_part_once(directory: RunDir, process: Process) -> None:
    def step() -> int:
        return max((int(m["step"]) for m in directory.read_metrics()), default=0)

    def alive(role: str) -> int | None:
        return next((int(e["pid"]) for e in directory.processes() if e["role"] == role), None)

    def logs() -> str:
        return process.text() + logs_of(directory)

    for at, role in ((1, "learn"), (2, "serve"), (4, "redis"), (5, "engine-0"), (5, "learn")):
        until(lambda at=at: step() >= at, seconds=300, name=f"step {at}", show=logs)
        if role == "redis":  # a serve that is still starting would start the server itself, before the supervisor does
            until(lambda: directory.read_status("serve").get("pid") == alive("serve"), seconds=300, name="serve again", show=logs)
        until(lambda role=role: kill(alive(role)), seconds=300, name=f"live {role}", show=logs)


def learned(directory: RunDir) -> dict[str, Any]:
    """What a run learned, and from what."""
    checkpoint = newest_checkpoint(directory)
    weights = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(checkpoint.glob("*.safetensors")))).hexdigest()
    metrics = [
        {name: value for name, value in m.items() if not any(part in name for part in VOLATILE)} for m in directory.read_metrics()
    ]
    return {
        "trained": [(e["step"], e["id"]) for e in read_jsonl(checkpoint / "trained_ids.jsonl")],
        "decided": [(e["step"], e["id"], e["outcome"]) for e in read_jsonl(checkpoint / "ledger.jsonl")],
        "metrics": metrics,
        "weights": weights,
    }


def test_a_run_with_every_part_killed_learns_the_same_from_the_same_tasks(tmp_path: Path) -> None:
    project = write_project(tmp_path)
    undisturbed = run_to_the_end(project, "calm")
    killed = run_to_the_end(project, "killed", kill_each_part_once)
    restarts = [e["role"] for e in read_jsonl(killed.events) if e["event"] == "child_restarted"]
    assert sorted(restarts) == ["learn", "learn", "redis", "serve"], "engines are restarted by serve"
    for directory in (undisturbed, killed):
        report = audit_run(directory.root)
        assert report.clean, report.text()
    calm, shaken = learned(undisturbed), learned(killed)
    assert {int(i.rsplit("/", 3)[1]) for _, i in calm["trained"]} == set(range(2 * STEPS)), "tasks in order, none skipped"
    assert calm["trained"] == shaken["trained"]
    assert calm["decided"] == shaken["decided"]
    assert [m["step"] for m in shaken["metrics"]] == list(range(1, STEPS + 1))
    assert len({m["reward/mean"] for m in calm["metrics"]}) > 1, "rewards differ, so there is something to learn"
    assert any(m.get("actor/grad_norm", 0) > 0 for m in calm["metrics"])
    assert calm["metrics"] == shaken["metrics"], "the same loss curve, bit for bit"
    assert calm["weights"] == shaken["weights"]
