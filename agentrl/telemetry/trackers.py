"""Where step metrics go: ``metrics.jsonl`` always, and console, TensorBoard and W&B when asked for."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from agentrl.errors import ConfigError
from agentrl.telemetry.run_dir import LineFile, RunDir, read_jsonl

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives the metrics of each step."""

    def record(self, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class FileTracker:
    """``metrics.jsonl``: one object per step, in order. Lines beyond a resumed step are set aside, never mixed in."""

    def __init__(self, run: RunDir, *, resumed_at: int) -> None:
        abandoned = _set_aside_later_steps(run.metrics, resumed_at)
        if abandoned:
            run.event("metrics_abandoned", resumed_at=resumed_at, steps=abandoned)
        self._file = LineFile(run.metrics)

    def record(self, metrics: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(metrics, default=float).encode())

    def close(self) -> None:
        self._file.close()


class ConsoleTracker:
    """One log line per step."""

    def record(self, metrics: Mapping[str, Any]) -> None:
        log.info(
            "step=%d reward=%.3f kl=%.4f grad_norm=%.3f staleness=%.2f tokens_per_s=%.0f",
            metrics["step"],
            metrics.get("reward/mean", float("nan")),
            metrics.get("actor/ppo_kl", float("nan")),
            metrics.get("actor/grad_norm", float("nan")),
            metrics.get("training/off_policy/trajectory_staleness/mean", float("nan")),
            metrics.get("perf/throughput", float("nan")),
        )

    def close(self) -> None:
        """Nothing is held open."""


class TensorBoardTracker:
    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "log.trackers has tensorboard, but tensorboardX is not installed: pip install tensorboardX"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def record(self, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, int(metrics["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    def __init__(self, folder: Path, *, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # an extra; absent from `make setup`
        except ImportError as error:
            raise ConfigError("log.trackers has wandb, but wandb is not installed: pip install wandb") from error
        self._run: Any = wandb.init(project="agentrl", name=name, dir=str(folder), config=dict(config), resume="allow")

    def record(self, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def close(self) -> None:
        self._run.finish()


def open_trackers(
    names: Sequence[str], run: RunDir, *, run_name: str, config: Mapping[str, Any], resumed_at: int
) -> list[Tracker]:
    """The trackers a run asks for; ``metrics.jsonl`` is written whether it is named or not."""
    trackers: list[Tracker] = [FileTracker(run, resumed_at=resumed_at)]
    if "console" in names:
        trackers.append(ConsoleTracker())
    if "tensorboard" in names:
        trackers.append(TensorBoardTracker(run.root / "tensorboard"))
    if "wandb" in names:
        trackers.append(WandbTracker(run.root, name=run_name, config=config))
    return trackers


def _set_aside_later_steps(path: Path, resumed_at: int) -> int:
    """Move lines of steps after ``resumed_at`` to ``metrics.abandoned.jsonl``; returns how many."""
    lines = list(read_jsonl(path))
    later = [line for line in lines if line["step"] > resumed_at]
    torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    if not later and not torn:
        return 0
    with path.with_name("metrics.abandoned.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in later)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= resumed_at))
    temporary.replace(path)
    return len(later)
