"""The service's own account: Prometheus series, and recent percentiles per phase for ``/health``."""

from collections import deque
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from agentrl.sandbox.admission import Admission
from agentrl.sandbox.pool import Pool
from agentrl.sandbox.sessions import Sessions

Phase = Literal["queue", "compile", "run", "cell", "overhead", "session_start"]
PHASES: dict[Phase, str] = {
    "queue": "Wait for a slot",
    "compile": "Wall time of compilations",
    "run": "Wall time of runs",
    "cell": "Wall time of cells",
    "overhead": "Of a run, beyond its wall time",
    "session_start": "From asking for a session to having it",
}
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_RECENT = 1000


class Metrics:
    """In a registry of its own, so that several applications can live in one process."""

    def __init__(self, admission: Admission, pool: Pool, sessions: Sessions) -> None:
        self.registry = CollectorRegistry()
        self.runs = Counter("agentrl_sandbox_runs", "Finished runs by reason", ["reason"], registry=self.registry)
        self.compiles = Counter("agentrl_sandbox_compiles", "Finished compilations by reason", ["reason"], registry=self.registry)
        self.cells = Counter("agentrl_sandbox_cells", "Finished cells by reason", ["reason"], registry=self.registry)
        self.rejected = Counter("agentrl_sandbox_rejected", "Requests not run, by cause", ["cause"], registry=self.registry)
        self._phases = {
            phase: Histogram(f"agentrl_sandbox_{phase}_seconds", text, buckets=_BUCKETS, registry=self.registry)
            for phase, text in PHASES.items()
        }
        self._recent: dict[Phase, deque[float]] = {phase: deque(maxlen=_RECENT) for phase in PHASES}
        for name, text, value in (
            ("running", "Runs in flight", lambda: admission.running),
            ("waiting", "Requests in the queue", lambda: admission.waiting),
            ("sessions", "Open sessions", lambda: len(sessions)),
            ("sessions_ended", "Sessions that ended, for whatever reason", lambda: sum(sessions.ended.values())),
            ("fork_server_restarts", "Fork servers that died and were replaced", lambda: pool.restarts),
        ):
            Gauge(f"agentrl_sandbox_{name}", text, registry=self.registry).set_function(value)

    def took(self, phase: Phase, seconds: float) -> None:
        """Count one occurrence of a phase."""
        self._phases[phase].observe(seconds)
        self._recent[phase].append(seconds)

    def percentiles_ms(self) -> dict[str, dict[str, float]]:
        """Per phase the 50th and 99th percentile of the last thousand, in milliseconds."""
        found: dict[str, dict[str, float]] = {}
        for phase, seconds in self._recent.items():
            if ordered := sorted(seconds):
                last = len(ordered) - 1
                found[phase] = {name: round(1000 * ordered[round(q * last)], 3) for name, q in (("p50", 0.5), ("p99", 0.99))}
        return found
