"""The retry budget: never more than the bucket gives, and never for ever nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.serving.retry_budget import RetryBudget


@given(steps=st.lists(st.tuples(st.floats(0, 5), st.booleans()), min_size=1, max_size=200))
def test_retries_never_exceed_burst_plus_time_plus_successes(steps: list[tuple[float, bool]]) -> None:
    budget = RetryBudget(burst=5, per_s=2.0, per_success=0.5)
    now = 0.0
    taken = successes = 0
    for seconds, is_success in steps:
        now += seconds
        if is_success:
            budget.succeeded()
            successes += 1
        elif budget.try_take(now) == 0.0:
            taken += 1
    assert taken <= 5 + 2.0 * now + 0.5 * successes + 1e-6


@given(spent=st.integers(1, 50))
def test_waiting_as_long_as_told_gives_a_retry(spent: int) -> None:
    budget = RetryBudget(burst=3, per_s=0.5)
    now = 100.0
    for _ in range(spent):
        wait_s = budget.try_take(now)
        if wait_s:
            now += wait_s + 1e-9
            assert budget.try_take(now) == 0.0


def test_a_budget_that_never_refills_is_refused() -> None:
    with pytest.raises(ValueError, match="wait for ever"):
        RetryBudget(per_s=0.0)
