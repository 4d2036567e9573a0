"""What is written to trajectories/ reads back bit for bit."""

from pathlib import Path

import numpy as np
import pytest

from agentrl.errors import DataError
from agentrl.telemetry.trajectory_log import TrajectoryLog, from_record, read_records
from agentrl.types import Segment, Trajectory, Turn


def trajectory() -> Trajectory:
    return Trajectory(
        id="a/0/0/0", task_id="a", group_id="a/0", ordinal=0, sample_index=0, attempt=0, env="e", agent="tool_agent",
        data_source="d", split="train", reward=1.0, reward_terms={"correct": 1.0}, stop="answered",
        segments=(
            Segment(
                ids=np.array([5, 6, 7], np.int32),
                mask=np.array([False, True, True]),
                logprobs=np.array([0, -0.1, -1.7], np.float32),
                versions=np.array([-1, 3, 4], np.int32),
                prompt_length=1,
            ),
        ),
        turns=(Turn(kind="model", segment=0, start=1, end=3, ms=2.5, server="http://127.0.0.1:1", finish="stop", text="hi"),),
        created=1.0, finished=2.0,
    )  # fmt: skip


def test_a_record_reads_back_bit_for_bit(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path)
    original = trajectory()
    log.write(original, None)
    log.close()
    (record,) = read_records(tmp_path)
    copy = from_record(record)
    for name in ("ids", "mask", "logprobs", "versions"):
        np.testing.assert_array_equal(getattr(copy.segments[0], name), getattr(original.segments[0], name))
        assert getattr(copy.segments[0], name).dtype == getattr(original.segments[0], name).dtype
    assert copy.turns == original.turns
    assert (copy.min_version, copy.max_version, copy.num_sampled) == (3, 4, 2)


def test_a_torn_last_line_is_skipped_and_a_foreign_line_named(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path)
    log.write(trajectory(), None)
    log.close()
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(path.read_bytes() + b'{"v": 1, "id": "x')
    assert len(list(read_records(tmp_path))) == 1
    log = TrajectoryLog(tmp_path)  # the restarted writer's first line is whole
    log.write(trajectory(), None)
    log.close()
    assert len(list(read_records(tmp_path))) == 2
    path.write_bytes(b'{"something": "else"}\n')
    with pytest.raises(DataError, match=r"rollouts\.jsonl:1"):
        list(read_records(tmp_path))
