"""Credit per turn, by hand: two rollouts of one task, two turns each, a tool's tokens between."""

import math

import pytest
import torch

from agentrl.algorithms.advantages import compute_advantages

MASK = torch.tensor([[True, True, False, True], [True, False, True, True]])
TURNS = torch.tensor([[0, 0, -5, 1], [0, 99, 1, 1]])  # whatever stands under the mask
REWARDS = torch.tensor([[0.0, 1.0, 9.0, 0.0], [0.0, 9.0, 0.0, 1.0]], dtype=torch.float64)  # turns: (1, 0) and (0, 1)
HALF = math.sqrt(0.5)  # (1 - 0.5) / std of {0, 1}


def test_each_turn_answers_for_itself_and_later_turns() -> None:
    advantages, returns = compute_advantages(
        "turn_grpo", rewards=REWARDS, mask=MASK, groups=["g", "g"], turn_ids=TURNS, turn_lambda=0.5, epsilon=0.0
    )
    first, second = HALF - 0.5 * HALF, -HALF
    assert advantages[0].tolist() == pytest.approx([first, first, 0, second])
    assert advantages[1].tolist() == pytest.approx([-first, 0, -second, -second])
    assert returns[0].tolist() == pytest.approx([1, 1, 0, 0])


def test_turn_returns_are_compared_among_siblings_at_the_same_turn() -> None:
    advantages, returns = compute_advantages(
        "turn_return", rewards=REWARDS, mask=MASK, groups=["g", "g"], turn_ids=TURNS, gamma=0.5, normalize_by_std=False
    )
    assert returns[0].tolist() == pytest.approx([1, 1, 0, 0])
    assert returns[1].tolist() == pytest.approx([0.5, 0, 1, 1])
    assert advantages[0].tolist() == pytest.approx([0.25, 0.25, 0, -0.5])


def test_a_turn_only_one_sibling_reached_carries_no_signal_of_its_own() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    turns = torch.tensor([[0, 1], [0, 0]])
    advantages, _ = compute_advantages("turn_grpo", rewards=rewards, mask=mask, groups=[0, 0], turn_ids=turns)
    assert advantages.abs().max() == 0
    advantages, _ = compute_advantages(
        "turn_return", rewards=rewards, mask=mask, groups=[0, 0], turn_ids=turns, normalize_by_std=False
    )
    assert advantages.tolist() == [[0.5, 0.0], [-0.5, 0.0]]


def test_gigpo_compares_turns_that_began_in_the_same_state() -> None:
    def run(anchors: list[list[int]], groups: list[int]) -> list[list[float]]:
        advantages, _ = compute_advantages(
            "gigpo",
            rewards=REWARDS * torch.tensor([[1.0], [2.0]]),
            mask=MASK,
            groups=groups,
            turn_ids=TURNS,
            anchor_ids=torch.tensor(anchors),
            gamma=0.5,
            normalize_by_std=False,
        )
        return advantages.tolist()

    # episode scores 1 and 2; turn returns (1, 0) and (0.5 * 2, 2)
    same_start = run([[7, 7, 0, 8], [7, 0, 9, 9]], [0, 0])
    assert same_start[0] == pytest.approx([-0.5, -0.5, 0, -0.5])  # returns tie at the shared state 7
    crossed = run([[7, 7, 0, 8], [6, 0, 8, 8]], [0, 0])
    assert crossed[0] == pytest.approx([-0.5, -0.5, 0, -0.5 - 1.0])  # state 8: 0 against 2
    assert crossed[1] == pytest.approx([0.5, 0, 1.5, 1.5])
    assert run([[7, 7, 0, 8], [7, 0, 8, 8]], [0, 1]) == [[0.0] * 4] * 2  # another task's state is another state


def test_turn_numbers_must_fit_the_tokens() -> None:
    with pytest.raises(ValueError, match="shaped like the mask"):
        compute_advantages("turn_grpo", rewards=REWARDS, mask=MASK, groups=[0, 0], turn_ids=TURNS[:, :2])
    with pytest.raises(ValueError, match="0 or more"):
        compute_advantages("turn_return", rewards=REWARDS, mask=MASK, groups=[0, 0], turn_ids=-torch.ones_like(TURNS))
