"""A short training run on two real SGLang servers, with weight updates while they generate (``make test-sglang``)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentrl.assembly.audit import audit_run
from agentrl.telemetry.run_dir import read_jsonl
from agentrl.telemetry.trajectory_log import read_records

VENV = os.environ.get("AGENTRL_SGLANG_VENV")
RIG = Path(__file__).parents[1] / "rigs" / "sglang"

pytestmark = pytest.mark.skipif(
    VENV is None, reason="needs AGENTRL_SGLANG_VENV; `make test-sglang` installs a real SGLang and sets it"
)


def sglang_on_cpu() -> dict[str, Any]:
    """How `serve` starts the rig's SGLang: its environment through ``env``, its flags as arguments."""
    environment = {
        "PYTHONPATH": RIG / "shim",
        "SGLANG_USE_CPU_ENGINE": 1,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": 1,
        "TRANSFORMERS_OFFLINE": 1,
        "SGLANG_FORCE_STREAM_INTERVAL": 1,
    }
    return {
        "engine": "sglang",
        "sglang_command": ["env", *(f"{k}={v}" for k, v in environment.items()), f"{VENV}/bin/python", "-m", "sglang.launch_server"],
        "sglang_args": [
            "--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32",
            "--max-total-tokens", "65536", "--max-running-requests", "64",
            # Version spans are exact only without it: the overlap scheduler reports a new span one token early.
            "--disable-overlap-schedule",
        ],
    }  # fmt: skip


def test_two_real_sglang_servers_train_a_policy_with_updates_under_load(
    quickstart_config: Callable[..., Path], start_run: Any
) -> None:
    steps = 8
    run = start_run(quickstart_config(serve=sglang_on_cpu(), learn={"steps": steps, "save_every": 4}))
    assert run.finish(seconds=540) == 0, run.logs()

    metrics = run.directory.read_metrics()
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    # SGLang's logprobs equal the learner's forward pass: on fresh weights the ratio is one.
    assert metrics[0]["training/rollout_probs_diff_max"] < 1e-3
    assert abs(metrics[0]["actor/ppo_kl"]) < 1e-4
    rewards = [m["reward/mean"] for m in metrics]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.05, rewards

    updates = [e for e in read_jsonl(run.directory.events) if e["event"] == "weights_updated" and not e["error"]]
    for url in {e["url"] for e in updates}:
        assert {e["version"] for e in updates if e["url"] == url} >= set(range(1, steps - 1)), "every server followed"
    assert len({e["url"] for e in updates}) == 2
    versions = [set(r["segments"][0]["versions"]) - {-1} for r in read_records(run.directory.trajectories)]
    assert any(len(v) > 1 for v in versions), "no rollout spanned a weight update"
    report = audit_run(run.directory.root)
    assert report.clean, report.text()
    print(report.text())
    print("reward per step:", [round(r, 3) for r in rewards])
    paused = sorted(e["paused_s"] for e in updates if not e["is_first"])
    print(
        f"weight updates under load: {len(paused)}, paused p50 {paused[len(paused) // 2] * 1e3:.0f} ms, max {paused[-1] * 1e3:.0f} ms"
    )
