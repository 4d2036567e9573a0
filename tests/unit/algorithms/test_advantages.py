"""Advantage estimators by hand, where they differ from the reference, and what they refuse."""

import math

import pytest
import torch
from torch import Tensor

from agentrl.algorithms.advantages import ADVANTAGES, advantage_parameters, compute_advantages
from agentrl.algorithms.shaping import place_outcome

MASK = torch.tensor([[True, True, False, True], [True, False, False, False], [True, True, False, False]])


def of_scores(name: str, scores: list[float], groups: list[str], **params: object) -> list[float]:
    """One sampled token per row, so that a row's advantage is that of its token."""
    rewards = torch.tensor(scores, dtype=torch.float64).unsqueeze(1)
    advantages, _ = compute_advantages(
        name, rewards=rewards, mask=torch.ones_like(rewards, dtype=torch.bool), groups=groups, **params
    )
    return advantages[:, 0].tolist()


def test_grpo_standardises_within_each_group() -> None:
    assert of_scores("grpo", [1, 2, 3, 5, 5], [*"aaabb"]) == pytest.approx([-1, 0, 1, 0, 0], abs=2e-6)
    assert of_scores("grpo", [1, 2, 3, 5, 9], [*"aaabb"], normalize_by_std=False) == pytest.approx([-1, 0, 1, -2, 2])


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "gpg"])
def test_a_lone_trajectory_keeps_its_reward_as_in_the_reference_or_gives_no_signal(name: str) -> None:
    assert of_scores(name, [1, 3, 7], [*"aab"])[2] == pytest.approx(7, rel=1e-5)
    assert of_scores(name, [1, 3, 7], [*"aab"], group_of_one="zero")[2] == 0
    with pytest.raises(ValueError, match="'raw' or 'zero'"):
        of_scores(name, [1, 3, 7], [*"aab"], group_of_one="mean")


@pytest.mark.parametrize("name", ["grpo", "gdpo", "rloo", "turn_return"])
def test_equal_rewards_that_fp32_cannot_average_exactly_still_give_no_signal(name: str) -> None:
    rewards = torch.full((3, 1), 0.1)
    params = {"turn_ids": torch.zeros(3, 1, dtype=torch.long)} if name == "turn_return" else {}
    if name == "gdpo":
        params["whiten_batch"] = False
    advantages, _ = compute_advantages(name, rewards=rewards, mask=rewards > 0, groups=[0, 0, 0], **params)
    assert advantages.dtype == torch.float32
    assert advantages.abs().max() < 1e-9


def test_only_the_leader_learns_in_passk() -> None:
    assert of_scores("grpo_passk", [1, 4, 2, 3, 3], [*"aaabb"], normalize_by_std=False) == pytest.approx([0, 2, 0, 0, 0])
    assert of_scores("grpo_passk", [5], ["a"]) == [0]


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    assert of_scores("rloo", [1, 2, 6], [*"aaa"]) == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])


def test_opo_weighs_the_baseline_by_sampled_length() -> None:
    rewards = place_outcome(torch.tensor([3.0, 0.0, 1.0]), MASK)
    advantages, _ = compute_advantages("opo", rewards=rewards, mask=MASK, groups=[0, 0, 0])
    baseline = (3 * 3 + 1 * 0 + 2 * 1) / 6
    assert advantages[:, 0].tolist() == pytest.approx([3 - baseline, -baseline, 1 - baseline])


def test_gpg_scales_by_rows_with_a_reward() -> None:
    assert of_scores("gpg", [1, 0, 0, 0], [*"aabb"]) == pytest.approx([4 * 0.5, 4 * -0.5, 0, 0])


def test_reinforce_plus_plus_discounts_per_sampled_token_and_whitens() -> None:
    rewards = torch.tensor([[0.0, 0.0, 9.0, 1.0]], dtype=torch.float64)
    advantages, returns = compute_advantages("reinforce_plus_plus", rewards=rewards, mask=MASK[:1], groups=[0], gamma=0.5)
    assert returns.tolist() == [[0.25, 0.5, 0.0, 1.0]]
    kept = advantages[MASK[:1]]
    assert kept.mean().item() == pytest.approx(0, abs=1e-12)
    assert kept.var().item() == pytest.approx(1, abs=1e-6)


def test_baseline_variant_of_reinforce_plus_plus_whitens_centred_scores_over_tokens() -> None:
    advantages = of_scores("reinforce_plus_plus_baseline", [0, 2, 0, 4], [*"aabb"])
    std = math.sqrt((1 + 1 + 4 + 4) / 3)
    assert advantages == pytest.approx([-1 / std, 1 / std, -2 / std, 2 / std], rel=1e-6)


def test_remax_subtracts_the_greedy_rollout_and_crosses_holes() -> None:
    rewards = place_outcome(torch.tensor([1.0, 1.0, 0.0]), MASK)
    advantages, returns = compute_advantages(
        "remax", rewards=rewards, mask=MASK, groups=[0, 1, 2], reward_baselines=torch.tensor([0.5, 1.0, 0.25])
    )
    assert advantages.tolist() == [[0.5, 0.5, 0.0, 0.5], [0.0] * 4, [-0.25, -0.25, 0.0, 0.0]]
    assert returns[0].tolist() == [1.0, 1.0, 0.0, 1.0]


def test_gae_bootstraps_from_the_next_sampled_token() -> None:
    gamma, lam = 0.9, 0.8
    rewards = torch.tensor([[0.0, 0.5, 77.0, 1.0]], dtype=torch.float64)
    values = torch.tensor([[0.1, 0.2, math.nan, 0.4]], dtype=torch.float64)
    advantages, returns = compute_advantages(
        "gae", rewards=rewards, mask=MASK[:1], groups=[0], values=values, gamma=gamma, lam=lam, whiten_batch=False
    )
    last = 1.0 - 0.4
    middle = 0.5 + gamma * 0.4 - 0.2 + gamma * lam * last
    first = gamma * 0.2 - 0.1 + gamma * lam * middle
    assert advantages[0].tolist() == pytest.approx([first, middle, 0, last])
    assert returns[0].tolist() == pytest.approx([first + 0.1, middle + 0.2, 0, last + 0.4])


def test_gdpo_lets_no_term_drown_another() -> None:
    terms = {"correct": torch.tensor([0.0, 1.0]), "length": torch.tensor([1000.0, 0.0])}
    rewards = torch.zeros(2, 1)
    mask = torch.ones(2, 1, dtype=torch.bool)

    def run(**params: object) -> list[float]:
        out, _ = compute_advantages("gdpo", rewards=rewards, mask=mask, groups=[0, 0], reward_terms=terms, **params)
        return out[:, 0].tolist()

    assert run(whiten_batch=False) == pytest.approx([0, 0], abs=1e-5)
    half = math.sqrt(0.5)
    assert run(whiten_batch=False, reward_weights={"length": 0.5}) == pytest.approx([-half / 2, half / 2], rel=1e-4)
    assert run(reward_weights={"length": 0.5}) == pytest.approx([-half, half], rel=1e-4)
    with pytest.raises(ValueError, match="reward_weights name typo"):
        run(reward_weights={"typo": 1.0})


def otb(name: str, rewards: Tensor, mask: Tensor, energy: Tensor, **params: object) -> Tensor:
    """``energy`` per token: with probability 1/2 it equals sum(pi²)."""
    old = torch.full_like(rewards, math.log(0.5))
    return compute_advantages(
        name, rewards=rewards, mask=mask, groups=[0] * len(rewards), old_log_probs=old, sum_pi_squared=energy, **params
    )[0]


@pytest.mark.parametrize("name", ["optimal_token_baseline", "tir_optimal_token_baseline"])
def test_the_token_baseline_weighs_siblings_by_accumulated_variance(name: str) -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    energy = torch.tensor([[1.0, 2.0], [3.0, 3.0]], dtype=torch.float64)
    advantages = otb(name, rewards, mask, energy)
    first, second = 1 / (1 + 3), 3 / (3 + 6)
    torch.testing.assert_close(
        advantages, torch.tensor([[1 - first, 1 - second], [-first, -second]], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", ["optimal_token_baseline", "tir_optimal_token_baseline"])
def test_the_longest_row_has_no_baseline_past_all_others(name: str) -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    energy = torch.ones(2, 3, dtype=torch.float64)
    assert otb(name, rewards, mask, energy)[0].tolist() == pytest.approx([0.5, 1, 1], rel=1e-6)
    assert otb(name, rewards, mask, energy, handle_zero_tail=False)[0].tolist() == pytest.approx([0.5, 0, 0], abs=1e-6)


def test_the_tool_variant_compares_equal_numbers_of_sampled_tokens() -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    advantages = otb("tir_optimal_token_baseline", rewards, mask, torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(
        advantages, torch.tensor([[0.5, 0.0, 0.5], [-0.5, -0.5, 0.0]], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_every_estimator_returns_detached_zeros_under_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(3, 4, generator=generator).requires_grad_()
    inputs: dict[str, object] = {
        "values": torch.rand(3, 4, generator=generator),
        "old_log_probs": -torch.rand(3, 4, generator=generator),
        "sum_pi_squared": torch.rand(3, 4, generator=generator),
        "reward_baselines": torch.rand(3, generator=generator),
        "turn_ids": torch.tensor([[0, 0, 0, 1]] * 3),
        "anchor_ids": torch.tensor([[7, 7, 0, 8]] * 3),
    }
    for name in ADVANTAGES:
        needed = {key: value for key, value in inputs.items() if key in advantage_parameters(name) or key == "values"}
        for out in compute_advantages(name, rewards=rewards, mask=MASK, groups=torch.tensor([5, 5, 2]), **needed):  # pyright: ignore[reportArgumentType]
            assert not out.requires_grad, name
            assert out[~MASK].abs().max() == 0, name
            assert out.isfinite().all(), name


def test_wrong_names_and_shapes_say_what_to_change() -> None:
    rewards, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="use one of gae, grpo"):
        compute_advantages("gpro", rewards=rewards, mask=mask, groups=[0, 0])
    with pytest.raises(ValueError, match=r"rewards \[2, 3\], mask \[2, 2\]"):
        compute_advantages("grpo", rewards=rewards, mask=mask[:, :2], groups=[0, 0])
    with pytest.raises(ValueError, match="1 group labels for 2 rows"):
        compute_advantages("grpo", rewards=rewards, mask=mask, groups=[0])
    with pytest.raises(ValueError, match="gae needs values"):
        compute_advantages("gae", rewards=rewards, mask=mask, groups=[0, 0])
    with pytest.raises(TypeError, match="gama"):
        compute_advantages("gae", rewards=rewards, mask=mask, groups=[0, 0], values=rewards, gama=1.0)
    assert advantage_parameters("grpo") == {"normalize_by_std": True, "epsilon": 1e-6, "group_of_one": "raw"}
