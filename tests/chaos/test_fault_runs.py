"""Faults of the machine and the network against a whole run under way. Minutes; part of ``make chaos``, not of ``make test``.

AGENTRL_CHAOS_RESTARTS=20 make chaos        each part is killed twenty times, and the seconds until acknowledged work grows are kept
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_rig import HERE, ROOT, small_disk, survivors, until, write_config, write_project
from test_chaos import EVENTS, PARTS, SEED, STUCK_AFTER_S, Run, named, save_report
from test_faults import fill

from agentrl.assembly.audit import audit_run
from agentrl.assembly.stalls import HEALTHY_ENGINE, judge, take_snapshot
from agentrl.stream.codec import MAGIC
from agentrl.stream.connection import connect
from agentrl.stream.keys import Keys
from agentrl.stream.ledger import read_ledger
from agentrl.stream.server import EmbeddedServer
from agentrl.testing.stream_doubles import LossyProxy

RESTARTS = int(os.environ.get("AGENTRL_CHAOS_RESTARTS", "0"))

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(EVENTS < 20 and not RESTARTS, reason="takes minutes: part of `make chaos`"),
]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    started: list[Run] = []

    def start(folder: Path, config: Path) -> Run:
        started.append(Run(folder, config))
        return started[-1]

    yield start
    for run in started:
        run.process.close()
        EmbeddedServer(run.directory.redis).release()


def config_in(folder: Path, runs: Path, *, tool: str = "add", **sections: Any) -> Path:
    return write_config(
        folder, tool=tool,
        **{"run": {"name": "run", "dir": str(runs), "seed": SEED, "max_restarts": 1000, "stall_warn_s": 5}, "learn": {"steps": 100_000}} | sections,
    )  # fmt: skip


def goes_on(run: Run, what: str) -> float:
    """Seconds until acknowledged work grew, with a clean audit behind it."""
    before, began = run.acknowledged(), time.monotonic()
    run.wait(lambda: run.acknowledged() > before, seconds=STUCK_AFTER_S, name=f"progress after {what}")
    seconds = time.monotonic() - began
    run.audit()
    print(f"{what}: goes on after {seconds:.1f} s", flush=True)
    return round(seconds, 1)


def working_pid_of(run: Run, role: str) -> int | None:
    """The part's pid once it is back at work, where its twin would hide that it is not."""
    pid = run.pid_of(role)
    if role.startswith("serve-"):
        return pid if run.directory.read_status(role).get("pid") == pid else None
    if role.startswith("engine-"):
        url, engines = run.directory.url_of(role), run.directory.read_status("serve").get("engines", [])
        return pid if any(e["url"] == url and e["state"] in HEALTHY_ENGINE for e in engines) else None
    return pid


def end(run: Run) -> None:
    run.process.process.send_signal(signal.SIGINT)
    run.finish(seconds=150, code=130)
    report = audit_run(run.directory.root)
    assert report.clean, report.text()


def test_a_run_survives_a_silent_network_and_damaged_entries(tmp_path: Path, begin: Callable[..., Run]) -> None:
    folder = write_project(tmp_path)
    server = EmbeddedServer(tmp_path / "redis")
    with LossyProxy(server.ensure()) as proxy:
        run = begin(folder, config_in(folder, tmp_path / "runs", queue={"url": proxy.url}))
        run.needs_server = False
        until(lambda: run.directory.config.is_file(), seconds=60, name="run directory")
        run.wait(lambda: run.acknowledged() > 0, seconds=90, name="first acknowledged work")
        events: list[dict[str, Any]] = []
        for _ in range(2):
            proxy.go_silent()
            time.sleep(5)
            proxy.heal()  # the old connections stay dead: each side finds out by its own deadline
            events.append({"role": "network", "signal": "SILENT", "recovery_s": goes_on(run, "half-open connections")})
        with connect(server.url) as client:
            before = read_ledger(client, Keys("run")).dead
            for junk in (b"", b"ARLE", MAGIC + b"\0" * 50, os.urandom(300)):
                client.xadd(Keys("run").traj, {"t": f"junk/{len(junk)}", "g": "junk/0", "k": "t", "n": str(len(junk)), "b": junk})
                client.xadd(Keys("run").traj, {"anything": junk})
            proxy.corrupt(5, marker=MAGIC)
            run.wait(lambda: read_ledger(client, Keys("run")).dead >= before + 8 + 1, seconds=60, name="dead letters")
        events.append({"role": "stream", "signal": "CORRUPT", "recovery_s": goes_on(run, "damaged entries")})
        assert proxy.corrupted >= 1
        end(run)
        save_report(SEED, events, run.acknowledged())
    server.stop()


def test_a_run_waits_out_a_full_disk_and_a_slow_one(tmp_path: Path, begin: Callable[..., Run]) -> None:
    folder = write_project(tmp_path)
    with small_disk(tmp_path / "disk", mib=192) as disk:
        run = begin(folder, config_in(folder, disk))
        run.directory = type(run.directory)(disk / "run")
        until(lambda: run.directory.config.is_file(), seconds=60, name="run directory")
        run.wait(lambda: run.acknowledged() > 0, seconds=90, name="first acknowledged work")
        ballast = fill(disk)
        verdict = run.wait(
            lambda: v if (v := judge(take_snapshot(run.directory))).stage == "disk" else None, seconds=60, name="disk verdict"
        )
        assert verdict.state == "stalled"
        time.sleep(8)
        ballast.unlink()
        events = [{"role": "disk", "signal": "FULL", "recovery_s": goes_on(run, "a full disk")}]
        run.wait(lambda: run.pid_of("redis"), seconds=30, name="stream server")
        ends = time.monotonic() + 6
        while time.monotonic() < ends:  # a disk that stalls: the server answers in bursts
            pid = run.pid_of("redis")
            if pid is not None:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.4)
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)
        events.append({"role": "disk", "signal": "SLOW", "recovery_s": goes_on(run, "a slow disk")})
        end(run)
        save_report(SEED, events, run.acknowledged())
        EmbeddedServer(run.directory.redis).stop()


def test_a_run_whose_parts_disagree_about_the_date_goes_on(
    tmp_path: Path, begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path)
    clock = tmp_path / "clock.json"
    clock.write_text(json.dumps({"serve": 40, "learn": -40, "engine": 4000}))
    monkeypatch.setenv("CHAOS_CLOCK", str(clock))
    monkeypatch.setenv("CHAOS_PYTHONPATH", f"{HERE / 'clock_shift'}:{ROOT}")
    run = begin(folder, config_in(folder, tmp_path / "runs"))
    until(lambda: run.directory.config.is_file(), seconds=60, name="run directory")
    run.wait(lambda: run.acknowledged() > 0, seconds=90, name="first acknowledged work")
    events: list[dict[str, Any]] = []
    for shift in ({"serve": -40, "learn": 40}, {"serve": 400, "run": 30}, {}):
        clock.write_text(json.dumps(shift))
        time.sleep(1.0)
        events.append({"role": "clock", "signal": "JUMP", "recovery_s": goes_on(run, f"clocks at {shift}")})
        assert judge(take_snapshot(run.directory)).state == "moves"
    for role in ("serve", "learn"):  # and restarts in between remember what was put
        clock.write_text(json.dumps({role: 90}))
        os.kill(run.wait(lambda role=role: run.pid_of(role), seconds=60, name=f"live {role}"), signal.SIGKILL)
        goes_on(run, f"{role} back 90 days later")
    end(run)
    save_report(SEED, events, run.acknowledged())


@pytest.mark.skipif(not RESTARTS, reason="AGENTRL_CHAOS_RESTARTS=20 kills each part twenty times")
@pytest.mark.timeout(600 + 6 * 60 * max(1, RESTARTS))
@pytest.mark.parametrize(("role", "workers"), [*((role, 1) for role in PARTS), ("serve", 2), ("serve-0", 2)])
def test_each_part_may_be_restarted_many_times(tmp_path: Path, begin: Callable[..., Run], role: str, workers: int) -> None:
    folder = write_project(tmp_path, tool="code")
    run = begin(folder, config_in(folder, tmp_path / "runs", tool="code", serve={"attempts": 3, "workers": workers}))
    run.wait(lambda: run.directory.config.is_file() and run.pid_of("redis"), seconds=60, name="stream server")
    run.wait(lambda: run.acknowledged() > 0, seconds=90, name="first acknowledged work")
    rng, events = random.Random(SEED), list[dict[str, Any]]()
    for number in range(RESTARTS):
        pid = run.wait(lambda: working_pid_of(run, role), seconds=STUCK_AFTER_S, name=f"working {role}")
        os.kill(pid, signal.SIGKILL)
        recovery_s = goes_on(run, f"kill {number + 1} of {role}")
        events.append({"role": named(role, workers), "signal": "KILL", "recovery_s": recovery_s})
        time.sleep(rng.uniform(0, 1))
    end(run)
    until(lambda: not survivors(folder), seconds=20, name="end of every process", show=lambda: "\n".join(survivors(folder)))
    save_report(SEED, events, run.acknowledged())
