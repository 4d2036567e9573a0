"""The run directory's shared files stay true while processes come and go."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agentrl.errors import ConfigError
from agentrl.telemetry.run_dir import LineFile, RunDir, read_jsonl
from agentrl.telemetry.statistics import wilson_interval
from agentrl.telemetry.trackers import FileTracker


def test_processes_lists_live_ones_only(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run.register("serve")
    run.register("engine-0", pid=child.pid, url="http://127.0.0.1:1")
    assert {(e["role"], e["pid"]) for e in run.processes()} == {("serve", os.getpid()), ("engine-0", child.pid)}
    assert run.url_of("engine-0") == "http://127.0.0.1:1"
    child.communicate(b"\n")
    assert [e["role"] for e in run.processes()] == ["serve"]
    run.register("learn")
    assert {e["role"] for e in json.loads(run.processes_file.read_text())} == {"serve", "learn"}
    run.deregister("serve")
    assert [e["role"] for e in run.processes()] == ["learn"]


def test_a_reused_pid_is_not_taken_for_the_recorded_process(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.register("serve")
    entries = json.loads(run.processes_file.read_text())
    entries[0]["created"] -= 100
    run.processes_file.write_text(json.dumps(entries))
    assert run.processes() == []


def test_concurrent_registrations_all_survive(tmp_path: Path) -> None:
    code = "import sys; from agentrl.telemetry.run_dir import RunDir; RunDir(sys.argv[1]).register(sys.argv[2], pid=int(sys.argv[3]))"
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), f"engine-{i}", str(os.getpid())]) for i in range(6)]
    assert [c.wait(240) for c in children] == [0] * 6
    assert {e["role"] for e in RunDir(tmp_path).processes()} == {f"engine-{i}" for i in range(6)}


def test_two_threads_may_write_one_status(tmp_path: Path) -> None:
    """As learn's do: the one that beats once a second, and the main one when it ends."""
    run = RunDir(tmp_path).create()

    def write(doing: str) -> None:
        for _ in range(300):
            run.write_status("learn", {"doing": doing})

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, ("step", "checkpoint")))
    assert run.read_status("learn")["doing"] in ("step", "checkpoint")
    assert [path.name for path in run.status.iterdir()] == ["learn.json"]


def test_whoever_finds_a_config_finds_all_of_it(tmp_path: Path) -> None:
    run, text = RunDir(tmp_path).create(), "x" * 100_000
    found: set[int] = set()
    written = threading.Event()

    def watch() -> None:
        while not written.is_set():
            if run.config.is_file():
                found.add(len(run.config.read_text()))

    with ThreadPoolExecutor(1) as threads:
        watching = threads.submit(watch)
        for _ in range(200):
            run.write_config(text)
        written.set()
        watching.result()
    assert found <= {len(text)}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.resolved\.yaml"):
        RunDir.open(tmp_path)


def test_a_torn_last_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [m["step"] for m in read_jsonl(path)] == [1, 2]


def test_metrics_of_steps_that_a_resume_undid_are_set_aside(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    tracker = FileTracker(run, resumed_at=1)
    tracker.record({"step": 2, "reward/mean": 0.5})
    tracker.close()
    assert [m["step"] for m in run.read_metrics()] == [1, 2]
    assert run.read_metrics()[1]["reward/mean"] == 0.5
    assert [m["step"] for m in read_jsonl(tmp_path / "metrics.abandoned.jsonl")] == [2, 3]


def test_wilson_interval_matches_published_values() -> None:
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(0, 20)  # same table: 0 to 0.1611
    assert (round(low, 4), round(high, 4)) == (0.0, 0.1611)


def test_a_line_that_the_disk_cuts_short_is_taken_back(tmp_path: Path) -> None:
    """A limit on the file's size refuses as a full disk does: first a part, then an error."""
    code = """
import resource, signal, sys
from pathlib import Path
from agentrl.telemetry.run_dir import LineFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
file = LineFile(path)
file.write(b'{"a": 1}')
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
try:
    file.write(b'{"b": "' + b"x" * 50 + b'"}')
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    file.write(b'{"c": 3}')
"""
    path = tmp_path / "lines.jsonl"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'


def test_a_torn_line_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "tor')
    assert list(read_jsonl(path)) == [{"a": 1}]
    with LineFile(path) as file:
        file.write(b'{"c": 3}')
    assert list(read_jsonl(path)) == [{"a": 1}, {"c": 3}]
    path.write_bytes(b'{"a": nonsense}\n')
    with pytest.raises(ValueError, match="Expecting"):
        list(read_jsonl(path))
