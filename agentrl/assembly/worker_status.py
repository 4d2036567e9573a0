"""Several workers' statuses as the one that the doctor, the view and the watchdog read."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from agentrl.telemetry.run_dir import RunDir

OLD_S = 10.0
"""A status is written every second; an older one says nothing of now."""

_NEWEST = ("policy_version", "closed_groups", "consumed_groups", "next_ordinal", "budget_groups")
_LEAST = ("quiet_s", "finished_s")
"""The run moves when one worker does."""
_LONGEST = ("oldest_rollout_s",)
_SUMMED = (
    "open_groups", "running_rollouts", "finished", "retried", "groups_closed", "groups_again", "groups_lost",
    "groups_without_members", "groups_without_baseline", "tokens_sampled", "tokens_observed", "tokens_per_s",
)  # fmt: skip


def fresh_statuses(directory: RunDir, names: Sequence[str]) -> list[dict[str, Any]]:
    """The statuses of the workers that live."""
    found = [directory.read_status(name) for name in names]
    return [status for status in found if time.time() - float(status.get("time", 0.0)) < OLD_S]


def summed(statuses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One status of all workers; empty while none has reported."""
    if not statuses:
        return {}
    oldest = max(statuses, key=lambda s: s.get("oldest_rollout_s", 0.0))
    waits = _waits(statuses)
    return {
        **{name: sum(s.get(name, 0) for s in statuses) for name in _SUMMED},
        **{name: max(s.get(name, 0) for s in statuses) for name in (*_NEWEST, *_LONGEST)},
        **{name: min(s.get(name, 0.0) for s in statuses) for name in _LEAST},
        "failed": _added(s.get("failed", {}) for s in statuses),
        **{name: _added(s.get(name, {}) for s in statuses) for name in ("requests", "agents", "partials")},
        "tools": _tools(statuses),
        "failing": next((s["failing"] for s in statuses if s.get("failing")), ""),
        "oldest_rollout": oldest.get("oldest_rollout", ""),
        "waits": waits,
        "wait": next(iter(waits), ""),
    }


def _waits(statuses: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    waits: dict[str, dict[str, float]] = {}
    for status in statuses:
        for reason, wait in status.get("waits", {}).items():
            known = waits.setdefault(reason, {"count": 0, "oldest_s": 0.0})
            known["count"] += wait["count"]
            known["oldest_s"] = max(known["oldest_s"], wait["oldest_s"])
    return dict(sorted(waits.items(), key=lambda item: -item[1]["oldest_s"]))


def _tools(statuses: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Counts add up; rates, percentiles and flags are the worst worker's."""
    tools: dict[str, dict[str, float]] = {}
    for status in statuses:
        for name, stats in status.get("tools", {}).items():
            known = tools.setdefault(name, {})
            for key, value in stats.items():
                is_count = isinstance(value, int) and not isinstance(value, bool)
                known[key] = known.get(key, 0) + value if is_count else max(known.get(key, value), value)
    return tools


def _added(counts: Any) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in counts:
        for name, value in one.items():
            total[name] = total.get(name, 0) + value
    return total
