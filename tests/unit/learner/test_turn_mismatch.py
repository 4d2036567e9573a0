"""Turns from masks, and one broken turn among many stands out."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_rig import batch_of, close, make_learner, plain_logprobs, segment, trajectory

from agentrl.learner.distributed import Team
from agentrl.learner.turn_mismatch import turn_mismatch, turns_of_slots


def test_a_turn_is_a_run_of_sampled_tokens_within_one_sequence() -> None:
    #            sequence 0 ends sampled ...| ... and sequence 1 begins sampled |(an empty one)| 3
    mask = np.asarray([0, 1, 1, 0, 1, 1] + [1, 0, 1] + [] + [0, 0], dtype=np.bool_)
    turns = turns_of_slots(mask, np.asarray([0, 6, 9, 9, 11]))
    assert turns.tolist() == [0, 0, 1, 1, 2, 3]
    assert turns_of_slots(np.zeros(0, np.bool_), np.asarray([0])).tolist() == []


def test_each_turn_counts_once_whatever_its_length() -> None:
    turns = torch.tensor([4, 4, 4, 4, 7, 9, 9])
    trained = torch.tensor([-1.0, -1.0, -1.0, -1.0, -2.0, -1.0, -1.0])
    rollout = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.4, -1.2, -0.9])
    found = turn_mismatch(trained, rollout, turns)
    assert found == {
        "rollout_corr/turn_logprob_diff_mean": pytest.approx((0 + 0.6 + 0.15) / 3, abs=1e-6),
        "rollout_corr/turn_logprob_diff_max": pytest.approx(0.6, abs=1e-6),
        "rollout_corr/turn_logprob_diff_fraction_high": pytest.approx(2 / 3),
    }
    assert turn_mismatch(trained[:0], rollout[:0], turns[:0]) == {}


def test_one_turn_sampled_elsewhere_shows_however_the_batch_is_cut(model_dir: Path, team: Team) -> None:
    rng = np.random.default_rng(3)
    members = []
    for index in range(4):
        part = segment(rng, prompt=4, turns=[(3, 2), (5, 1), (2, 0)])
        logprobs = np.where(part.mask, plain_logprobs(model_dir, part.ids.tolist()), 0).astype(np.float32)
        if index == 2:
            logprobs[9:14] -= 0.5  # the second turn
        members.append(trajectory(0, index, reward=float(index % 2), segments=[dataclasses.replace(part, logprobs=logprobs)]))
    for budget in (4096, 21):
        metrics = make_learner(model_dir, team, micro_batch_tokens=budget).step(batch_of([close(0, members)]))
        assert metrics["rollout_corr/turn_logprob_diff_mean"] == pytest.approx(0.5 / 12, abs=1e-5)
        assert metrics["rollout_corr/turn_logprob_diff_max"] == pytest.approx(0.5, abs=1e-5)
        assert metrics["rollout_corr/turn_logprob_diff_fraction_high"] == pytest.approx(1 / 12)
