"""``agentrl ledger RUN --step N``: what one step of the learner consumed, from three files that must agree."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from agentrl.assembly.audit import read_lineage
from agentrl.errors import ConfigError
from agentrl.telemetry.run_dir import RunDir

COUNTED = ("trained", "filtered", "stale", "failed")
"""Outcomes that the metrics count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLedger:
    """How the trajectories that one step consumed ended."""

    step: int
    checkpoint: str
    """Name of the checkpoint whose ``ledger.jsonl`` and ``trained_ids.jsonl`` were read."""
    outcomes: dict[str, int]
    """Outcome -> trajectories, from ``ledger.jsonl``."""
    trained_ids: tuple[str, ...]
    """From ``trained_ids.jsonl``, in the order in which they were consumed."""
    measured: dict[str, int]
    """Outcome -> trajectories, from ``metrics.jsonl``; empty where the run wrote none."""

    @property
    def differences(self) -> list[str]:
        """Where the files disagree."""
        found: list[str] = []
        if (booked := self.outcomes.get("trained", 0)) != len(self.trained_ids):
            found.append(f"ledger.jsonl says that {booked} were trained, trained_ids.jsonl lists {len(self.trained_ids)}")
        by_kind = Counter[str]()
        for outcome, count in self.outcomes.items():
            by_kind[outcome.partition(":")[0]] += count
        for outcome, count in self.measured.items():
            if by_kind[outcome] != count:
                found.append(f"ledger.jsonl says {by_kind[outcome]} {outcome}, metrics.jsonl {count}")
        return found

    @property
    def closes(self) -> bool:
        """Whether the files agree."""
        return not self.differences

    def to_json(self) -> str:
        """One JSON object: the fields, ``differences`` and ``closes``."""
        return json.dumps({**asdict(self), "differences": self.differences, "closes": self.closes}, sort_keys=True)

    def table(self) -> str:
        """The step for people."""
        rows = [*sorted(self.outcomes.items()), ("consumed", sum(self.outcomes.values()))]
        width = max(len(name) for name, _ in rows)
        lines = [f"step {self.step}, by {self.checkpoint}", *(f"{name:<{width}}  {count:>10,}" for name, count in rows)]
        lines += [f"THE STEP DOES NOT CLOSE: {difference}" for difference in self.differences]
        if self.closes:
            also = " and metrics.jsonl" if self.measured else ""
            lines.append(f"The step closes: ledger.jsonl, trained_ids.jsonl{also} agree.")
        return "\n".join(lines)


def step_ledger(root: Path, step: int) -> StepLedger:
    """What the newest checkpoint says of a step.

    Raises:
        ConfigError: it is no run directory, has no checkpoint, or none that contains the step.
        DataError: a line is not what it should be, with file and line.
    """
    run = RunDir.open(root)
    lineage = read_lineage(run)
    if not 1 <= step <= lineage.step:
        raise ConfigError(
            f"step {step} is in no checkpoint of {root}: the newest, {lineage.checkpoint}, holds steps 1 to {lineage.step}"
        )
    measured: dict[str, int] = {}
    for line in run.read_metrics():
        if line.get("step") == step and f"agentrl/trajectories/{COUNTED[0]}" in line:  # the last one: a step may be repeated
            measured = {outcome: int(line.get(f"agentrl/trajectories/{outcome}", 0)) for outcome in COUNTED}
    return StepLedger(
        step=step,
        checkpoint=lineage.checkpoint,
        outcomes=dict(Counter(entry.outcome for entry in lineage.consumed if entry.step == step)),
        trained_ids=tuple(entry.id for entry in lineage.trained if entry.step == step),
        measured=measured,
    )
