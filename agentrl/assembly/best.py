"""``learn.keep_best`` for a run: by step metrics, or by what ``agentrl eval`` wrote about a checkpoint."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentrl.config import Config
from agentrl.errors import ConfigError
from agentrl.learner.best import KeepBest
from agentrl.learner.checkpoint import STATE_FILE
from agentrl.telemetry.metrics import CHAPTERS, is_declared
from agentrl.telemetry.run_dir import RunDir

EVAL_METRICS = ("eval/success", "eval/reward_mean")


def check_best(config: Config) -> None:
    """Refuse a metric that no step and no evaluation has.

    Raises:
        ConfigError: naming the nearest known one.
    """
    best = config.learn.keep_best
    if best is None or best.metric in EVAL_METRICS or (is_declared(best.metric) and not best.metric.startswith("eval/")):
        return
    known = [*EVAL_METRICS, *(name for chapter in CHAPTERS for metric in chapter.metrics for name in metric.names())]
    nearest = difflib.get_close_matches(best.metric, known, n=1, cutoff=0.0)
    raise ConfigError(
        f"learn.keep_best.metric={best.metric!r} is no metric of a step or an evaluation. Did you mean {nearest[0]}? docs/metrics.md lists "
        f"those of steps; of evaluations there are {' and '.join(EVAL_METRICS)}."
    )


def keep_best(config: Config, directory: RunDir) -> KeepBest | None:
    """As the config says; None when only the newest are kept."""
    best = config.learn.keep_best
    if best is None:
        return None
    if best.metric not in EVAL_METRICS:
        return KeepBest(metric=best.metric, mode=best.mode)
    field = best.metric.removeprefix("eval/")

    def measured(checkpoint: Path) -> float | None:
        return _evaluated(directory.evals, checkpoint, field, temperature=config.eval.temperature)

    return KeepBest(metric=best.metric, mode=best.mode, measured=measured)


def _evaluated(evals: Path, checkpoint: Path, field: str, *, temperature: float) -> float | None:
    """The newest evaluation of this checkpoint, decoded as the config says; not one of an older checkpoint of that name."""
    try:
        written = (checkpoint / STATE_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return None
    newest = (written, None)
    for file in evals.glob("*.json"):
        at = file.stat().st_mtime_ns
        result = _read(file)
        if at < newest[0] or result.get("temperature") != temperature or not isinstance(result.get(field), (int, float)):
            continue
        if Path(str(result.get("model", ""))).resolve() == checkpoint.resolve():
            newest = (at, float(result[field]))
    return newest[1]


def _read(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # being written
        return {}
    return found if isinstance(found, dict) else {}
