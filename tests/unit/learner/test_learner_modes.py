"""Off-policy modes, rejection, KL places and controllers, covariance losses: what each does to a step, cut as you like."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_rig import assert_same_weights, batch_of, make_learner, random_group, weights_of

from agentrl.learner.batching import StepBatch
from agentrl.learner.checkpoint import Checkpoints
from agentrl.learner.distributed import Team
from agentrl.learner.settings import KLSettings, LossSettings, Overlong

PPO = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}


@pytest.fixture
def batch() -> StepBatch:
    return batch_of([random_group(g, size=4) for g in range(3)])


def step(
    model_dir: Path, team: Team, batch: StepBatch, loss: LossSettings, **options: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    learner = make_learner(model_dir, team, loss=loss, lr=1e-3, **options)
    return learner.step(batch), weights_of(learner)


@pytest.mark.parametrize(
    "loss",
    [
        LossSettings(old_logprobs="recompute", is_level="sequence", is_threshold="0.5_5.0", is_batch_normalize=True),
        LossSettings(old_logprobs="recompute", is_level="token", rejection_rules="token_k3,seq_mean_k1", rejection_thresholds="9,0.01_99"),
        LossSettings(policy_loss="reinforce", is_level="token", is_threshold=3.0),
        LossSettings(policy_loss="reinforce", is_level="sequence", is_batch_normalize=True, loss_agg_mode="seq-mean-token-sum"),
        LossSettings(policy_loss="decoupled_ppo", policy_params=PPO | {"behav_weight_cap": 5.0}, old_logprobs="recompute"),
        LossSettings(policy_loss="decoupled_ppo", policy_params=PPO, old_logprobs="loglinear"),
        LossSettings(policy_loss="clip_cov", policy_params={"clip_cov_ratio": 0.1, "clip_cov_lb": 0.0, "clip_cov_ub": 99.0}),
        LossSettings(policy_loss="kl_cov", policy_params={"kl_cov_ratio": 0.2}),
        LossSettings(advantage="gigpo"),
        LossSettings(advantage="tir_optimal_token_baseline"),
        LossSettings(advantage="reinforce_plus_plus", kl=KLSettings(coef=0.1, place="reward")),
        LossSettings(overlong=Overlong(max_length=8, buffer=4), loss_agg_mode="seq-mean-token-mean"),
    ],
    ids=lambda loss: f"{loss.policy_loss}-{loss.advantage}-{loss.old_logprobs}-{loss.is_level}",
)  # fmt: skip
def test_how_the_batch_is_cut_changes_nothing_in_any_mode(
    model_dir: Path, team: Team, batch: StepBatch, loss: LossSettings
) -> None:
    whole, whole_weights = step(model_dir, team, batch, loss)
    cut, cut_weights = step(model_dir, team, batch, loss, micro_batch_tokens=33)
    assert math.isfinite(whole["actor/pg_loss"])
    assert whole["update/skipped"] == 0
    for name, value in whole.items():
        if not name.startswith(("timing_s", "perf/")):
            assert cut[name] == pytest.approx(value, abs=2e-5, rel=1e-4), name
    assert_same_weights(cut_weights, whole_weights, atol=5e-5)


def test_pure_mode_weighs_by_current_over_rollout_and_normalises_by_the_steps_mean(
    model_dir: Path, team: Team, batch: StepBatch
) -> None:
    options: dict[str, Any] = {"policy_loss": "reinforce", "is_level": "token", "is_threshold": 2.0}
    plain, _ = step(model_dir, team, batch, LossSettings(**options))
    assert plain["actor/is_weight_mean"] < 2.0
    scaled, _ = step(model_dir, team, batch, LossSettings(**options, is_batch_normalize=True))
    assert scaled["actor/is_weight_mean"] == pytest.approx(1.0, abs=1e-5)
    factor = scaled["rollout_corr/rollout_is_batch_norm_factor"]
    assert factor == pytest.approx(plain["actor/is_weight_mean"], abs=1e-5)
    assert scaled["actor/pg_loss"] * factor == pytest.approx(plain["actor/pg_loss"], abs=1e-5)


def test_what_is_rejected_is_not_trained_and_is_counted(model_dir: Path, team: Team, batch: StepBatch) -> None:
    # The rig's logprobs are noise, so a tight bound on the geometric mean of the ratio rejects almost every trajectory.
    loss = LossSettings(rejection_rules="seq_mean_k1", rejection_thresholds="0.9_1.1")
    metrics, _ = step(model_dir, team, batch, loss)
    assert 0 < metrics["rollout_corr/rollout_rs_seq_masked_fraction"] <= 1
    everything = LossSettings(rejection_rules="token_k2", rejection_thresholds=1e-9)
    metrics, _ = step(model_dir, team, batch, everything)
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == 1
    assert metrics["update/skipped"] == 1


def test_kl_in_the_reward_is_zero_at_the_reference_under_recomputed_logprobs(
    model_dir: Path, team: Team, batch: StepBatch
) -> None:
    loss = LossSettings(old_logprobs="recompute", kl=KLSettings(coef=0.1, place="reward"), advantage="rloo")
    learner = make_learner(model_dir, team, loss=loss, lr=1e-2)
    first = learner.step(batch)
    assert first["actor/reward_kl_penalty"] == pytest.approx(0.0, abs=1e-6)
    assert first["actor/kl_coef"] == 0.1
    assert "actor/kl_loss" not in first
    assert learner.step(batch)["actor/reward_kl_penalty"] > 1e-4


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_the_adaptive_coefficient_moves_and_survives_a_checkpoint(
    model_dir: Path, team: Team, batch: StepBatch, tmp_path: Path, place: Any
) -> None:
    loss = LossSettings(
        old_logprobs="recompute", kl=KLSettings(coef=0.1, place=place, controller="adaptive", target=1e3, horizon=120)
    )
    learner = make_learner(model_dir, team, loss=loss)
    learner.step(batch)
    assert learner.kl_controller.value == pytest.approx(0.1 * (1 - 0.2 * 12 / 120))  # far below the target: the bound acts
    Checkpoints(tmp_path).save(learner, step=1, state={})
    fresh = make_learner(model_dir, team, loss=loss)
    Checkpoints(tmp_path).load(fresh)
    assert fresh.kl_controller.value == learner.kl_controller.value
    assert fresh.step(batch)["actor/kl_coef"] == learner.step(batch)["actor/kl_coef"]
    fixed = make_learner(model_dir, team, loss=LossSettings(kl=KLSettings(coef=0.7)))
    Checkpoints(tmp_path).load(fixed)
    assert fixed.kl_controller.value == 0.7  # a fixed coefficient is this run's setting


@pytest.mark.parametrize("sync", ["last", "each"])
def test_when_gradients_are_added_up_changes_nothing(model_dir: Path, team: Team, batch: StepBatch, sync: Any) -> None:
    _, weights = step(model_dir, team, batch, LossSettings(), micro_batch_tokens=40, grad_sync=sync)
    _, whole = step(model_dir, team, batch, LossSettings())
    assert_same_weights(weights, whole, atol=5e-5)


def test_offloaded_shards_learn_the_same(model_dir: Path, team: Team, batch: StepBatch) -> None:
    _, plain = step(model_dir, team, batch, LossSettings(), micro_batch_tokens=40)
    _, offloaded = step(model_dir, team, batch, LossSettings(), micro_batch_tokens=40, offload=True)
    assert_same_weights(offloaded, plain, atol=0)
