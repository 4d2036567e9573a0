"""Real stalls, injected into a running serve and learn: the doctor names each, and the cure is seen.

From which second on a stall is one is decided by ``judge`` from what the parts report, and is tested on it. Here only the order of
things counts: how soon a busy machine starts, halts and reports is its own affair. How soon it was, ``pytest -rP`` shows.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from chaos_rig import ROOT, Process, agentrl, environment, until, write_config, write_project
from chaos_script import Script

from agentrl.assembly.failure_budget import EXIT_GAVE_UP
from agentrl.assembly.stalls import Verdict, judge, take_snapshot
from agentrl.stream.server import EmbeddedServer
from agentrl.telemetry.run_dir import RunDir
from agentrl.testing.fake_sglang import FakeSGLang

pytestmark = pytest.mark.slow

LIMIT_S = 2.0
PATIENCE_S = 120.0
"""For what takes a few seconds on a quiet machine."""


class Engine:
    """A scripted engine in a thread of the test, so that a test may make it misbehave."""

    def __init__(self, script: Script) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = FakeSGLang(token_latency_s=0.002, sampler=script)
        self.call(self.server.start())

    def call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def close(self) -> None:
        self.call(self.server.kill())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


@dataclass
class Running:
    """A healthy serve and learn, an engine, and ways to break them."""

    folder: Path
    config: Path
    directory: RunDir
    engine: Engine
    serve: Process
    learn: Process

    def verdict(self) -> Verdict:
        return judge(take_snapshot(self.directory))

    def mode(self, what: str, value: str) -> None:
        (self.folder / f"{what}.mode").write_text(value)

    def moves(self) -> None:
        until(
            lambda: self.verdict().state == "moves" and float(self.directory.read_status("serve").get("quiet_s", 99)) < LIMIT_S,
            seconds=PATIENCE_S,
            name="moving run",
            show=lambda: f"{self.verdict()}\n{self.serve.text()[-3000:]}\n{self.learn.text()[-3000:]}",
        )

    def stalls(self, stage: str, *, says: str = "") -> Verdict:
        """The doctor's verdict, once it names this stage and says this: what is behind a stall may show a moment later."""
        began = time.monotonic()
        verdict: Verdict = until(
            lambda: v if (v := self.verdict()).state == "stalled" and v.stage == stage and says in v.line() else None,
            seconds=PATIENCE_S,
            name=f"stall of {stage} that says {says!r}",
            show=lambda: f"{self.verdict()}\n{json.dumps(self.directory.read_status('serve'), indent=1)[-3500:]}",
        )
        print(f"named after {time.monotonic() - began:.1f} s, with a limit of {LIMIT_S:g} s: {verdict.line()}")
        return verdict


def start_learn(folder: Path, config: Path) -> Process:
    return Process([str(ROOT / "tests/chaos/chaos_learner.py"), str(config)], folder, name="learn")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = write_project(tmp_path_factory.mktemp("stalls"))
    engine = Engine(Script.load(folder / "script.json"))
    config = write_config(
        folder,
        run={"name": "run", "dir": str(folder / "runs"), "seed": 0, "stall_warn_s": LIMIT_S},
        serve={"urls": [engine.server.url], "attempts": 1, "failure_budget_s": 4.0},
        queue={"max_bytes": 40_000},
        learn={"groups": 4, "max_staleness": 100, "pipeline_depth": 20},
    )
    learn = start_learn(folder, config)
    serve = agentrl("serve", "-c", str(config), folder=folder, name="serve")
    running = Running(folder, config, RunDir(folder / "runs/run"), engine, serve, learn)
    try:
        until(lambda: running.directory.config.is_file(), seconds=PATIENCE_S, name="run directory", show=serve.text)
        running.moves()
        yield running
    finally:
        running.serve.close()
        running.learn.close()
        engine.close()
        EmbeddedServer(running.directory.redis).stop()


@pytest.fixture
def running(rig: Running) -> Iterator[Running]:
    """The rig, healthy before and after each test."""
    yield rig
    for name in ("tool", "reward", "learn"):
        rig.mode(name, "")
    rig.moves()


def test_a_stopped_learner_is_named_with_its_pid(running: Running) -> None:
    os.kill(running.learn.pid, signal.SIGSTOP)
    try:
        verdict = running.stalls("learn", says="waits for SIGCONT")
        assert str(running.learn.pid) in verdict.text
        assert verdict.fix == f"kill -CONT {running.learn.pid}"
    finally:
        os.kill(running.learn.pid, signal.SIGCONT)


def test_a_stopped_serve_is_named(running: Running) -> None:
    os.kill(running.serve.pid, signal.SIGSTOP)
    try:
        assert running.stalls("serve", says="waits for SIGCONT").fix == f"kill -CONT {running.serve.pid}"
    finally:
        os.kill(running.serve.pid, signal.SIGCONT)


def test_a_stopped_stream_server_is_named(running: Running) -> None:
    pid = EmbeddedServer(running.directory.redis).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        verdict = running.stalls("stream", says="waits for SIGCONT")
        assert str(pid) in verdict.fix
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_dead_stream_server_is_named_and_both_sides_reconnect(running: Running) -> None:
    server = EmbeddedServer(running.directory.redis)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    try:
        running.stalls("stream", says="gives no answer")
    finally:
        running.directory.register("redis", url=server.ensure(), pid=server.pid)


def test_a_dead_learner_is_named(running: Running) -> None:
    running.learn.process.kill()
    running.learn.process.wait()
    try:
        verdict = running.stalls("learn", says="not running")
        assert "agentrl learn" in verdict.fix
    finally:
        running.learn = start_learn(running.folder, running.config)


def test_a_learner_that_computes_for_ever_is_named_by_what_it_does(running: Running) -> None:
    running.mode("learn", "step")
    verdict = running.stalls("learn", says="waits for step")
    assert verdict.since_s >= LIMIT_S


def test_an_engine_that_takes_requests_and_sends_nothing_is_named(running: Running) -> None:
    running.engine.server.stall()
    try:
        verdict = running.stalls("engine", says="waits for tokens")
        assert verdict.oldest_rollout.count("/") >= 2
        assert verdict.oldest_rollout_s >= 1.0
    finally:
        running.engine.call(running.engine.server.restart_with_base_weights())


def test_a_dead_engine_is_named_with_its_address(running: Running) -> None:
    running.engine.call(running.engine.server.kill())
    try:
        running.stalls("engine", says=running.engine.server.url)
    finally:
        running.engine.call(running.engine.server.start())


def test_a_quarantined_engine_is_named_with_the_reason(running: Running) -> None:
    running.engine.server.fail_next_updates(times=1000)
    running.engine.call(running.engine.server.restart_with_base_weights())
    try:
        verdict = running.stalls("engine", says="scripted")  # the reason the engine gave
        assert "quarantined" in verdict.text
    finally:
        running.engine.server.heal_updates()


def test_an_engine_that_somebody_paused_is_named(running: Running) -> None:
    url = running.engine.server.url
    httpx.post(url + "/pause_generation", json={"mode": "in_place"}).raise_for_status()
    try:
        running.stalls("engine", says=url)
    finally:
        httpx.post(url + "/continue_generation", json={}).raise_for_status()


def test_a_weight_update_that_no_engine_answers_is_named(running: Running) -> None:
    running.engine.server.hang_updates()
    running.mode("learn", "announce")
    try:
        running.stalls("weights", says=running.engine.server.url)
    finally:
        running.engine.server.hang_updates(hangs=False)


def test_a_stopped_sandbox_is_named_with_its_pid(running: Running) -> None:
    root = str(running.directory.root)
    sandbox = agentrl("sandbox", "--port", "0", "--run-dir", root, "--allow-unsafe", folder=running.folder, name="sandbox")
    try:
        until(lambda: running.directory.url_of("sandbox"), seconds=PATIENCE_S, name="sandbox", show=sandbox.text)
        os.kill(sandbox.pid, signal.SIGSTOP)
        verdict = running.stalls("sandbox", says="waits for SIGCONT")
        assert verdict.fix == f"kill -CONT {sandbox.pid}"
    finally:
        sandbox.close()
        running.directory.deregister("sandbox")


def test_a_tool_that_hangs_is_named(running: Running) -> None:
    running.mode("tool", "hang")
    verdict = running.stalls("tool:add")
    assert verdict.since_s >= 1.0
    assert "calls have no answer" in verdict.text


def test_a_scorer_that_hangs_is_named(running: Running) -> None:
    running.mode("reward", "hang")
    assert "scored" in running.stalls("reward").text


def test_a_full_stream_is_named_with_its_bound(running: Running) -> None:
    running.mode("learn", "hold")
    verdict = running.stalls("learn", says="waits for room on the stream")
    assert "full by bytes" in verdict.text
    # What it held is committed by the next learner.
    running.learn.close()
    running.mode("learn", "")
    running.learn = start_learn(running.folder, running.config)


def test_the_watchdogs_printed_the_same_lines_by_themselves(running: Running) -> None:
    running.mode("tool", "hang")
    running.stalls("tool:add")
    for process in (running.serve, running.learn):
        line = until(
            lambda process=process: [x for x in process.text().splitlines() if "stalled: tool:add waits for" in x],
            seconds=PATIENCE_S,
            name="line",
            show=process.text,
        )[0]
        assert "→" in line, "the cure is on the same line"
    running.mode("tool", "")
    until(
        lambda: "moves again: tool:add" in running.serve.text(),
        seconds=PATIENCE_S,
        name="end of the stall",
        show=running.serve.text,
    )


def doctor(running: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentrl", "doctor", str(running.directory.root), *arguments],
        cwd=ROOT, env=environment(running.folder), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_command_prints_one_unwrapped_line_and_exits_by_the_verdict(running: Running) -> None:
    healthy: list[subprocess.CompletedProcess[str]] = []

    def is_healthy() -> bool:  # a pause of the machine is a stall, too
        healthy.append(doctor(running))
        return healthy[-1].returncode == 0

    until(is_healthy, seconds=PATIENCE_S, name="healthy run", show=lambda: healthy[-1].stdout + healthy[-1].stderr)
    assert "moves" in healthy[-1].stdout
    os.kill(running.learn.pid, signal.SIGSTOP)
    try:
        running.stalls("learn", says="waits for SIGCONT")
        text, as_json = doctor(running), doctor(running, "--json")
    finally:
        os.kill(running.learn.pid, signal.SIGCONT)
    assert (text.returncode, as_json.returncode) == (1, 1)
    (line,) = [x for x in text.stdout.splitlines() if x.startswith("stalled:")]
    assert line.startswith("stalled: learn waits for SIGCONT, for ")
    assert line.endswith(f"→ kill -CONT {running.learn.pid}")
    verdict = json.loads(as_json.stdout)[0]
    assert (verdict["state"], verdict["stage"], verdict["level"]) == ("stalled", "learn", "fail")


def test_a_serve_whose_rollouts_all_fail_gives_up_with_what_failed_and_goes_on_once_it_is_repaired(running: Running) -> None:
    running.mode("reward", "fail")
    until(lambda: running.serve.process.poll() is not None, seconds=PATIENCE_S, name="end of serve", show=running.serve.text)
    assert running.serve.process.returncode == EXIT_GAVE_UP
    (line,) = [x for x in running.serve.text().splitlines() if x.startswith("error: FailureBudgetSpent: ")]
    assert "serve.failure_budget_s=4" in line
    assert re.search(r"by kind: reward \d+, the last failure: reward", line)
    running.mode("reward", "")
    running.serve = agentrl("serve", "-c", str(running.config), folder=running.folder, name="serve-again")
