"""Processes are killed and halted at random moments; after every event the audit must be clean, and the run must go on.

    AGENTRL_CHAOS_KILLS=100 AGENTRL_CHAOS_SEED=7 make chaos        more events; a failure is replayed with the seed it printed

Everything is real but the model: supervisor, Redis, sandbox, serve, two engine processes that say what a script says, a learner
with a tiny model. 0 lost and 0 twice are what ``agentrl audit`` proves; 0 stuck is that acknowledged work grows after every event.
The seed decides everything: an odd one plays the rollouts in two worker processes, and the run ends by Ctrl-C, by SIGTERM or by
SIGKILL of its supervisor.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_rig import Process, agentrl, kill, logs_of, survivors, until, write_config, write_project

from agentrl.assembly.audit import audit_run, newest_checkpoint, stream_of
from agentrl.assembly.stalls import judge, take_snapshot
from agentrl.errors import ConfigError
from agentrl.stream.ledger import read_books
from agentrl.stream.server import EmbeddedServer
from agentrl.telemetry.run_dir import RunDir, read_jsonl

EVENTS = int(os.environ.get("AGENTRL_CHAOS_KILLS", "6"))
SEED = int(os.environ.get("AGENTRL_CHAOS_SEED", str(random.SystemRandom().randrange(10**6))))
EVENTS_PER_RUN = 20
"""More would make the audit, which reads everything, the longest part."""
PARTS = ("learn", "serve", "engine-0", "engine-1", "sandbox", "redis")
WORKERS = ("serve-0", "serve-1")
"""With ``serve.workers=2`` they play the rollouts; ``serve`` then owns the engines, and is reported as ``owner``."""
STUCK_AFTER_S = 240.0
"""A recovery takes some ten seconds on a quiet machine."""

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(1200 + 60 * min(EVENTS, EVENTS_PER_RUN))]


class Run:
    """An ``agentrl run`` under attack."""

    def __init__(self, folder: Path, config: Path, *overrides: str) -> None:
        self.directory = RunDir(folder / "runs" / config.stem)
        self.needs_server = True
        self.process: Process = agentrl("run", "-c", str(config), *overrides, folder=folder, name="run")

    def logs(self) -> str:
        verdict = judge(take_snapshot(self.directory)).line() if self.directory.config.is_file() else "no run yet"
        return f"{verdict}\n{self.process.text()[-3000:]}\n{logs_of(self.directory)}"

    def wait(self, what: Callable[[], Any], *, seconds: float, name: str) -> Any:
        def guarded() -> Any:
            assert self.process.process.poll() is None, f"the run ended with {self.process.process.returncode}\n{self.logs()}"
            return what()

        return until(guarded, seconds=seconds, name=name, show=self.logs)

    def pid_of(self, role: str) -> int | None:
        return next((int(e["pid"]) for e in self.directory.processes() if e["role"] == role), None)

    def live_children(self) -> list[str]:
        """What lives of the run but the stream's server, which outlives a supervisor that is killed."""
        return [str(e["role"]) for e in self.directory.processes() if e["role"] != "redis"]

    def acknowledged(self) -> int:
        """Trajectories that left the stream behind a checkpoint; never falls."""
        with stream_of(self.directory.root) as (client, keys):
            return read_books(client, keys).ledger.trained

    def audit(self) -> None:
        if self.needs_server:
            self.wait(EmbeddedServer(self.directory.redis).is_running, seconds=120, name="restarted stream server")
        try:
            report = audit_run(self.directory.root)
        except ConfigError as error:
            if "no checkpoint yet" not in str(error):
                raise
            return
        assert report.clean, f"{report.text()}\n{self.logs()}"

    def finish(self, *, seconds: float, code: int = 0) -> None:
        try:
            ended: int | None = self.process.process.wait(seconds)
        except subprocess.TimeoutExpired:
            ended = None
        assert ended == code, f"exit code {ended}\n{self.logs()}"
        self.process.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("chaos"), tool="code")


@pytest.fixture
def start(project: Path) -> Iterator[Callable[..., Run]]:
    started: list[Run] = []

    def begin(config: Path, *overrides: str) -> Run:
        started.append(Run(project, config, *overrides))
        return started[-1]

    yield begin
    for run in started:
        run.process.close()
        EmbeddedServer(run.directory.redis).release()


def named(role: str, workers: int) -> str:
    """As reports call the part."""
    return "owner" if role == "serve" and workers > 1 else role


def attack(run: Run, rng: random.Random, role: str, workers: int) -> dict[str, Any]:
    """One event, and what became of it."""
    halt_s = rng.uniform(0.3, 5.0) if rng.random() < 0.25 else 0.0
    waits_for_recovery = rng.random() < 0.35
    pause_s = rng.uniform(0.0, 3.0)
    before = run.acknowledged()
    how = signal.SIGSTOP if halt_s else signal.SIGKILL
    pid = run.wait(lambda: kill(run.pid_of(role), how), seconds=240, name=f"live {role}")
    began = time.monotonic()
    if halt_s:
        time.sleep(halt_s)
        kill(pid, signal.SIGCONT)
    event = {
        "role": named(role, workers),
        "signal": "STOP" if halt_s else "KILL",
        "halted_s": round(halt_s, 1),
        "recovery_s": None,
    }
    print(f"event {event} pause={pause_s:.1f} before={before}", flush=True)
    if waits_for_recovery:
        run.audit()
        run.wait(lambda: run.acknowledged() > before, seconds=STUCK_AFTER_S, name=f"progress after {event}")
        event["recovery_s"] = round(time.monotonic() - began, 1)
    time.sleep(pause_s)
    run.audit()
    return event


@pytest.mark.parametrize("number", range(-(-EVENTS // EVENTS_PER_RUN)))
def test_no_kill_and_no_halt_loses_repeats_or_sticks_anything(
    project: Path, start: Callable[..., Run], number: int, record_property: Any
) -> None:
    seed, count = SEED + number, min(EVENTS_PER_RUN, EVENTS - number * EVENTS_PER_RUN)
    print(f"AGENTRL_CHAOS_SEED={seed} AGENTRL_CHAOS_KILLS={count} replays this run", flush=True)
    rng, workers = random.Random(seed), 1 + seed % 2
    config = write_config(
        project, name=f"chaos-{number}", tool="code",
        run={"name": f"chaos-{number}", "dir": str(project / "runs"), "seed": seed, "max_restarts": 1000, "stall_warn_s": 30},
        learn={"steps": 100_000}, serve={"attempts": 3, "workers": workers},
    )  # fmt: skip
    run = start(config)
    run.wait(lambda: run.directory.config.is_file() and run.pid_of("redis"), seconds=240, name="stream server")
    run.wait(lambda: run.acknowledged() > 0, seconds=240, name="first acknowledged work")
    roles = PARTS if workers == 1 else PARTS + WORKERS
    rounds = [role for _ in range(-(-count // len(roles))) for role in rng.sample(roles, len(roles))]
    events = [attack(run, rng, role, workers) for role in rounds[:count]]

    last = run.acknowledged()
    run.wait(lambda: run.acknowledged() > last, seconds=STUCK_AFTER_S, name="progress after the last event")
    how = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[seed % 3]
    run.process.process.send_signal(how)
    run.finish(seconds=300, code=-how if how == signal.SIGKILL else 128 + how)
    until(lambda: not run.live_children(), seconds=300, name="end of what the supervisor started", show=run.logs)
    report = audit_run(run.directory.root)
    assert report.clean, report.text()

    # And to its end, undisturbed: nothing that the kills left behind is in the way. Scoring waits for everyone who plays: who comes
    # when the others have done the last steps already has no time to finish the groups that its predecessor had open.
    scoring = project / "reward.mode"
    scoring.write_text("hang")
    again = start(config, f"learn.steps={report.step + 3}")
    players = WORKERS if workers > 1 else ("serve",)
    again.wait(lambda: all(is_playing(again, role) for role in players), seconds=240, name="rollouts")
    scoring.write_text("")
    again.finish(seconds=300)
    report = audit_run(run.directory.root)
    assert report.clean, report.text()
    assert judge(take_snapshot(run.directory)).state == "finished"
    until(lambda: not survivors(project), seconds=120, name="end of every process", show=lambda: "\n".join(survivors(project)))
    with stream_of(run.directory.root) as (client, keys):
        books = read_books(client, keys)
    assert books.ledger.open_groups == 0, "the drain left a group open"
    assert decided_ordinals(run.directory) | ordinals(books.on_stream) == set(range(books.ledger.closed_groups)), (
        "a task was skipped"
    )
    save_report(seed, events, report.trained)
    record_property("events", events)


def is_playing(run: Run, role: str) -> bool:
    """Whether it has looked what there is to play, and so taken up what was left open."""
    status = run.directory.read_status(role)
    return status.get("pid") == run.pid_of(role) and int(status.get("policy_version", -1)) >= 0


def decided_ordinals(directory: RunDir) -> set[int]:
    return ordinals(str(e["id"]) for e in read_jsonl(newest_checkpoint(directory) / "ledger.jsonl"))


def ordinals(ids: Any) -> set[int]:
    return {int(i.removesuffix("/close").rsplit("/", 1 if i.endswith("/close") else 3)[1]) for i in ids}


def save_report(seed: int, events: list[dict[str, Any]], trained: int) -> None:
    """A line per run into the file that ``AGENTRL_CHAOS_REPORT`` names."""
    if path := os.environ.get("AGENTRL_CHAOS_REPORT"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"seed": seed, "trained": trained, "events": events}) + "\n")
