"""The order of tasks is a pure function of seed and ordinal."""

import pytest

from agentrl.data.task_source import TaskSource
from agentrl.errors import ConfigError, DataError
from agentrl.types import Task

TASKS = [Task(id=str(i), prompt=[], data_source="s") for i in range(7)]


def ids(source: TaskSource, start: int, stop: int) -> list[str]:
    return [source.task(ordinal).id for ordinal in range(start, stop)]


def test_every_epoch_deals_each_task_once() -> None:
    source = TaskSource(TASKS, seed=3)
    for epoch in range(20):
        assert sorted(ids(source, 7 * epoch, 7 * epoch + 7)) == list("0123456")


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    source = TaskSource(TASKS, seed=3)
    orders = {tuple(ids(source, 7 * epoch, 7 * epoch + 7)) for epoch in range(20)}
    assert len(orders) > 15
    assert ids(TaskSource(TASKS, seed=4), 0, 7) != ids(source, 0, 7)


def test_the_order_never_changes_between_releases() -> None:
    assert ids(TaskSource(TASKS, seed=0), 0, 14) == list("32160454516203")


def test_a_resume_needs_only_the_ordinal() -> None:
    before = ids(TaskSource(TASKS, seed=5), 0, 50)
    resumed = TaskSource(TASKS, seed=5)
    assert ids(resumed, 31, 50) == before[31:]
    assert ids(resumed, 0, 50) == before


def test_without_shuffling_the_file_order_repeats() -> None:
    assert ids(TaskSource(TASKS, seed=0, shuffle=False), 5, 10) == ["5", "6", "0", "1", "2"]


def test_ordinals_are_unbounded_and_epochs_count_them() -> None:
    source = TaskSource(TASKS, seed=0)
    assert [source.epoch(ordinal) for ordinal in (0, 6, 7, 7 * 10**12)] == [0, 0, 1, 10**12]
    assert source.task(7 * 10**12 + 3) in TASKS
    assert len(source) == 7


def test_what_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(DataError, match="at least one task"):
        TaskSource([], seed=0)
    with pytest.raises(ConfigError, match="seed=-1"):
        TaskSource(TASKS, seed=-1)
    with pytest.raises(ValueError, match="ordinal=-1"):
        TaskSource(TASKS, seed=0).task(-1)
