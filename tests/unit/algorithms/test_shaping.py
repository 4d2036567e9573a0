"""Where rewards sit and what is added to them, by hand."""

import pytest
import torch

from agentrl.algorithms.shaping import informative_rows, kl_in_reward, overlong_penalty, place_outcome, row_scores


def test_a_reward_lands_on_the_last_sampled_token_even_when_a_tool_spoke_last() -> None:
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    placed = place_outcome(torch.tensor([1.0, 2.0, 3.0]), mask)
    assert placed.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    assert row_scores(placed, mask).tolist() == [1.0, 2.0, 0.0]


def test_the_overlong_penalty_is_zero_then_linear_then_full() -> None:
    lengths = torch.tensor([10, 80, 90, 100, 150])
    assert overlong_penalty(lengths, max_length=100, buffer=20).tolist() == pytest.approx([0, 0, -0.5, -1, -1])
    assert overlong_penalty(lengths, max_length=100, buffer=20, penalty_factor=2.0)[2].item() == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="buffer=200"):
        overlong_penalty(lengths, max_length=100, buffer=200)


def test_kl_is_charged_to_the_token_that_strays() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    log_probs = torch.tensor([[-1.0, -1.0, 7.0], [-2.0, 7.0, 7.0]])
    reference = torch.tensor([[-1.5, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    rewards = torch.tensor([[0.0, 1.0, 5.0], [1.0, 5.0, 5.0]])
    shaped, kl = kl_in_reward(rewards, log_probs, reference, mask, coefficient=0.1)
    torch.testing.assert_close(shaped, torch.tensor([[-0.05, 1.0, 0.0], [1.1, 0.0, 0.0]]))
    assert kl.item() == pytest.approx((0.25 + -1.0) / 2)


def test_only_groups_with_a_spread_are_informative() -> None:
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5])
    assert informative_rows(scores, ["a", "a", "b", "b", "c"]).tolist() == [False, False, True, True, False]
    assert not informative_rows(scores, ["a", "a", "b", "b", "c"], tolerance=1.0).any()
