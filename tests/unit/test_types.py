"""The nouns' own promises."""

import dataclasses

import numpy as np
import pytest

from agentrl.types import PolicyRecord, Segment, Trajectory, content_digest, version_of_label


def segment(**changes: object) -> Segment:
    values = {
        "ids": np.array([5, 6, 7], np.int32),
        "mask": np.array([False, True, True]),
        "logprobs": np.array([0, -0.1, -1.7], np.float32),
        "versions": np.array([-1, 3, 4], np.int32),
        "prompt_length": 1,
    }
    return Segment(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def trajectory(*segments: Segment) -> Trajectory:
    return Trajectory(
        id="a/0/0/0", task_id="a", group_id="a/0", ordinal=0, sample_index=0, attempt=0, env="", agent="tool_agent",
        data_source="d", split="train", segments=segments, reward=1.0, reward_terms={},
    )  # fmt: skip


def test_a_segment_refuses_arrays_of_other_lengths() -> None:
    with pytest.raises(ValueError, match="3 ids but 2 mask"):
        segment(mask=np.array([False, True]))
    with pytest.raises(ValueError, match="prompt_length=4"):
        segment(prompt_length=4)


@pytest.mark.parametrize(
    ("name", "index", "value"), [("ids", 0, 9), ("mask", 0, True), ("logprobs", 1, -0.2), ("versions", 2, 5)]
)
def test_the_digest_depends_on_everything_that_is_trained_on(name: str, index: int, value: object) -> None:
    changed = getattr(segment(), name).copy()
    changed[index] = value
    assert content_digest(trajectory(segment(**{name: changed}))) != content_digest(trajectory(segment()))


def test_the_digest_ignores_what_is_not_trained_on() -> None:
    t = trajectory(segment())
    assert content_digest(t) == content_digest(dataclasses.replace(t, finished=9.0, turns=(), id="b/0/0/0"))
    assert content_digest(t) != content_digest(trajectory(segment(), segment()))


def test_versions_of_a_trajectory_come_from_sampled_tokens_only() -> None:
    t = trajectory(segment())
    assert (t.min_version, t.max_version, t.num_sampled, t.num_tokens) == (3, 4, 2, 3)
    assert trajectory(segment(mask=np.zeros(3, np.bool_))).min_version == -1


def test_a_label_names_one_version() -> None:
    record = PolicyRecord(run_epoch=2, version=17, path="/w", digest="sha256:0")
    assert record.label == "e2-v17"
    assert version_of_label(record.label) == 17
    assert [version_of_label(x) for x in ("base", "default", "e1-vx", "v3", "")] == [-1] * 5
