"""Signs of life: what each process writes once a second, and the line it prints by itself when the run no longer moves."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from agentrl.assembly.stalls import Verdict, judge, take_snapshot
from agentrl.config import Config
from agentrl.errors import AgentRLError
from agentrl.supervise import current_waits
from agentrl.telemetry.run_dir import RunDir

log = logging.getLogger(__name__)

BEAT_S = 1.0


class Watchdog:
    """Prints the doctor's line when nothing moved for ``run.stall_warn_s``, again at doubled intervals, and when it moves on.

    Args:
        directory: of the run.
        config: its config.
        on_stall: told of each verdict that is printed.
    """

    def __init__(self, directory: RunDir, config: Config, *, on_stall: Callable[[Verdict], None] | None = None) -> None:
        self._directory, self._config, self._on_stall = directory, config, on_stall
        self._stage = ""
        self._next_s = 0.0
        self._pause_s = 0.0
        self.every_s = min(15.0, max(BEAT_S / 2, config.run.stall_warn_s / 4))
        """How often to call ``look``."""

    def look(self) -> Verdict | None:
        """Take a snapshot and say what there is to say. Returns the verdict, or None when the run cannot be read."""
        try:
            verdict = judge(take_snapshot(self._directory, config=self._config))
        except (AgentRLError, OSError, ValueError) as error:
            log.debug("watchdog could not look: %s", error)
            return None
        now = time.monotonic()
        if verdict.state != "stalled":
            if self._stage:
                log.warning("moves again: %s was the stage that waited", self._stage)
            self._stage, self._pause_s = "", 0.0
        elif verdict.since_s >= self._config.run.stall_warn_s and (verdict.stage != self._stage or now >= self._next_s):
            self._pause_s = max(self._config.run.stall_warn_s, 2 * self._pause_s)
            self._stage, self._next_s = verdict.stage, now + self._pause_s
            log.warning("%s", verdict.line())
            if self._on_stall is not None:
                try:
                    self._on_stall(verdict)
                except OSError as error:  # a full disk is one of the things it has to outlive
                    log.warning("stall could not be recorded: %s", error)
        return verdict

    def watch(self, stop: threading.Event) -> None:
        """Look until told to stop; a thread's target."""
        while not stop.wait(self.every_s):
            self.look()


class LearnStatus:
    """What learn does now, written once a second by a thread, so that a long step is told from a dead process.

    ``waits`` may be called from the loop while it waits; ``moved`` when something came of it.
    """

    def __init__(self, directory: RunDir, *, version: int = 0, watchdog: Watchdog | None = None) -> None:
        self._directory, self._watchdog = directory, watchdog
        self._lock = threading.Lock()
        self._version = version
        self._doing, self._doing_since = "start", time.monotonic()
        self._wait_since: float | None = None
        self._moved_at = time.monotonic()
        self._beat_at = 0.0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._beat, name="status", daemon=True)]
        if watchdog is not None:
            self._threads.append(threading.Thread(target=watchdog.watch, args=(self._stop,), name="watchdog", daemon=True))

    def __enter__(self) -> "LearnStatus":
        self.write()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(5)
        self.write()

    def moved(self, *, version: int | None = None, doing: str = "step") -> None:
        """Something came of it: a group was taken, a step was made, a checkpoint saved. ``doing`` is what follows."""
        with self._lock:
            self._version = self._version if version is None else version
            self._moved_at = time.monotonic()
            self._wait_since = None
            self._set(doing)

    def does(self, doing: str) -> None:
        """Working on ``doing`` from now on."""
        with self._lock:
            self._wait_since = None
            self._set(doing)

    def waits(self, reason: str, seconds: float) -> None:
        """Waiting for ``reason`` since ``seconds``."""
        with self._lock:
            self._wait_since = time.monotonic() - seconds
            self._set(reason)

    def _set(self, doing: str) -> None:
        if doing != self._doing:
            self._doing, self._doing_since = doing, time.monotonic()

    def write(self) -> None:
        """Replace ``status/learn.json``."""
        now = time.monotonic()
        with self._lock:
            waits: Mapping[str, Any] = {}
            if self._wait_since is not None:
                waits = {self._doing: {"count": 1, "oldest_s": round(now - self._wait_since, 1)}}
            status = {
                "policy_version": self._version,
                "doing": self._doing,
                "doing_s": round(now - self._doing_since, 1),
                "quiet_s": round(now - self._moved_at, 1),
                "wait": next(iter(waits), ""),
                "waits": waits,
            }
        self._directory.write_status("learn", status)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self.write()
            except OSError as error:
                log.warning("status could not be written: %s", error)


class ServeProgress:
    """Since when serve makes no progress: no rollout finished, no token served, no tool call answered."""

    def __init__(self) -> None:
        now = time.monotonic()
        self._marks: tuple[int, int, int] = (0, 0, 0)
        self._finished = 0
        self._moved_at = self._finished_at = now

    def fields(self, *, finished: int, tokens: int, calls: int) -> dict[str, float]:
        """``quiet_s`` and ``finished_s`` of the status, from the process's counters."""
        now = time.monotonic()
        if (finished, tokens, calls) != self._marks:
            self._marks, self._moved_at = (finished, tokens, calls), now
        if finished != self._finished:
            self._finished, self._finished_at = finished, now
        return {"quiet_s": round(now - self._moved_at, 1), "finished_s": round(now - self._finished_at, 1)}


def waits_now() -> dict[str, dict[str, float]]:
    """This process's waits as a status holds them."""
    return {reason: {"count": w.count, "oldest_s": round(w.oldest_s, 1)} for reason, w in current_waits().items()}
