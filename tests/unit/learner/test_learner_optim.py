"""The learning-rate schedule, by its values."""

import pytest

from agentrl.errors import ConfigError
from agentrl.learner.optim import OptimizerSettings


def rates(**options: object) -> list[float]:
    settings = OptimizerSettings(lr=1.0, **options)  # pyright: ignore[reportArgumentType]
    return [round(settings.lr_at(step), 6) for step in range(11)]


def test_constant_with_warmup_rises_from_its_first_fraction() -> None:
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, *[1.0] * 8]


def test_linear_reaches_its_floor_at_num_steps() -> None:
    assert rates(schedule="linear", num_steps=10, min_lr_ratio=0.1) == pytest.approx([1 - 0.09 * s for s in range(11)])


def test_decay_fraction_keeps_the_rate_flat_before() -> None:
    assert rates(schedule="linear", num_steps=10, decay_fraction=0.5) == [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.0]


def test_cosine_is_halfway_down_in_the_middle_and_stays_down() -> None:
    values = rates(schedule="cosine", num_steps=8)
    assert (values[0], values[4], values[8], values[10]) == (1.0, 0.5, 0.0, 0.0)


def test_a_schedule_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr_schedule=cosine needs num_steps"):
        OptimizerSettings(lr=1.0, schedule="cosine")
