"""Packing loses no token, doubles none, and keeps its budget and its balance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.errors import DataError
from agentrl.learner.packing import pack_row, plan_rows

LENGTHS = st.lists(st.integers(1, 60), min_size=0, max_size=40)


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(60, 200), ranks=st.integers(1, 5))
def test_every_item_is_planned_once_within_the_budget_and_ranks_run_in_step(lengths: list[int], budget: int, ranks: int) -> None:
    plan = plan_rows(lengths, budget_tokens=budget, num_ranks=ranks)
    assert sorted(i for rank in plan for row in rank for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= budget for rank in plan for row in rank)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) >= 1


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), budget=st.integers(60, 200), ranks=st.integers(1, 4))
def test_the_number_of_rows_is_that_of_first_fit_decreasing(lengths: list[int], budget: int, ranks: int) -> None:
    rows = len(plan_rows(lengths, budget_tokens=budget, num_ranks=ranks)[0]) * ranks
    # Two rows that are each at most half full would have been one: FFD fills more than half of all rows but one.
    assert rows <= 2 * sum(lengths) / budget + 1 + ranks


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=40, max_size=80), ranks=st.integers(2, 4))
def test_rows_that_run_together_have_similar_sizes(lengths: list[int], ranks: int) -> None:
    plan = plan_rows(lengths, budget_tokens=200, num_ranks=ranks)
    totals = [sum(lengths[i] for row in rank for i in row) for rank in plan]
    assert max(totals) - min(totals) <= 20 * len(plan[0])


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(60, 200), ranks=st.integers(1, 3))
def test_every_token_lies_in_one_row_with_its_own_position(lengths: list[int], budget: int, ranks: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = [pack_row(offsets, row) for rank in plan_rows(lengths, budget_tokens=budget, num_ranks=ranks) for row in rank]
    tokens = np.concatenate([row.token_index for row in rows])
    assert sorted(tokens.tolist()) == list(range(int(offsets[-1])))
    for row in rows:
        np.testing.assert_array_equal(row.position_ids, row.token_index - offsets[row.sequence_index])
        assert row.cu_seqlens.tolist() == [0, *np.cumsum([lengths[s] for s in row.sequences]).tolist()]
        assert row.max_length == max((lengths[s] for s in row.sequences), default=0)


def test_an_item_longer_than_the_budget_is_named() -> None:
    with pytest.raises(DataError, match="gsm8k/7 has 101 tokens but a micro-batch holds micro_batch_tokens=100"):
        plan_rows([5, 101], budget_tokens=100, names=["a", "gsm8k/7"])


def test_equal_items_are_spread_evenly() -> None:
    plan = plan_rows([10] * 8, budget_tokens=50, num_ranks=2)
    assert [[len(row) for row in rank] for rank in plan] == [[4], [4]]


def test_a_rank_without_work_gets_an_empty_row() -> None:
    assert plan_rows([7], budget_tokens=10, num_ranks=3) == [[[0]], [[]], [[]]]
