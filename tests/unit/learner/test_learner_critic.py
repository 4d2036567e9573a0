"""PPO's critic: values before each token, warm-up, learning, metrics, invariance to the cut, checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_rig import assert_same_weights, batch_of, close, make_learner, random_group, segment, trajectory, weights_of

from agentrl.errors import CheckpointError, ConfigError
from agentrl.learner.batching import StepBatch
from agentrl.learner.checkpoint import Checkpoints
from agentrl.learner.distributed import Team
from agentrl.learner.learner import Learner
from agentrl.learner.model import frozen_passes
from agentrl.learner.optim import OptimizerSettings
from agentrl.learner.packing import pack_row
from agentrl.learner.settings import CriticSettings, LossSettings

GAE = LossSettings(advantage="gae", advantage_params={"gamma": 1.0, "lam": 0.95})


def with_critic(model_dir: Path, team: Team, *, lr: float = 1e-2, loss: LossSettings = GAE, **options: Any) -> Learner:
    critic = {name: options.pop(name) for name in ("warmup_steps", "cliprange_value") if name in options}
    settings = CriticSettings(optimizer=OptimizerSettings(lr=lr), **critic)
    return make_learner(model_dir, team, lr=1e-3, loss=loss, critic=settings, **options)


def critic_weights(learner: Learner) -> dict[str, torch.Tensor]:
    assert learner.critic is not None
    return {name: p.detach().full_tensor().clone() for name, p in learner.critic.model.named_parameters()}  # type: ignore[attr-defined]


@pytest.fixture
def batch() -> StepBatch:
    return batch_of([random_group(g, size=4) for g in range(3)])


def test_values_start_at_zero_so_the_first_advantages_are_whitened_returns(model_dir: Path, team: Team, batch: StepBatch) -> None:
    loss = LossSettings(advantage="gae")  # gamma = lam = 1: the return is the outcome, whatever the values
    metrics = with_critic(model_dir, team, loss=loss).step(batch)
    assert metrics["critic/values/mean"] == metrics["critic/values/max"] == metrics["critic/values/min"] == 0
    assert metrics["critic/returns/max"] == pytest.approx(max(t.reward for g in batch.groups for t in g))
    assert metrics["critic/advantages/mean"] == pytest.approx(0, abs=1e-5)
    # Half the mean squared return; nothing is clipped on the way up from zero in the first pass.
    returns = np.concatenate([np.full(t.num_sampled, t.reward) for g in batch.groups for t in g])
    assert metrics["critic/vf_loss"] == pytest.approx(0.5 * float((returns**2).mean()), rel=1e-5)
    assert metrics["critic/vf_clipfrac"] == 0
    assert metrics["critic/vf_explained_var"] == pytest.approx(0, abs=1e-6)
    assert {"critic/grad_norm", "critic/lr", "actor/pg_loss"} <= metrics.keys()


def test_a_value_knows_what_came_before_its_token_and_not_the_token(model_dir: Path, team: Team) -> None:
    learner = with_critic(model_dir, team)
    assert learner.critic is not None
    critic = learner.critic
    with torch.no_grad():
        for p in critic.model.value_head.parameters():
            p.copy_(torch.ones_like(p))
    ids = torch.arange(10, 22)
    row, positions = pack_row(np.array([0, 12]), [0]), torch.tensor([5, 8])
    with frozen_passes(critic.model):
        before = critic.values(ids, row, positions)
        ids[5] = 200
        after = critic.values(ids, row, positions)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_the_critic_learns_what_its_trajectories_are_worth(model_dir: Path, team: Team) -> None:
    rng = np.random.default_rng(0)
    segments = [segment(rng, prompt=4, turns=[(4, 0)]) for _ in range(4)]
    members = [trajectory(0, i, reward=float(i), segments=[s]) for i, s in enumerate(segments)]
    batch = batch_of([close(0, members)])
    learner = with_critic(model_dir, team, warmup_steps=100)
    first = learner.step(batch)
    for _ in range(40):
        last = learner.step(batch)
    assert last["critic/vf_loss"] < 0.05 * first["critic/vf_loss"]
    assert last["critic/vf_explained_var"] > 0.9


def test_during_its_warm_up_the_policy_stays_as_it_is(model_dir: Path, team: Team, batch: StepBatch) -> None:
    learner = with_critic(model_dir, team, warmup_steps=2)
    start, values = weights_of(learner), critic_weights(learner)
    for _ in range(2):
        metrics = learner.step(batch)
        assert (metrics["update/skipped"], "actor/pg_loss" in metrics) == (1, False)
    assert_same_weights(weights_of(learner), start, atol=0)
    assert not torch.equal(critic_weights(learner)["value_head.weight"], values["value_head.weight"])
    assert (learner.policy_version, learner.num_updates, learner.num_skipped_updates) == (2, 0, 0)
    assert learner.step(batch)["update/skipped"] == 0
    assert not torch.equal(weights_of(learner)["model.norm.weight"], start["model.norm.weight"])


def test_how_the_batch_is_cut_changes_neither_critic_nor_policy(model_dir: Path, team: Team, batch: StepBatch) -> None:
    found: list[tuple[dict[str, float], dict[str, torch.Tensor]]] = []
    for budget in (4096, 33):
        learner = with_critic(model_dir, team, lr=1e-3, micro_batch_tokens=budget)
        learner.step(batch)
        found.append((learner.step(batch), weights_of(learner) | critic_weights(learner)))
    (whole, whole_weights), (cut, cut_weights) = found
    for name in ("critic/vf_loss", "critic/values/mean", "critic/vf_clipfrac", "actor/pg_loss", "critic/vf_explained_var"):
        assert cut[name] == pytest.approx(whole[name], abs=1e-5), name
    assert_same_weights(cut_weights, whole_weights, atol=1e-4)


def test_a_loaded_checkpoint_continues_exactly(model_dir: Path, team: Team, batch: StepBatch, tmp_path: Path) -> None:
    learner = with_critic(model_dir, team)
    learner.step(batch)
    Checkpoints(tmp_path).save(learner, step=1, state={})
    expected = learner.step(batch)
    fresh = with_critic(model_dir, team)
    Checkpoints(tmp_path).load(fresh)
    metrics = fresh.step(batch)
    for name in ("critic/vf_loss", "critic/values/mean", "critic/grad_norm", "critic/lr", "actor/pg_loss", "actor/grad_norm"):
        assert metrics[name] == expected[name], name
    assert_same_weights(critic_weights(fresh), critic_weights(learner), atol=0)
    with pytest.raises(CheckpointError, match="of another model: .* is only there"):
        Checkpoints(tmp_path).load(make_learner(model_dir, team))


def test_gae_without_a_critic_is_refused(model_dir: Path, team: Team) -> None:
    with pytest.raises(ConfigError, match="needs a critic"):
        make_learner(model_dir, team, loss=GAE)
