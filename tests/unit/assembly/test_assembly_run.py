"""What the supervisor's end means to whoever started it."""

import signal
from pathlib import Path

import pytest

from agentrl.assembly.run import RunInterrupted, _DiskGuard, _StopOnSignal
from agentrl.assembly.stalls import DISK_LOW_BYTES
from agentrl.cli.main import _exit_code
from agentrl.errors import AgentRLError, ConfigError
from agentrl.telemetry.run_dir import RunDir, read_jsonl


def ends_with(error: Exception | None) -> int:
    def command() -> None:
        if error is not None:
            raise error

    return _exit_code(command)


def test_exit_codes_tell_a_finished_run_from_a_stopped_a_failed_and_a_misconfigured_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends_with(None) == 0
    assert ends_with(RunInterrupted(RunDir(tmp_path), signal.SIGINT)) == 130
    assert ends_with(RunInterrupted(RunDir(tmp_path), signal.SIGTERM)) == 143
    assert (ends_with(AgentRLError("x")), ends_with(ConfigError("x")), ends_with(KeyboardInterrupt())) == (1, 2, 130)
    assert f"SIGINT ended the run before its last step. What was learned is saved in {tmp_path}" in capsys.readouterr().err


def test_the_first_signal_asks_and_is_the_one_that_counts_and_the_second_insists() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with _StopOnSignal() as stop:
            assert (stop.requested, stop.number) == (False, 0)
            signal.raise_signal(signal.SIGTERM)
            assert (stop.requested, stop.impatient, stop.number) == (True, False, signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert (stop.impatient, stop.number) == (True, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_a_disk_with_room_holds_nothing_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path).create()
    left = iter([DISK_LOW_BYTES, DISK_LOW_BYTES - 1, 0, 1 << 40, 1 << 40])
    guard = _DiskGuard(run, free=lambda _: next(left))
    assert [guard.is_full() for _ in range(5)] == [False, True, True, False, False]
    assert [e["event"] for e in read_jsonl(run.events)] == ["disk_was_full"]
