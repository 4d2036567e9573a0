"""Rewards to advantages by hand: overlong penalties, named terms, turns and states, KL in the reward, and what is refused."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from learner_rig import batch_of, random_group, segment, trajectory

from agentrl.errors import ConfigError
from agentrl.learner.batching import BatchRow
from agentrl.learner.credit import TokenStatistics, assign_credit, compact_rewards, turns_of
from agentrl.learner.settings import KLSettings, LossSettings, Overlong, check_settings
from agentrl.types import Trajectory

RAW: dict[str, Any] = {"advantage": "reinforce_plus_plus", "advantage_params": {"whiten_batch": False}}
"""Advantages that are the plain reward-to-go."""


def rows_of(*members: Trajectory) -> list[BatchRow]:
    return [BatchRow(trajectory=t, group=0, staleness=0, is_trained=True) for t in members]


def with_turns(index: int, turns: list[tuple[int, int]], *, reward: float = 1.0, **changes: Any) -> Trajectory:
    made = trajectory(0, index, reward=reward, segments=[segment(np.random.default_rng(index), prompt=3, turns=turns)])
    return dataclasses.replace(made, **changes)


def per_row(flat: torch.Tensor, rows: list[BatchRow]) -> list[list[float]]:
    counts = [row.trajectory.num_sampled for row in rows]
    return [part.tolist() for part in flat.split(counts)]


def test_long_answers_lose_reward_linearly_over_the_buffer() -> None:
    rows = rows_of(*(with_turns(i, [(n, 0)]) for i, n in enumerate((2, 5, 8, 11))))
    loss = LossSettings(**RAW, overlong=Overlong(max_length=8, buffer=4, penalty=2.0))
    credit = assign_credit(rows, loss, kl_coef=0.0, found=TokenStatistics())
    assert [round(r[0], 6) for r in per_row(credit.returns, rows)] == [1.0, 0.5, -1.0, -1.0]
    assert credit.metrics["agentrl/overlong/penalty_mean"] == pytest.approx((0 + 0.5 + 2 + 2) / 4 * -1)
    assert credit.metrics["agentrl/overlong/fraction"] == 0.75


def test_kl_is_taken_off_each_tokens_reward() -> None:
    rows = rows_of(with_turns(0, [(2, 4), (1, 0)]))
    found = TokenStatistics(logprobs=torch.tensor([-1.0, -2.0, -3.0]), reference=torch.tensor([-1.5, -2.0, -1.0]))
    loss = LossSettings(**RAW, kl=KLSettings(coef=0.1, place="reward"))
    credit = assign_credit(rows, loss, kl_coef=0.1, found=found)
    # k1 = 0.5, 0, -2; rewards -0.05, 0, 1.2; to go: 1.15, 1.2, 1.2
    assert credit.returns.tolist() == pytest.approx([1.15, 1.2, 1.2])
    assert credit.kl == pytest.approx(-0.5)
    assert credit.metrics["actor/reward_kl_penalty_coeff"] == 0.1


def test_gdpo_standardises_each_named_term_and_the_length_penalty_by_itself() -> None:
    terms = [{"correct": 1.0, "format": 100.0}, {"correct": 0.0, "format": 100.0}, {"correct": 0.0}]
    rows = rows_of(*(with_turns(i, [(2 + i, 0)], reward_terms=t) for i, t in enumerate(terms)))
    options = {"whiten_batch": False, "epsilon": 1e-9, "reward_weights": {"format": 0.5, "unseen": 3.0}}
    loss = LossSettings(advantage="gdpo", advantage_params=options, overlong=Overlong(max_length=4, buffer=1))
    credit = assign_credit(rows, loss, kl_coef=0.0, found=TokenStatistics())
    high, low = 2 / math.sqrt(3), -1 / math.sqrt(3)  # (1, 0, 0) standardised; its negative image for the other two terms
    got = [r[0] for r in per_row(credit.advantages, rows)]
    form, overlong = (-low, -low, -high), (-low, -low, -high)
    correct = (high, low, low)
    # "unseen" is 0 everywhere and says nothing.
    assert got == pytest.approx([c + 0.5 * f + o for c, f, o in zip(correct, form, overlong, strict=True)], abs=1e-5)


def test_turns_are_runs_of_sampled_tokens_and_states_are_what_was_observed_before() -> None:
    shared = np.random.default_rng(0)
    base = segment(shared, prompt=3, turns=[(2, 2), (3, 0)])
    other = dataclasses.replace(base, ids=np.concatenate([base.ids[:3], base.ids[3:5] + 1, base.ids[5:]]))
    changed = dataclasses.replace(base, ids=np.concatenate([base.ids[:5], base.ids[5:7] + 1, base.ids[7:]]))
    numbers, states = turns_of(trajectory(0, 0, reward=1, segments=[base]))
    assert numbers.tolist() == [0, 0, 1, 1, 1]
    assert len(set(states.tolist())) == 2
    assert turns_of(trajectory(0, 1, reward=1, segments=[other]))[1].tolist() == states.tolist()  # other sampled tokens
    assert turns_of(trajectory(0, 2, reward=1, segments=[changed]))[1].tolist()[2:] != states.tolist()[2:]
    two = turns_of(trajectory(0, 3, reward=1, segments=[base, base]))[0]
    assert two.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_a_turn_answers_for_its_own_reward_and_later_ones() -> None:
    # Two turns of two tokens; the first turn earned 1 in one sibling and 0 in the other; both end with outcome 1.
    turn = ((0, 4, 1.0),)
    rows = rows_of(with_turns(0, [(2, 1), (2, 0)], reward=2.0, turn_rewards=turn), with_turns(1, [(2, 1), (2, 0)], reward=1.0))
    loss = LossSettings(advantage="turn_grpo", advantage_params={"epsilon": 0.0, "normalize_by_std": False})
    got = per_row(assign_credit(rows, loss, kl_coef=0.0, found=TokenStatistics()).advantages, rows)
    assert got == [[0.5, 0.5, 0.0, 0.0], [-0.5, -0.5, 0.0, 0.0]]
    rewards, _ = compact_rewards(rows, use_turn_rewards=True)
    assert rewards.tolist() == [[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("name", ["turn_return", "gigpo", "tir_optimal_token_baseline", "optimal_token_baseline", "opo"])
def test_every_estimator_gets_its_inputs(name: str) -> None:
    rows = list(batch_of([random_group(g, size=3) for g in range(2)]).rows)
    count = sum(row.trajectory.num_sampled for row in rows)
    found = TokenStatistics(logprobs=torch.full((count,), -1.0), sum_pi_squared=torch.full((count,), 0.4))
    credit = assign_credit(rows, LossSettings(advantage=name), kl_coef=0.0, found=found)
    assert credit.advantages.shape == (count,)
    assert torch.isfinite(credit.advantages).all()
    assert credit.advantages.abs().sum() > 0


def test_remax_takes_off_the_greedy_rollouts_reward() -> None:
    rows = rows_of(with_turns(0, [(2, 1), (1, 0)], reward=1.0), with_turns(1, [(1, 0)], reward=0.25))
    rows = [dataclasses.replace(row, baseline=baseline) for row, baseline in zip(rows, (0.25, 1.0), strict=True)]
    credit = assign_credit(rows, LossSettings(advantage="remax"), kl_coef=0.0, found=TokenStatistics())
    assert credit.advantages.tolist() == [0.75, 0.75, 0.75, -0.75]
    assert credit.returns.tolist() == [1.0, 1.0, 1.0, 0.25]
    assert credit.metrics["agentrl/greedy_baseline/mean"] == 0.625
    with pytest.raises(ValueError, match="has no greedy baseline"):
        assign_credit(rows_of(with_turns(0, [(2, 0)])), LossSettings(advantage="remax"), kl_coef=0.0, found=TokenStatistics())


def test_a_rows_weight_scales_its_advantages() -> None:
    rows = rows_of(with_turns(0, [(2, 0)]), with_turns(1, [(1, 0)], reward=3.0))
    rows[1] = dataclasses.replace(rows[1], weight=0.25)
    credit = assign_credit(rows, LossSettings(**RAW), kl_coef=0.0, found=TokenStatistics())
    assert credit.advantages.tolist() == [1.0, 1.0, 0.75]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LossSettings(advantage="gpro"), "Did you mean grpo"),
        (LossSettings(policy_loss="cipso"), "Did you mean cispo"),
        (LossSettings(loss_agg_mode="token_mean"), "Did you mean token-mean"),
        (LossSettings(advantage_params={"epsilom": 1}), "advantage=grpo has no parameter epsilom. Did you mean epsilon"),
        (LossSettings(policy_params={"clip_ratio_hig": 1}), "Did you mean clip_ratio_high"),
        (LossSettings(advantage="gdpo", advantage_params={"reward_terms": {}}), "has no parameter reward_terms"),
        (LossSettings(policy_loss="dro"), "needs the parameter dro_beta"),
        (LossSettings(policy_params={"clip_ratio_c": 0.5}), "clip_ratio_c=0.5 must exceed 1"),
        (LossSettings(old_logprobs="recompute", is_level="token", is_threshold="5_1"), "0 < lower <= upper"),
        (LossSettings(rejection_rules="seq_max_k1", rejection_thresholds=1.0), "rejection rule 'seq_max_k1' is unknown. Did you"),
        (LossSettings(rejection_rules="token_k2"), "go together"),
        (LossSettings(rejection_rules="token_k1,token_k3", rejection_thresholds="0.5_2.0,1.0,3"), "3 thresholds for 2"),
        (LossSettings(kl=KLSettings(coef=0.1, estimator="k4")), "KL estimator 'k4' is unknown"),
        (LossSettings(kl=KLSettings(controller="adaptive")), "cannot start from 0"),
        (LossSettings(advantage="gdpo", kl=KLSettings(coef=0.1, place="reward")), "put it in the loss"),
        (LossSettings(overlong=Overlong(max_length=4, buffer=9)), "buffer=9"),
        (LossSettings(old_logprobs="loglinear"), "decoupled_ppo's approximation"),
        (LossSettings(policy_loss="decoupled_ppo", is_level="token", old_logprobs="recompute"), "behav_weight_cap"),
        (LossSettings(policy_loss="reinforce", policy_params={"is_level": "token"}), "settings of their own"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_nearest_name(loss: LossSettings, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings(loss)
    assert message in str(caught.value)


def test_a_critic_and_gae_need_each_other() -> None:
    with pytest.raises(ConfigError, match="looks at no values"):
        check_settings(LossSettings(), has_critic=True)
    check_settings(LossSettings(advantage="gae", advantage_params={"gamma": 0.99, "lam": 0.95}), has_critic=True)
