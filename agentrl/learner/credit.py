"""Rewards become advantages: where each reward lies, what is added to it, and what the estimator gets. Rank 0 only.

Everything here is laid out ``[B, L]``: one row per trajectory with its sampled tokens moved to the front, L the most that any
row sampled. Tool output is simply not there. A flat ``[M]`` array holds the same tokens in the same order, row after row.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentrl.algorithms.advantages import advantage_parameters, compute_advantages
from agentrl.algorithms.shaping import kl_in_reward, overlong_penalty
from agentrl.learner.batching import BatchRow
from agentrl.learner.settings import LossSettings
from agentrl.types import Trajectory

OVERLONG_TERM = "overlong"
"""Name of the length penalty among gdpo's reward terms."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenStatistics:
    """What forward passes found, each [M] over the sampled tokens of all rows, or None."""

    logprobs: Tensor | None = None
    """Of the policy at the start of the step (the sampler's, where nothing was recomputed)."""
    reference: Tensor | None = None
    sum_pi_squared: Tensor | None = None
    values: Tensor | None = None
    """Of the critic before the step."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Credit:
    """What each sampled token earned, [M]."""

    advantages: Tensor
    returns: Tensor
    kl: float | None = None
    """Mean KL to the reference, where it was taken off the reward."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])


def assign_credit(rows: Sequence[BatchRow], loss: LossSettings, *, kl_coef: float, found: TokenStatistics) -> Credit:
    """Advantages and returns of a batch; all its rows enter the statistics, trained or not.

    Args:
        rows: of the batch.
        kl_coef: the KL controller's present value.
        found: what the estimator, the KL penalty or the critic need.
    """
    if not rows:
        return Credit(advantages=torch.zeros(0), returns=torch.zeros(0))
    rewards, mask = compact_rewards(rows, use_turn_rewards=loss.places_turn_rewards)
    metrics: dict[str, float] = {}
    penalties = torch.zeros(len(rows))
    if loss.overlong is not None:
        penalties = _overlong_penalties(rows, loss)
        rewards[torch.arange(len(rows)), mask.sum(dim=1) - 1] += penalties
        metrics["agentrl/overlong/penalty_mean"] = float(penalties.mean())
        metrics["agentrl/overlong/fraction"] = float((penalties < 0).float().mean())
    kl = None
    if found.reference is not None and loss.kl.place == "reward":
        assert found.logprobs is not None
        rewards, mean = kl_in_reward(
            rewards, _laid_out(found.logprobs, mask), _laid_out(found.reference, mask), mask,
            coefficient=kl_coef, estimator=loss.kl.estimator_name,
        )  # fmt: skip
        kl = float(mean)
        metrics |= {"actor/reward_kl_penalty": kl, "actor/reward_kl_penalty_coeff": kl_coef}
    groups = torch.tensor([row.group for row in rows])
    values = _laid_out(found.values, mask) if found.values is not None else None
    inputs = _inputs(rows, loss, mask, penalties, found)
    if "reward_baselines" in inputs:
        metrics["agentrl/greedy_baseline/mean"] = float(inputs["reward_baselines"].mean())
    advantages, returns = compute_advantages(
        loss.advantage, rewards=rewards, mask=mask, groups=groups, values=values, **inputs, **loss.advantage_params
    )
    weights = torch.tensor([row.weight for row in rows])[:, None]
    return Credit(
        advantages=(advantages.float() * weights)[mask], returns=returns.float()[mask], kl=kl, metrics=metrics
    )  # fmt: skip


def compact_rewards(
    rows: Sequence[BatchRow], *, use_turn_rewards: bool = False
) -> tuple[Tensor, Tensor]:  # [B, L] fp32 rewards, [B, L] bool mask
    """Rewards on sampled tokens only, moved to the front: L is the most that any row sampled.

    The reward lies on the last sampled token. With ``use_turn_rewards`` each per-turn reward lies on the last token sampled
    up to its place, and the rest of the reward on the last one, so that a row always sums to its reward.
    """
    counts = [row.trajectory.num_sampled for row in rows]
    width = max(counts, default=0)
    rewards = np.zeros((len(rows), width), dtype=np.float32)
    mask = np.arange(width) < np.asarray(counts)[:, None] if rows else np.zeros((0, 0), dtype=bool)
    for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
        placed = 0.0
        if use_turn_rewards:
            before = np.cumsum([0, *(s.mask.sum() for s in row.trajectory.segments)])
            for segment, token, value in row.trajectory.turn_rewards:
                sampled = int(before[segment] + row.trajectory.segments[segment].mask[: token + 1].sum())
                rewards[b, max(sampled - 1, 0)] += value
                placed += value
        rewards[b, count - 1] += row.trajectory.reward - placed
    return torch.from_numpy(rewards), torch.from_numpy(mask)


def turns_of(trajectory: Trajectory) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Turn number and state name of each sampled token, both [sampled].

    A turn is a run of sampled tokens. The state in which it began is named by a hash of the tokens observed before it: the prompt,
    or the last tool result or user message (GiGPO's anchor states).
    """
    numbers: list[NDArray[np.int64]] = []
    states: list[NDArray[np.int64]] = []
    turn = 0
    for segment in trajectory.segments:
        edges = np.flatnonzero(np.diff(segment.mask.astype(np.int8), prepend=0, append=0))
        end_before = 0
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            observed = np.ascontiguousarray(segment.ids[end_before:start], dtype="<i4").tobytes()
            name = int.from_bytes(hashlib.blake2b(observed, digest_size=7).digest(), "little")
            numbers.append(np.full(end - start, turn, dtype=np.int64))
            states.append(np.full(end - start, name, dtype=np.int64))
            turn, end_before = turn + 1, end
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate(numbers or [empty]), np.concatenate(states or [empty])


def reward_terms(rows: Sequence[BatchRow], *, also: Sequence[str] = ()) -> dict[str, Tensor]:
    """Each named reward term of the batch as [B]; a trajectory without a term has 0 there."""
    names = sorted({name for row in rows for name in row.trajectory.reward_terms} | set(also))
    return {name: torch.tensor([float(row.trajectory.reward_terms.get(name, 0.0)) for row in rows]) for name in names}


def _inputs(
    rows: Sequence[BatchRow], loss: LossSettings, mask: Tensor, penalties: Tensor, found: TokenStatistics
) -> dict[str, Any]:
    """What the estimator takes besides rewards and mask."""
    wanted = advantage_parameters(loss.advantage)
    inputs: dict[str, Any] = {}
    if "turn_ids" in wanted:
        turns = [turns_of(row.trajectory) for row in rows]
        inputs["turn_ids"] = _laid_out(torch.from_numpy(np.concatenate([t for t, _ in turns])), mask)
        if "anchor_ids" in wanted:
            inputs["anchor_ids"] = _laid_out(torch.from_numpy(np.concatenate([s for _, s in turns])), mask)
    if "reward_baselines" in wanted:
        inputs["reward_baselines"] = torch.tensor([_baseline(row) for row in rows], dtype=torch.float32)
    if "reward_terms" in wanted:
        terms = reward_terms(rows, also=sorted(set(loss.advantage_params.get("reward_weights") or {}) - {OVERLONG_TERM}))
        inputs["reward_terms"] = terms | ({OVERLONG_TERM: penalties} if loss.overlong is not None else {})
    if "sum_pi_squared" in wanted:
        assert found.logprobs is not None
        assert found.sum_pi_squared is not None
        inputs["old_log_probs"] = _laid_out(found.logprobs, mask)
        inputs["sum_pi_squared"] = _laid_out(found.sum_pi_squared, mask)
    return inputs


def _baseline(row: BatchRow) -> float:
    if row.baseline is None:
        raise ValueError(
            f"{row.trajectory.id} has no greedy baseline, which the estimator takes off: build the batch with needs_baseline=True."
        )
    return row.baseline


def _overlong_penalties(rows: Sequence[BatchRow], loss: LossSettings) -> Tensor:
    assert loss.overlong is not None
    lengths = torch.tensor([row.trajectory.num_sampled for row in rows])
    settings = loss.overlong
    return overlong_penalty(lengths, max_length=settings.max_length, buffer=settings.buffer, penalty_factor=settings.penalty)


def _laid_out(flat: Tensor, mask: Tensor) -> Tensor:
    """[M] -> [B, L]."""
    laid = torch.zeros(mask.shape, dtype=flat.dtype)
    laid[mask] = flat.cpu()
    return laid
