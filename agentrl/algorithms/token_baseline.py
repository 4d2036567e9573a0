"""Optimal token baseline: a baseline per token that weighs siblings by how uncertain their path has been so far."""

import torch
from torch import Tensor

from agentrl.algorithms.grouping import Groups
from agentrl.algorithms.masked import as_bool, back_in_place, returns_to_go, to_front, zero_masked

ENERGY_EPSILON = 1e-8
"""Added to the summed path variance, the divisor of the baseline: a path of certain tokens has none."""


def path_variance(
    old_log_probs: Tensor, sum_pi_squared: Tensor, mask: Tensor, rollout_is_weights: Tensor | None = None
) -> Tensor:
    """W_t = sum over sampled j <= t of 1 - 2 pi_j + sum(pi²), [B, T]: the squared norm of the logit gradient, accumulated
    (arXiv:2602.07078, "logit-gradient proxy"); each term times the squared importance weight where given.
    """
    step = 1 - 2 * zero_masked(old_log_probs, mask).exp() + zero_masked(sum_pi_squared, mask)
    if rollout_is_weights is not None:
        step = step * zero_masked(rollout_is_weights, mask).square()
    return zero_masked(step, mask).cumsum(dim=1)


def _baseline(returns: Tensor, variance: Tensor, present: Tensor, groups: Groups, epsilon: float) -> Tensor:
    """Per group and column, the variance-weighted mean of returns, [B, T]; 0 for a group with one member that has tokens."""
    weight = zero_masked(variance, present)
    per_group = groups.sum(returns * weight) / (groups.sum(weight) + epsilon)
    return per_group[groups.ids]


def _longest_tail(lengths: Tensor, groups: Groups, width: int) -> Tensor:
    """[B, T] bool: columns of a group's single longest row past its second longest, where it has nothing to compare with."""
    longest = lengths.new_zeros(len(groups.sizes)).scatter_reduce(0, groups.ids, lengths, "amax", include_self=True)
    is_longest = lengths == longest[groups.ids]
    shorter = torch.where(is_longest, torch.zeros_like(lengths), lengths)
    second = lengths.new_zeros(len(groups.sizes)).scatter_reduce(0, groups.ids, shorter, "amax", include_self=True)
    unique = (groups.sum(is_longest.to(lengths.dtype)) == 1)[groups.ids]
    columns = torch.arange(width, device=lengths.device)
    return (is_longest & unique).unsqueeze(1) & (columns >= second[groups.ids].unsqueeze(1))


def optimal_token_baseline(
    *,
    rewards: Tensor,
    mask: Tensor,
    groups: Groups,
    old_log_probs: Tensor,
    sum_pi_squared: Tensor,
    rollout_is_weights: Tensor | None = None,
    handle_zero_tail: bool = True,
    epsilon: float = ENERGY_EPSILON,
) -> tuple[Tensor, Tensor]:
    """A_t = G_t - sum_i G_t W_t / sum_i W_t over the siblings at the same *position* (arXiv:2602.07078).

    For single-turn rows. With holes in the mask, siblings at one position are at different points of their work, and the
    reference cuts the tail at a token *count* read as a position; use ``tir_optimal_token_baseline`` there. Kept as is for
    parity.

    Args:
        rewards: [B, T].
        mask: [B, T] bool.
        groups: siblings.
        old_log_probs: [B, T].
        sum_pi_squared: [B, T] sum over the vocabulary of squared probabilities.
        rollout_is_weights: [B, T] weights; the variance is scaled by their square.
        handle_zero_tail: baseline 0 where a group's single longest row has outlived all others, which would otherwise be
            its own baseline.
        epsilon: added to the divisor.

    Returns:
        Advantages and undiscounted returns, [B, T].
    """
    returns = returns_to_go(rewards, mask, 1.0)
    variance = path_variance(old_log_probs, sum_pi_squared, mask, rollout_is_weights)
    baseline = _baseline(returns, variance, mask, groups, epsilon)
    alone = groups.alone().unsqueeze(1)
    if handle_zero_tail:
        alone = alone | _longest_tail(mask.sum(dim=1), groups, mask.shape[1])
    return zero_masked(returns - zero_masked(baseline, ~alone), mask), returns


def tir_optimal_token_baseline(
    *,
    rewards: Tensor,
    mask: Tensor,
    groups: Groups,
    old_log_probs: Tensor,
    sum_pi_squared: Tensor,
    rollout_is_weights: Tensor | None = None,
    handle_zero_tail: bool = True,
    epsilon: float = ENERGY_EPSILON,
) -> tuple[Tensor, Tensor]:
    """The same for tool-integrated rows (arXiv:2602.07078): siblings are compared at the same *number of sampled tokens*.

    Parameters as ``optimal_token_baseline``. Rows without sampled tokens take no part.
    """
    returns = returns_to_go(rewards, mask, 1.0)
    variance = path_variance(old_log_probs, sum_pi_squared, mask, rollout_is_weights)
    order, kept = to_front(mask)
    packed_returns = zero_masked(returns.gather(1, order), kept)
    baseline = _baseline(packed_returns, variance.gather(1, order), kept, groups, epsilon)
    lengths = as_bool(mask).sum(dim=1)
    members = groups.sum((lengths > 0).to(lengths.dtype))[groups.ids]
    alone = (members <= 1).unsqueeze(1)
    if handle_zero_tail:
        alone = alone | _longest_tail(lengths, groups, mask.shape[1])
    packed = zero_masked(packed_returns - zero_masked(baseline, ~alone), kept)
    return back_in_place(packed, order), returns
