"""``agentrl run`` trains a black-box agent: a program that only knows the OpenAI API."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from agentrl.assembly.audit import audit_run, ledger_of
from agentrl.plugins import load_object
from agentrl.telemetry.trajectory_log import read_records
from agentrl.testing.tiny_model import make_tiny_model

# Rewrites its history in every second rollout, so that some trajectories have two segments; the reward is by API.
AGENT = """
import hashlib, json, os, urllib.request
def post(url, body):
    headers = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"}
    return json.load(urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)))
def ask(messages):
    return post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", {"messages": messages})["choices"][0]["message"]
messages = json.loads(os.environ["AGENTRL_TASK"])["messages"]
said = ask(messages)
if os.getpid() % 2:
    ask([*messages, said, {"role": "user", "content": "Once more."}])
else:
    ask([{"role": "user", "content": "So far: nothing. Go on."}])
text = said["content"] or ""
post(os.environ["AGENTRL_SESSION_URL"] + "/reward", {"reward": hashlib.sha256(text.encode()).digest()[0] / 256})
"""


@pytest.mark.slow
def test_a_black_box_agent_is_trained_and_the_audit_is_clean(tmp_path: Path, start_run: Any) -> None:
    load_object("envs.guess_number:prepare")(tmp_path, limit=8)
    values = {
        "run": {"name": "test", "dir": str(tmp_path / "runs"), "seed": 0},
        "model": {"path": str(make_tiny_model(tmp_path / "model", num_layers=1))},
        "data": {"train": str(tmp_path / "train.parquet"), "val": str(tmp_path / "val.parquet")},
        "agent": {"command": [sys.executable, "-c", AGENT], "reward": "api"},
        "serve": {"agent": "proxy", "replicas": 1, "n": 2, "turns": 4, "tokens": 64, "tokens_per_turn": 16, "in_flight": 4},
        # Without staleness the second step learns from what the first one's weights sampled, and from nothing else.
        "learn": {
            "steps": 2, "groups": 2, "lr": 1e-3, "save_every": 1, "zero_spread": "keep", "micro_tokens": 2048,
            "max_staleness": 0, "pipeline_depth": 0,
        },
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    run = start_run(path)
    assert run.finish(seconds=600) == 0, run.logs()
    report = audit_run(run.directory.root)
    assert report.clean, report.text()
    assert (report.step, report.trained) == (2, 8)
    assert ledger_of(run.directory.root).closes
    records = list(read_records(run.directory.trajectories))
    assert {r["agent"] for r in records} == {"proxy"}
    assert {len(r["segments"]) for r in records} <= {1, 2}
    for record in records:
        for segment in record["segments"]:
            mask, versions = np.asarray(segment["mask"]), np.asarray(segment["versions"])
            assert mask.sum() > 0
            assert (versions[mask == 1] >= 0).all()
    assert {v for r in records for s in r["segments"] for v in s["versions"]} >= {0, 1}
