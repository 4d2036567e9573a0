"""Rewards before they become advantages: where they sit, penalties on them, and which groups carry a signal."""

import torch
from torch import Tensor

from agentrl.algorithms.grouping import Groups, Labels
from agentrl.algorithms.kl import kl_penalty
from agentrl.algorithms.masked import as_bool, check_shapes, masked_mean, masked_sum, zero_masked


def place_outcome(scores: Tensor, mask: Tensor) -> Tensor:
    """Put each trajectory's score on its last *sampled* token, [B, T].

    A rollout may end with tool output; a reward placed on the last token would lie under the mask and be lost. A row
    without a sampled token keeps no reward.

    Args:
        scores: [B].
        mask: [B, T].
    """
    kept = as_bool(mask)
    positions = torch.arange(kept.shape[1], device=kept.device)
    last = torch.where(kept, positions, -1).amax(dim=1, keepdim=True)
    return zero_masked(scores.unsqueeze(1).expand(kept.shape), (positions == last) & kept)


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int, penalty_factor: float = 1.0) -> Tensor:
    """DAPO's soft punishment, to be added to the reward, [B] in [-penalty_factor, 0] (arXiv:2503.14476, eq. 13).

    0 up to ``max_length - buffer`` tokens, then linear down to ``-penalty_factor`` at ``max_length`` and beyond (the reference
    does not stop there). The caller chooses what counts as length; counting tool output punishes what the policy did not write.

    Args:
        lengths: [B] tokens.
        max_length: tokens at which the penalty is full.
        buffer: tokens before it over which the penalty grows.
        penalty_factor: size of the full penalty.

    Raises:
        ValueError: a buffer that is not in 1..max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"overlong buffer={buffer} must lie in 1..max_length={max_length}")
    excess = (lengths - (max_length - buffer)).to(torch.promote_types(lengths.dtype, torch.float32))
    return -(excess / buffer).clamp(0, 1) * penalty_factor


def kl_in_reward(
    rewards: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, *, coefficient: float, estimator: str = "k1"
) -> tuple[Tensor, Tensor]:
    """Subtract ``coefficient`` * KL per sampled token from the rewards (arXiv:1909.08593, eq. 2).

    Args:
        rewards: [B, T].
        log_probs: [B, T] of the policy at the start of the step.
        ref_log_probs: [B, T] of the reference.
        mask: [B, T].
        coefficient: beta, e.g. a controller's ``value``.
        estimator: see ``kl_penalty``; the value only, so ``+`` makes no difference.

    Returns:
        The rewards [B, T], and the KL [] (mean over trajectories of the mean per token) to update a controller with.
    """
    check_shapes(rewards=rewards, log_probs=log_probs, ref_log_probs=ref_log_probs, mask=mask)
    kl = kl_penalty(log_probs.detach(), ref_log_probs.detach(), estimator, mask=mask)
    mean = masked_mean(masked_mean(kl, mask, dim=-1), as_bool(mask).any(dim=-1))
    return zero_masked(rewards, mask) - coefficient * kl, mean


def informative_rows(scores: Tensor, groups: Labels, *, tolerance: float = 0.0) -> Tensor:
    """[B] bool: the row's group has a spread of scores larger than ``tolerance`` (DAPO's dynamic sampling, arXiv:2503.14476,
    eq. 11). Groups in which all succeed or all fail give no group-relative gradient; a group of one never does.

    Args:
        scores: [B].
        groups: one label per row.
        tolerance: largest difference that still counts as no spread.
    """
    siblings = Groups.of(groups, num_rows=len(scores), device=scores.device)
    high = scores.new_full((len(siblings.sizes),), -torch.inf).scatter_reduce(0, siblings.ids, scores, "amax")
    low = scores.new_full((len(siblings.sizes),), torch.inf).scatter_reduce(0, siblings.ids, scores, "amin")
    return (high - low > tolerance)[siblings.ids]


def row_scores(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B, T] -> [B], the sum over sampled tokens."""
    return masked_sum(rewards, mask, dim=-1)
