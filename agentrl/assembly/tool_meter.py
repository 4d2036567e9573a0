"""How the tools of the serve processes fared between two steps, for the step's metrics."""

import time
from collections.abc import Mapping
from typing import Any

from agentrl.telemetry.run_dir import RunDir, read_json

STALE_S = 60.0
"""A status older than this is of a process that is gone."""
_COUNTERS = ("calls", "model_errors", "timeouts", "infra_errors", "retries", "cache_hits")
_RATES = {"model_errors": "model_error_rate", "timeouts": "timeout_rate", "infra_errors": "infra_error_rate"}


class ToolMeter:
    """Reads the statuses that serve writes; remembers what it saw, so that a rate is that of the time since.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: RunDir) -> None:
        self._directory = directory
        self._seen: dict[tuple[str, str], Mapping[str, float]] = {}

    def read(self) -> dict[str, float]:
        """``tools/<name>/calls``, ``…/infra_error_rate`` and so on, summed over the serve processes; empty without any."""
        totals: dict[str, dict[str, float]] = {}
        for path in sorted(self._directory.status.glob("serve*.json")):
            status: Mapping[str, Any] = read_json(path) or {}
            if time.time() - float(status.get("time", 0.0)) > STALE_S:
                continue
            tools: Mapping[str, Mapping[str, float]] = status.get("tools") or {}
            for name, now in tools.items():
                source = f"{path.stem}:{status.get('pid')}"  # a restarted process counts from 0 again
                before = self._seen.get((source, name), {})
                self._seen[source, name] = now
                total = totals.setdefault(name, dict.fromkeys((*_COUNTERS, "circuit_open", "p99_ms"), 0.0))
                for key in _COUNTERS:
                    total[key] += now.get(key, 0) - before.get(key, 0)
                for key in ("circuit_open", "p99_ms"):
                    total[key] = max(total[key], now.get(key, 0.0))
        return {f"tools/{name}/{key}": value for name, total in totals.items() for key, value in _metrics(total).items()}


def _metrics(total: Mapping[str, float]) -> dict[str, float]:
    calls = total["calls"]
    rates = {rate: total[count] / calls if calls else 0.0 for count, rate in _RATES.items()}
    return {k: v for k, v in total.items() if k not in _RATES} | rates
