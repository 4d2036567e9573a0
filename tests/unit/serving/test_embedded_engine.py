"""The engine as a process: how it starts, whom it lets in, what its streams carry, when it ends."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentrl.serving.embedded.checkpoint import CheckpointReader
from agentrl.serving.embedded.continuous_batching import ContinuousBatch, Sampling
from agentrl.serving.embedded.engine import Engine, EngineFailed, Job
from agentrl.serving.embedded_engine import load_model
from agentrl.testing.tiny_model import make_tiny_model
from agentrl.weights.digest import weights_digest

PROMPT = list(range(20, 60))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@dataclass
class Process:
    child: subprocess.Popen[str]
    url: str

    def call(self, path: str, body: dict[str, Any] | None = None, *, key: str | None = None) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=250) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def start(model_dir: Path, *flags: str) -> Process:
    command = [sys.executable, "-m", "agentrl.serving.embedded_engine", "--model-path", str(model_dir), "--port", "0", *flags]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.stdout is not None
    readable, _, _ = select.select([child.stdout], [], [], 250)
    line = child.stdout.readline() if readable else ""
    if not line.startswith("LISTENING http://127.0.0.1:"):
        child.kill()
        child.wait()
        raise AssertionError(f"said {line!r}")
    return Process(child, line.split()[1])


@pytest.fixture(scope="module")
def process(model_dir: Path) -> Iterator[Process]:
    started = start(model_dir, "--api-key", "secret", "--incremental-streaming-output", "--weight-version", "e1-v3")
    yield started
    started.child.terminate()
    assert started.child.wait(timeout=120) in (0, -signal.SIGTERM)
    assert started.child.stdout is not None
    started.child.stdout.close()


def test_key_is_wanted_everywhere_but_for_health_readiness_and_metrics(process: Process) -> None:
    for path in ("/model_info", "/v1/loads", "/server_info"):
        assert process.call(path)[0] == 401
        assert process.call(path, key="wrong")[0] == 401
        assert process.call(path, key="secret")[0] == 200
    assert process.call("/generate", {"input_ids": [1]})[0] == 401
    assert process.call("/pause_generation", {})[0] == 401
    assert [process.call(path)[0] for path in ("/health", "/health_generate", "/ready", "/metrics")] == [200] * 4


def test_facts_name_model_weights_and_digest_but_not_the_key(process: Process, model_dir: Path) -> None:
    info = json.loads(process.call("/model_info", key="secret")[1])
    assert info == json.loads(process.call("/get_model_info", key="secret")[1])
    assert (info["model_path"], info["weight_version"], info["model_type"]) == (str(model_dir), "e1-v3", "qwen2")
    assert info["weights_digest"] == weights_digest(model_dir)
    server = process.call("/server_info", key="secret")[1]
    assert json.loads(server)["internal_states"][0]["weight_version"] == "e1-v3"
    assert "secret" not in server


def test_incremental_stream_carries_each_token_once(process: Process) -> None:
    body = {"input_ids": PROMPT, "stream": True, "return_logprob": True}
    body["sampling_params"] = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
    status, text = process.call("/generate", body, key="secret")
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert (status, events.pop()) == (200, "[DONE]")
    chunks = [json.loads(event) for event in events]
    ids = [token for chunk in chunks for token in chunk["output_ids"]]
    entries = [entry for chunk in chunks for entry in chunk["meta_info"]["output_token_logprobs"]]
    body["stream"] = False
    whole = json.loads(process.call("/generate", body, key="secret")[1])
    assert ids == whole["output_ids"]
    assert [entry[1] for entry in entries] == ids
    assert chunks[-1]["meta_info"]["completion_tokens"] == 40
    assert chunks[-1]["meta_info"]["weight_versions"] == [{"version": "e1-v3", "start": 0, "end": 40}]


@pytest.mark.parametrize(
    "params",
    [{"n": 2}, {"stop": ["x"]}, {"frequency_penalty": 0.5}, {"logit_bias": {"5": 1.0}}, {"json_schema": "{}"}],
)
def test_what_the_engine_cannot_do_is_refused_by_name_and_neutral_values_pass(process: Process, params: dict[str, Any]) -> None:
    status, text = process.call("/generate", {"input_ids": PROMPT, "sampling_params": params}, key="secret")
    assert status == 400
    assert f"{next(iter(params))}=" in text
    neutral = {"n": 1, "stop": [], "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0, "max_new_tokens": 1}
    assert process.call("/generate", {"input_ids": PROMPT, "sampling_params": neutral}, key="secret")[0] == 200


def test_metrics_count_tokens_under_sglangs_names(process: Process) -> None:
    def generated() -> float:
        lines = process.call("/metrics")[1].splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("sglang:generation_tokens_total "))

    before = generated()
    process.call("/generate", {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 7, "ignore_eos": True}}, key="secret")
    assert generated() == before + 7


def test_broken_body_and_wrong_action_are_answered_400(process: Process) -> None:
    request = urllib.request.Request(process.url + "/generate", b"{not json", {"Authorization": "Bearer secret"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=120)
    assert process.call("/weights_checker", {"action": "reset_tensors"}, key="secret")[0] == 400
    assert process.call("/pause_generation", {"mode": "nap"}, key="secret")[0] == 400


def test_engine_ends_when_the_process_it_was_told_to_watch_is_gone(model_dir: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    started = start(model_dir, "--parent-pid", str(parent.pid))
    try:
        assert started.call("/health")[0] == 200
        parent.kill()  # and not reaped: a zombie is gone, too
        assert started.child.wait(timeout=120) == 0
    finally:
        parent.wait()
        started.child.kill()
        started.child.wait()
        assert started.child.stdout is not None
        started.child.stdout.close()


def test_model_path_that_is_no_directory_is_explained(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agentrl.serving.embedded_engine", "--model-path", str(tmp_path / "nowhere")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 2
    assert "is not a directory" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.asyncio
async def test_failure_of_the_engine_thread_ends_every_request_and_is_reported(model_dir: Path, caplog: Any) -> None:
    model = load_model(model_dir, device="cpu", dtype="float32")
    batch = ContinuousBatch(model, seed=0)
    reports: list[float] = []
    engine = Engine(
        model,
        batch,
        CheckpointReader(model, model_dir),
        weight_version="v0",
        model_path=str(model_dir),
        weights_digest="",
        on_failure=lambda: reports.append(time.monotonic()),
    )
    engine.start()
    job = Job(
        rid="r",
        prompt=PROMPT,
        max_new_tokens=5000,
        stop_ids=(),
        sampling=Sampling(),
        is_streamed=True,
        loop=asyncio.get_running_loop(),
    )
    engine.submit(job)
    await asyncio.wait_for(job.changed.wait(), 120)
    model.lm_head = None  # stands for whatever may break inside a forward pass
    async with asyncio.timeout(120):
        while job.finish is None:
            job.changed.clear()
            await job.changed.wait()
        while not reports:  # told of last, by the engine's own thread
            await asyncio.sleep(0.01)
    assert (job.finish["type"], job.finish["status_code"]) == ("abort", 500)
    assert job.ids
    assert engine.failure is not None
    assert len(reports) == 1
    with pytest.raises(EngineFailed):
        await engine.pause("abort")
    with pytest.raises(EngineFailed):
        engine.submit(job)
    engine.stop()
