"""`Learner.step`: invariants I2, I8 and I9, modes, metrics, and what happens to non-finite gradients."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_rig import (
    assert_same_weights,
    batch_of,
    close,
    make_learner,
    plain_logprobs,
    random_group,
    segment,
    trajectory,
    weights_of,
)

from agentrl.errors import ConfigError, DataError, TrainingDiverged
from agentrl.learner.batching import StepBatch
from agentrl.learner.distributed import Team
from agentrl.learner.learner import Learner
from agentrl.learner.settings import KLSettings, LossSettings
from agentrl.types import Trajectory, TrajectoryGroup


def on_policy(group: TrajectoryGroup, model_dir: Path, temperature: float = 1.0) -> TrajectoryGroup:
    """The same group with the logprobs that the model itself gives."""

    def renewed(t: Trajectory) -> Trajectory:
        segments = tuple(
            dataclasses.replace(
                s, logprobs=np.where(s.mask, plain_logprobs(model_dir, s.ids.tolist(), temperature=temperature), 0)
            )
            for s in t.segments
        )
        return dataclasses.replace(t, segments=segments)

    return TrajectoryGroup(group.close, tuple(renewed(t) for t in group))


@pytest.fixture
def groups() -> list[TrajectoryGroup]:
    return [random_group(g, size=4) for g in range(3)]


def run_step(model_dir: Path, team: Team, batch: StepBatch, **options: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    learner = make_learner(model_dir, team, **options)
    metrics = learner.step(batch)
    return metrics, weights_of(learner)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_when_the_sampler_had_the_same_weights(model_dir: Path, team: Team, temperature: float) -> None:
    batch = batch_of([on_policy(random_group(g), model_dir, temperature) for g in range(2)])
    metrics, _ = run_step(model_dir, team, batch, temperature=temperature)
    assert abs(metrics["actor/ppo_kl"]) < 1e-5
    assert metrics["actor/pg_clipfrac"] == 0
    assert metrics["training/rollout_probs_diff_max"] < 1e-5
    assert abs(metrics["rollout_corr/kl"]) < 1e-5
    assert metrics["rollout_corr/ppl_ratio"] == pytest.approx(1.0, abs=1e-5)
    # With ratio 1 the loss is minus the token-mean of the advantages.
    assert metrics["actor/pg_loss"] == pytest.approx(-metrics["critic/advantages/mean"], abs=1e-5)


def test_grpo_advantages_and_loss_match_a_hand_computation(model_dir: Path, team: Team) -> None:
    rng = np.random.default_rng(5)
    members = [
        trajectory(0, i, reward=r, segments=[segment(rng, prompt=3, turns=[(n, 0)])])
        for i, (r, n) in enumerate([(1.0, 2), (0.0, 4), (0.0, 2)])
    ]
    batch = batch_of([on_policy(close(0, members), model_dir)])
    loss = LossSettings(advantage_params={"epsilon": 1e-4, "normalize_by_std": True})
    metrics, _ = run_step(model_dir, team, batch, loss=loss)
    std = math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2)
    up, down = (2 / 3) / (std + 1e-4), (-1 / 3) / (std + 1e-4)
    assert metrics["critic/advantages/max"] == pytest.approx(up, rel=1e-5)
    assert metrics["critic/advantages/min"] == pytest.approx(down, rel=1e-5)
    assert metrics["actor/pg_loss"] == pytest.approx(-(2 * up + 6 * down) / 8, abs=1e-5)


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("policy", ["ppo", "gspo"])
def test_how_the_batch_is_cut_changes_neither_loss_nor_weights(
    model_dir: Path, team: Team, groups: list[TrajectoryGroup], agg: str, policy: str
) -> None:
    params = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    loss = LossSettings(policy_loss=policy, policy_params=params, loss_agg_mode=agg, entropy_coef=0.01)
    groups = [on_policy(g, model_dir) for g in groups]
    whole, whole_weights = run_step(model_dir, team, batch_of(groups), loss=loss, lr=1e-3)
    for budget in (30, 61):
        cut, cut_weights = run_step(model_dir, team, batch_of(groups), loss=loss, lr=1e-3, micro_batch_tokens=budget)
        for name in ("actor/pg_loss", "actor/loss", "actor/grad_norm", "actor/entropy", "actor/ppo_kl", "rollout_corr/k3_kl"):
            assert cut[name] == pytest.approx(whole[name], abs=1e-6), name
        assert_same_weights(cut_weights, whole_weights, atol=2e-5)


def test_the_gradient_does_not_depend_on_the_cut(model_dir: Path, team: Team, groups: list[TrajectoryGroup]) -> None:
    # Plain SGD on the raw gradient: Adam's first step would hide its size.
    def gradient(budget: int) -> dict[str, torch.Tensor]:
        learner = make_learner(model_dir, team, micro_batch_tokens=budget, optimizer={"max_grad_norm": None})
        learner.optimizer = torch.optim.SGD(learner.policy.parameters(), lr=1.0)
        learner.optimizer_settings = dataclasses.replace(learner.optimizer_settings, lr=1.0)
        before = weights_of(learner)
        learner.step(batch_of(groups))
        return {name: value - before[name] for name, value in weights_of(learner).items()}

    assert_same_weights(gradient(4096), gradient(31), atol=1e-6)


def test_the_order_of_groups_changes_nothing(model_dir: Path, team: Team, groups: list[TrajectoryGroup]) -> None:
    forward, forward_weights = run_step(model_dir, team, batch_of(groups), lr=1e-3)
    backward, backward_weights = run_step(model_dir, team, batch_of(groups[::-1]), lr=1e-3)
    assert forward["actor/pg_loss"] == pytest.approx(backward["actor/pg_loss"], abs=1e-6)
    assert_same_weights(forward_weights, backward_weights, atol=2e-5)


@pytest.mark.parametrize("junk", [1e30, math.inf, -math.inf, math.nan])
def test_values_at_masked_positions_change_nothing(
    model_dir: Path, team: Team, groups: list[TrajectoryGroup], junk: float
) -> None:
    def dirtied(t: Trajectory) -> Trajectory:
        segments = tuple(
            dataclasses.replace(
                s,
                logprobs=np.where(s.mask, s.logprobs, np.float32(junk)),
                versions=np.where(s.mask, s.versions, 12345).astype(np.int32),
            )
            for s in t.segments
        )
        return dataclasses.replace(t, segments=segments)

    dirty = [TrajectoryGroup(g.close, tuple(dirtied(t) for t in g)) for g in groups]
    loss = LossSettings(old_logprobs="recompute", is_level="token")
    clean_metrics, clean_weights = run_step(model_dir, team, batch_of(groups), loss=loss)
    dirty_metrics, dirty_weights = run_step(model_dir, team, batch_of(dirty), loss=loss)
    for name, value in clean_metrics.items():
        if not name.startswith(("timing_s", "perf/")):
            assert dirty_metrics[name] == value, name
    assert_same_weights(clean_weights, dirty_weights, atol=0)


def test_tokens_after_the_last_sampled_one_change_nothing(model_dir: Path, team: Team) -> None:
    rng = np.random.default_rng(0)
    base = [segment(rng, prompt=4, turns=[(3, 5)]) for _ in range(2)]
    changed = [dataclasses.replace(s, ids=np.concatenate([s.ids[:-5], s.ids[-5:][::-1]])) for s in base]
    before, after = (
        run_step(
            model_dir, team, batch_of([close(0, [trajectory(0, i, reward=i, segments=[s]) for i, s in enumerate(segments)])])
        )
        for segments in (base, changed)
    )
    assert before[0]["actor/pg_loss"] == after[0]["actor/pg_loss"]
    assert_same_weights(before[1], after[1], atol=0)


def test_recompute_anchors_at_the_weights_before_the_update_and_caps_the_weights(
    model_dir: Path, team: Team, groups: list[TrajectoryGroup]
) -> None:
    loss = LossSettings(old_logprobs="recompute", is_level="token", is_threshold=2.0)
    metrics, _ = run_step(model_dir, team, batch_of(groups), loss=loss)
    assert abs(metrics["actor/ppo_kl"]) < 1e-6
    assert metrics["rollout_corr/rollout_is_max"] <= 2.0 + 1e-6
    assert metrics["rollout_corr/k3_kl"] > 0.01
    assert metrics["timing_s/old_log_prob"] > 0


def test_a_trajectory_longer_than_the_budget_is_parted_between_its_segments(model_dir: Path, team: Team) -> None:
    groups = [random_group(g, num_segments=3) for g in range(2)]
    whole, whole_weights = run_step(model_dir, team, batch_of(groups), lr=1e-3)
    parted, parted_weights = run_step(model_dir, team, batch_of(groups), lr=1e-3, micro_batch_tokens=32)
    assert parted["actor/pg_loss"] == pytest.approx(whole["actor/pg_loss"], abs=1e-6)
    assert_same_weights(whole_weights, parted_weights, atol=2e-5)
    with pytest.raises(DataError, match=r"trajectory \d+ of the batch.*micro_batch_tokens=32"):
        run_step(
            model_dir,
            team,
            batch_of(groups),
            micro_batch_tokens=32,
            loss=LossSettings(policy_loss="gspo", policy_params={"clip_ratio_low": 0.1, "clip_ratio_high": 0.1}),
        )


def test_group_statistics_include_members_that_are_too_stale_to_train_on(model_dir: Path, team: Team) -> None:
    rng = np.random.default_rng(1)
    fresh = [segment(rng, prompt=3, turns=[(2, 0)], version=5) for _ in range(2)]
    stale = segment(rng, prompt=3, turns=[(2, 0)], version=0)
    members = [
        trajectory(0, i, reward=r, segments=[s]) for i, (r, s) in enumerate([(1.0, fresh[0]), (1.0, fresh[1]), (0.0, stale)])
    ]
    batch = batch_of([close(0, members)], version=5, max_staleness=2)
    assert batch.outcomes == {members[0].id: "trained", members[1].id: "trained", members[2].id: "stale"}
    metrics, _ = run_step(model_dir, team, batch)
    assert metrics["critic/advantages/mean"] == pytest.approx((1 - 2 / 3) / math.sqrt(1 / 3), rel=1e-4)


def test_minibatches_and_epochs_make_as_many_updates(model_dir: Path, team: Team, groups: list[TrajectoryGroup]) -> None:
    learner = make_learner(model_dir, team, loss=LossSettings(num_epochs=2, num_minibatches=3))
    learner.step(batch_of(groups))
    assert (learner.num_updates, learner.policy_version) == (6, 1)


def test_kl_loss_is_zero_at_the_reference_and_grows_after_an_update(
    model_dir: Path, team: Team, groups: list[TrajectoryGroup]
) -> None:
    learner = make_learner(model_dir, team, loss=LossSettings(kl=KLSettings(coef=0.1)))
    first = learner.step(batch_of(groups))
    second = learner.step(batch_of(groups, version=1))
    assert first["actor/kl_loss"] == pytest.approx(0.0, abs=1e-7)
    assert second["actor/kl_loss"] > 1e-5
    assert first["actor/loss"] == pytest.approx(first["actor/pg_loss"], abs=1e-6)


def test_a_batch_without_anything_to_train_on_is_a_step_without_an_update(model_dir: Path, team: Team) -> None:
    rng = np.random.default_rng(2)
    equal = close(0, [trajectory(0, i, reward=1.0, segments=[segment(rng, prompt=2, turns=[(2, 0)])]) for i in range(2)])
    learner = make_learner(model_dir, team)
    before = weights_of(learner)
    metrics = learner.step(batch_of([equal]))
    assert metrics["update/skipped"] == 1
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["reward/mean"] == 1
    assert (learner.policy_version, learner.num_updates) == (1, 0)
    assert_same_weights(before, weights_of(learner), atol=0)


def test_nonfinite_gradients_skip_the_update_and_end_the_run_when_they_persist(
    model_dir: Path, team: Team, groups: list[TrajectoryGroup]
) -> None:
    learner = make_learner(model_dir, team, max_nonfinite_steps=2)
    before = weights_of(learner)
    poisoned = learner.policy.hf.base_model.norm.register_forward_hook(lambda _m, _i, out: out * math.inf)
    metrics = learner.step(batch_of(groups))
    assert (metrics["update/skipped"], metrics["update/nonfinite"], learner.num_skipped_updates) == (1, 1, 1)
    assert_same_weights(before, weights_of(learner), atol=0)
    with pytest.raises(TrainingDiverged, match="2 updates in a row"):
        learner.step(batch_of(groups, version=1))
    poisoned.remove()


def test_learning_raises_the_probability_of_what_was_rewarded(model_dir: Path, team: Team) -> None:
    group = on_policy(random_group(0, size=2), model_dir)
    learner = make_learner(model_dir, team, lr=3e-3)
    learner.step(batch_of([group]))
    learner.export(Path(model_dir.parent / "after"))

    def total(directory: Path, t: Trajectory) -> float:
        return float(sum(plain_logprobs(directory, s.ids.tolist())[s.mask].sum() for s in t.segments))

    bad, good = group.trajectories
    assert total(model_dir.parent / "after", good) > total(model_dir, good)
    assert total(model_dir.parent / "after", bad) < total(model_dir, bad)


def test_metrics_carry_verls_names_and_the_counts_close(model_dir: Path, team: Team, groups: list[TrajectoryGroup]) -> None:
    metrics, _ = run_step(model_dir, team, batch_of(groups))
    expected = {
        "actor/pg_loss", "actor/entropy", "actor/ppo_kl", "actor/pg_clipfrac", "actor/grad_norm", "actor/lr",
        "critic/rewards/mean", "critic/rewards/max", "critic/rewards/min", "critic/advantages/mean", "response_length/mean",
        "response_length/max", "prompt_length/mean", "num_turns/mean", "rollout_corr/kl", "training/rollout_probs_diff_mean",
        "training/rollout_probs_diff_max", "training/off_policy/trajectory_staleness/mean",
        "training/off_policy/trajectory_staleness/max", "perf/throughput", "timing_s/step", "timing_s/update",
        "frac_reward_zero_std", "reward/mean", "reward/correct/mean", "step", "policy_version",
    }  # fmt: skip
    assert expected <= metrics.keys()
    assert all(isinstance(value, int | float) for value in metrics.values())
    tokens = sum(t.num_sampled for g in groups for t in g)
    assert metrics["agentrl/tokens/trained"] == tokens
    assert metrics["agentrl/trajectories/trained"] == 12
    assert metrics["reward/mean"] == pytest.approx(np.mean([t.reward for g in groups for t in g]))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LossSettings(advantage="gae"), "needs a critic"),
        (LossSettings(is_level="token"), "count the off-policy ratio twice"),
        (LossSettings(policy_params={"clip": 0.2}), "has no parameter clip"),
        (LossSettings(policy_loss="pppo"), "unknown"),
        (LossSettings(num_epochs=0), "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(model_dir: Path, team: Team, loss: LossSettings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_learner(model_dir, team, loss=loss)


def test_a_directory_without_a_model_is_refused(tmp_path: Path, team: Team) -> None:
    with pytest.raises(ConfigError, match="holds no Hugging Face model"):
        make_learner(tmp_path, team)


def test_gradient_checkpointing_computes_again_and_changes_nothing(
    model_dir: Path, team: Team, groups: list[TrajectoryGroup]
) -> None:
    plain, plain_weights = run_step(model_dir, team, batch_of(groups))
    learner: Learner = make_learner(model_dir, team, gradient_checkpointing=True)
    calls: list[int] = []
    learner.policy.hf.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    metrics = learner.step(batch_of(groups))
    assert len(calls) == 2  # forward, and again in backward
    assert metrics["actor/pg_loss"] == plain["actor/pg_loss"]
    assert_same_weights(plain_weights, weights_of(learner), atol=1e-6)


def test_every_weight_is_trained(model_dir: Path, team: Team, groups: list[TrajectoryGroup]) -> None:
    # Parameters that a bare forward left gathered would silently stay as they were.
    learner = make_learner(
        model_dir, team, loss=LossSettings(old_logprobs="recompute", kl=KLSettings(coef=0.01), entropy_coef=0.01)
    )
    before = weights_of(learner)
    learner.step(batch_of(groups))
    learner.step(batch_of(groups, version=1))
    after = weights_of(learner)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
