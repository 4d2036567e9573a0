"""The whole path with real parts: engines, stream, learner, weights back; then with kills."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentrl.assembly.audit import audit_run, ledger_of, newest_checkpoint
from agentrl.assembly.step_ledger import step_ledger
from agentrl.telemetry.run_dir import read_json, read_jsonl
from agentrl.telemetry.trajectory_log import read_records

pytestmark = pytest.mark.slow


def test_a_policy_trained_end_to_end_earns_more_and_every_trajectory_is_token_exact(
    quickstart_config: Callable[..., Path], start_run: Any
) -> None:
    steps = 12
    run = start_run(quickstart_config(learn={"steps": steps, "save_every": 6}))
    assert run.finish(seconds=600) == 0, run.logs()

    metrics = run.directory.read_metrics()
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    rewards = [m["reward/mean"] for m in metrics]
    # About 0.35 more; a step's mean of 128 rollouts is known to 0.04, and which tasks it holds is a matter of pace.
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.15, rewards
    # The first batch was sampled by version 0 and trained at version 0: the ratio is one (I9).
    assert metrics[0]["training/off_policy/trajectory_staleness/max"] == 0
    assert abs(metrics[0]["actor/ppo_kl"]) < 1e-4
    assert metrics[0]["training/rollout_probs_diff_max"] < 1e-3
    assert all(m["training/off_policy/trajectory_staleness/max"] <= 2 for m in metrics)

    records = list(read_records(run.directory.trajectories))
    assert len(records) >= steps * 16 * 8
    for record in records:
        (segment,) = record["segments"]
        ids, mask, versions = (np.asarray(segment[k]) for k in ("ids", "mask", "versions"))
        logprobs = np.asarray(segment["logprobs"])
        assert len(ids) == len(mask) == len(versions) == len(logprobs)
        assert not mask[: segment["prompt_length"]].any()
        sampled = [t for t in record["turns"] if t["kind"] == "model"]
        assert sum(t["end"] - t["start"] for t in sampled) == mask.sum()
        assert (versions[mask == 1] >= 0).all()
        assert (versions[mask == 0] == -1).all()
        assert (logprobs[mask == 0] == 0).all()
        assert (np.diff(versions[mask == 1]) >= 0).all(), "weights only move forward within a trajectory"
    # Which versions were sampled is a matter of pace, but within the staleness of 2 no more than two in a row are left out.
    versions = {v for r in records for v in r["segments"][0]["versions"] if v >= 0}
    assert 0 in versions
    assert all(versions & {v, v + 1, v + 2} for v in range(1, steps - 2)), versions

    report = audit_run(run.directory.root)
    assert report.clean, report.text()
    assert report.step == steps
    assert report.trained == sum(1 for _ in read_jsonl(newest_checkpoint(run.directory) / "trained_ids.jsonl")) > 0
    book = ledger_of(run.directory.root)
    assert book.closes
    assert book.trained == report.trained
    assert run.directory.processes() == [], "nothing outlives the run"
    assert not read_json(run.directory.processes_file)


def test_killed_learner_engine_and_serve_neither_lose_nor_repeat_a_trajectory(
    quickstart_config: Callable[..., Path], start_run: Any
) -> None:
    steps = 12
    run = start_run(quickstart_config(learn={"steps": steps, "save_every": 3}))
    killed: list[str] = []
    for at, role in ((2, "engine-0"), (4, "learn"), (7, "serve")):
        run.wait_for(lambda at=at: run.step() >= at, seconds=240, name=f"step {at}")
        run.kill(role)
        killed.append(role)
    assert run.finish(seconds=600) == 0, run.logs()
    assert killed == ["engine-0", "learn", "serve"]

    events = Counter((e["event"], e.get("role")) for e in read_jsonl(run.directory.events))
    assert events["child_restarted", "learn"] == 1
    assert events["child_restarted", "serve"] == 1
    assert [m["step"] for m in run.directory.read_metrics()] == list(range(1, steps + 1))
    report = audit_run(run.directory.root)
    assert report.clean, report.text()
    differences = {step: step_ledger(run.directory.root, step).differences for step in range(1, steps + 1)}
    assert not any(differences.values()), differences
    trained = [str(e["id"]) for e in read_jsonl(newest_checkpoint(run.directory) / "trained_ids.jsonl")]
    assert len(trained) == len(set(trained)) > 0
    ordinals = {
        int(i.rsplit("/", 3)[1]) for i in (str(e["id"]) for e in read_jsonl(newest_checkpoint(run.directory) / "ledger.jsonl"))
    }
    assert ordinals >= set(range(steps * 16 - 64)), "a group of the task order was skipped"
