"""The whole chain has the right sign: every algorithm family raises its reward on a task made of the policy's own samples."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_rig import VOCAB, batch_of, close, make_learner, trajectory, weights_of

from agentrl.learner.distributed import Team
from agentrl.learner.learner import Learner
from agentrl.learner.optim import OptimizerSettings
from agentrl.learner.settings import CriticSettings, KLSettings, LossSettings
from agentrl.types import Segment, TrajectoryGroup

NUM_SAMPLED = 6
CLIP: dict[str, Any] = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
GAE: dict[str, Any] = {"advantage": "gae", "advantage_params": {"gamma": 1.0, "lam": 0.95}}


class Sampler:
    """Samples from the learner's present weights with plain transformers."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._generator = torch.Generator().manual_seed(0)

    def groups(self, learner: Learner, *, num_groups: int = 6, size: int = 8) -> list[TrajectoryGroup]:
        """The reward is the share of sampled tokens in the lower half of the vocabulary."""
        self._model.load_state_dict(weights_of(learner), strict=False)
        prompts = torch.arange(8, 8 + 3 * num_groups).view(num_groups, 3).repeat_interleave(size, 0)
        ids, logprobs = self._sample(prompts, greedy=False)
        best, _ = self._sample(prompts[::size], greedy=True)
        mask = np.arange(ids.shape[1]) >= 3
        versions = np.where(mask, learner.policy_version, -1).astype(np.int32)
        made: list[TrajectoryGroup] = []
        for g in range(num_groups):
            members = [
                trajectory(g, i, reward=float((row[3:] < VOCAB // 2).float().mean()), segments=[
                    Segment(ids=row.numpy().astype(np.int32), mask=mask, logprobs=lp.numpy(), versions=versions, prompt_length=3)
                ])
                for i, (row, lp) in enumerate(zip(ids[g * size :][:size], logprobs[g * size :][:size], strict=True))
            ]  # fmt: skip
            closed = close(g, members)
            baseline = float((best[g, 3:] < VOCAB // 2).float().mean())
            made.append(dataclasses.replace(closed, close=dataclasses.replace(closed.close, baseline=baseline)))
        return made

    def _sample(self, ids: torch.Tensor, *, greedy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T] prompts with what follows, and its logprobs (0 for the prompt)."""
        logprobs = torch.zeros(ids.shape)
        with torch.no_grad():
            for _ in range(NUM_SAMPLED):
                log_p = self._model(ids).logits[:, -1].log_softmax(-1)
                token = torch.multinomial(log_p.exp(), 1, generator=self._generator)
                if greedy:
                    token = log_p.argmax(-1, keepdim=True)
                ids, logprobs = torch.cat([ids, token], 1), torch.cat([logprobs, log_p.gather(1, token)], 1)
        return ids, logprobs


@pytest.mark.parametrize(
    "loss",
    [
        LossSettings(policy_params=CLIP),
        LossSettings(advantage="rloo", policy_params=CLIP),
        LossSettings(advantage="reinforce_plus_plus", policy_params=CLIP),
        LossSettings(advantage="remax", policy_params=CLIP),
        LossSettings(policy_loss="cispo", policy_params=CLIP),
        LossSettings(policy_loss="reinforce", is_level="token", is_batch_normalize=True),
        LossSettings(policy_params=CLIP, old_logprobs="recompute", is_level="token", kl=KLSettings(coef=0.01, place="reward")),
        LossSettings(**GAE, policy_params=CLIP, num_minibatches=2),
    ],
    ids=lambda loss: f"{loss.advantage}-{loss.policy_loss}-{loss.old_logprobs}",
)
def test_every_family_learns_what_is_rewarded(model_dir: Path, team: Team, loss: LossSettings) -> None:
    critic = CriticSettings(optimizer=OptimizerSettings(lr=1e-2)) if loss.advantage == "gae" else None
    learner = make_learner(model_dir, team, lr=2e-2, loss=loss, critic=critic)
    sampler = Sampler(model_dir)
    rewards: list[float] = []
    for _ in range(9):
        batch = batch_of(sampler.groups(learner), version=learner.policy_version)
        metrics = learner.step(batch)
        assert metrics["training/rollout_probs_diff_max"] < 1e-4 or loss.num_minibatches > 1
        rewards.append(metrics["reward/mean"])
    assert rewards[0] == pytest.approx(0.5, abs=0.1)
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.12, rewards
