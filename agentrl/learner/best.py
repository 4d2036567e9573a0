"""Which checkpoint is the best one: by a training metric that each carries, or by a measurement that comes later."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentrl.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepBest:
    """What is best."""

    metric: str
    """A step metric, such as ``reward/mean``; a checkpoint's score is its mean over the steps since the one before."""
    mode: Literal["max", "min"] = "max"
    measured: Callable[[Path], float | None] | None = None
    """A score that is found elsewhere, an evaluation of this checkpoint, say; None while there is none. It is asked again at every
    save, and takes the place of the step metric."""

    def score(self, values: Sequence[float]) -> dict[str, Any]:
        """As a checkpoint records it."""
        finite = [v for v in values if math.isfinite(v)]
        return {"metric": self.metric, "value": sum(finite) / len(finite) if finite else None}


def best_of(paths: Sequence[Path], best: KeepBest, read_state: Callable[[Path], Mapping[str, Any]]) -> Path | None:
    """The one with the best score, the first of equals; None when none has a score of this metric."""
    found: list[tuple[float, Path]] = []
    for path in paths:
        value = best.measured(path) if best.measured is not None else _recorded(path, best, read_state)
        if value is not None and math.isfinite(value):
            found.append((value if best.mode == "max" else -value, path))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _recorded(path: Path, best: KeepBest, read_state: Callable[[Path], Mapping[str, Any]]) -> float | None:
    try:
        score = read_state(path).get("score")
    except CheckpointError:  # damaged, so never the best
        return None
    return score.get("value") if isinstance(score, dict) and score.get("metric") == best.metric else None
