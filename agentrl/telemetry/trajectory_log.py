"""``trajectories/``: every trajectory as it was sampled, one JSON line each, for people and for ``agentrl audit``.

A line is written before the trajectory goes onto the stream, so whatever was trained is here. After a crash of serve the same
trajectory may be rolled out again: then two lines share an id, and the audit asks that one of them is what was trained.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from agentrl.errors import DataError
from agentrl.telemetry.run_dir import LineFile
from agentrl.types import Episode, Segment, Trajectory, Turn

RECORD_SCHEMA = 1


class TrajectoryLog:
    """Appends trajectories to one file of the run, ``<name>.jsonl``; each process has its own."""

    def __init__(self, folder: Path, *, name: str = "rollouts") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = LineFile(folder / f"{name}.jsonl")

    def write(self, trajectory: Trajectory, episode: Episode | None) -> None:
        """One whole line, or an OSError and none: what is not written here must not go onto the stream."""
        self._file.write(orjson.dumps(to_record(trajectory, episode)))

    def close(self) -> None:
        self._file.close()


def to_record(trajectory: Trajectory, episode: Episode | None) -> dict[str, Any]:
    """Plain JSON of a trajectory; floats keep their float32 value exactly."""
    t = trajectory
    return {
        "v": RECORD_SCHEMA,
        "id": t.id,
        "task_id": t.task_id,
        "group_id": t.group_id,
        "ordinal": t.ordinal,
        "sample_index": t.sample_index,
        "attempt": t.attempt,
        "env": t.env,
        "agent": t.agent,
        "data_source": t.data_source,
        "split": t.split,
        "reward": t.reward,
        "reward_terms": dict(t.reward_terms),
        "stop": t.stop,
        "created": t.created,
        "finished": t.finished,
        "segments": [
            {
                "ids": s.ids.tolist(),
                "mask": s.mask.astype(np.int8).tolist(),
                "logprobs": [float(x) for x in s.logprobs],
                "versions": s.versions.tolist(),
                "prompt_length": s.prompt_length,
            }
            for s in t.segments
        ],
        "turn_rewards": [list(r) for r in t.turn_rewards],
        "turns": [{name: getattr(turn, name) for name in Turn.__slots__} for turn in t.turns],
        "prompt": list(episode.task.prompt) if episode else None,
        "ground_truth": episode.task.ground_truth if episode else None,
    }


def from_record(record: dict[str, Any]) -> Trajectory:
    """The trajectory that a line describes."""
    return Trajectory(
        **{
            name: record[name]
            for name in (
                "id",
                "task_id",
                "group_id",
                "ordinal",
                "sample_index",
                "attempt",
                "env",
                "agent",
                "data_source",
                "split",
                "reward",
                "reward_terms",
                "stop",
                "created",
                "finished",
            )
        },
        segments=tuple(
            Segment(
                ids=np.asarray(s["ids"], np.int32),
                mask=np.asarray(s["mask"], np.bool_),
                logprobs=np.asarray(s["logprobs"], np.float32),
                versions=np.asarray(s["versions"], np.int32),
                prompt_length=s["prompt_length"],
            )
            for s in record["segments"]
        ),
        turn_rewards=tuple((int(a), int(b), float(c)) for a, b, c in record["turn_rewards"]),
        turns=tuple(Turn(**turn) for turn in record["turns"]),
    )


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line under ``trajectories/``; a line that a killed process left torn is skipped.

    Raises:
        DataError: a whole line that is no trajectory, with file and line number.
    """
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    continue
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    if line.startswith(b'{"v":') and not line.endswith(b"}\n"):  # ended by the next writer
                        continue
                    raise DataError(f"{path}:{number} is not JSON: {error}") from error
                if not isinstance(record, dict) or record.get("v") != RECORD_SCHEMA:
                    raise DataError(f"{path}:{number} is no trajectory record of schema {RECORD_SCHEMA}")
                yield record
