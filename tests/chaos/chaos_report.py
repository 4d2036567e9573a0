"""The table of a chaos run: ``python tests/chaos/chaos_report.py FILE``, where ``AGENTRL_CHAOS_REPORT`` named FILE."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median


def table(path: Path) -> str:
    """Events and seconds until acknowledged work grew again, by part and fault."""
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    seconds: dict[tuple[str, str], list[float | None]] = defaultdict(list)
    for event in (event for run in runs for event in run["events"]):
        seconds[event["role"], event["signal"]].append(event["recovery_s"])
    lines = [
        "| part | fault | events | recovery measured | median s | max s |",
        "|---|---|---|---|---|---|",
    ]
    for (role, signal), values in sorted(seconds.items()):
        known = [v for v in values if v is not None]
        shown = (f"{median(known):.1f}", f"{max(known):.1f}") if known else ("", "")
        lines.append(f"| {role} | {signal} | {len(values)} | {len(known)} | {shown[0]} | {shown[1]} |")
    total = sum(len(values) for values in seconds.values())
    lines.append(f"\n{total} events in {len(runs)} runs; {sum(run['trained'] for run in runs)} trajectories trained.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
