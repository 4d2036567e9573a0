"""Advantages by name: how much better each sampled token was than expected.

``compute_advantages`` takes one padded row [B, T] per trajectory (several segments: concatenated in order) with the reward at
the token that earned it (``shaping.place_outcome`` puts a trajectory's reward on its last sampled token). A row's
score is the sum of its rewards at sampled tokens; rewards under a False mask are ignored, as everything else there.
Advantages and returns are 0 where the mask is False, and carry no gradient.

Estimators that whiten look at the whole batch: call them once per step, not per micro-batch or rank.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from agentrl.algorithms.grouping import GroupOfOne, Groups, Labels
from agentrl.algorithms.masked import (
    as_bool,
    back_in_place,
    broadcast_to_tokens,
    check_shapes,
    discounted_suffix_sum,
    masked_sum,
    returns_to_go,
    to_front,
    whiten,
    zero_masked,
)
from agentrl.algorithms.token_baseline import optimal_token_baseline, tir_optimal_token_baseline
from agentrl.algorithms.turn_credit import STD_EPSILON, gigpo, turn_grpo, turn_return

Estimator: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


# ---- one value per trajectory, compared with its siblings


def _scores(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B] float64 score of each row.

    In fp32 the mean of equal rewards is off by a rounding error, which a std near zero blows up to 1e-2; [B] numbers cost nothing.
    """
    return masked_sum(rewards, mask, dim=-1).double()


def _on_tokens(per_row: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """[B] -> [B, T] in the rewards' dtype."""
    return broadcast_to_tokens(per_row.to(rewards.dtype), mask)


def _grpo_scores(scores: Tensor, groups: Groups, *, normalize_by_std: bool, epsilon: float, group_of_one: GroupOfOne) -> Tensor:
    """[B] standardised within the group."""
    centered = scores - groups.mean(scores)
    raw = scores
    if normalize_by_std:
        centered = centered / (groups.std(scores) + epsilon)
        raw = scores / (1 + epsilon)
    return groups.settle_alone(centered, raw, group_of_one)


def grpo(
    *,
    rewards: Tensor,
    mask: Tensor,
    groups: Groups,
    normalize_by_std: bool = True,
    epsilon: float = STD_EPSILON,
    group_of_one: GroupOfOne = "raw",
) -> tuple[Tensor, Tensor]:
    """(R - mean of group) / (std of group + epsilon) on every token (DeepSeekMath, arXiv:2402.03300, sec. 4.1.2; unbiased std).

    ``normalize_by_std=False`` is Dr. GRPO (arXiv:2503.20783, sec. 3.2): dividing by the std favours questions that are
    nearly always, or nearly never, solved. Use it with ``loss_agg_mode="seq-mean-token-sum-norm"``.
    ``group_of_one="raw"`` keeps the reference's behaviour for a lone trajectory; ``"zero"`` is better (see ``GroupOfOne``).
    """
    scores = _scores(rewards, mask)
    per_row = _grpo_scores(scores, groups, normalize_by_std=normalize_by_std, epsilon=epsilon, group_of_one=group_of_one)
    advantages = _on_tokens(per_row, rewards, mask)
    return advantages, advantages


def grpo_passk(
    *,
    rewards: Tensor,
    mask: Tensor,
    groups: Groups,
    normalize_by_std: bool = True,
    epsilon: float = STD_EPSILON,
) -> tuple[Tensor, Tensor]:
    """Only a group's best trajectory learns, from its lead over the second best (arXiv:2503.19595), by the group's std or not.

    The gradient of the expected maximum of k samples. A tie for the best, and a group of one, give 0 (the reference
    refuses a group of one).
    """
    scores = _scores(rewards, mask)
    best = scores.new_full((len(groups.sizes),), -torch.inf).scatter_reduce(0, groups.ids, scores, "amax")[groups.ids]
    is_best = scores == best
    others = torch.where(is_best, torch.full_like(scores, -torch.inf), scores)
    second = scores.new_full((len(groups.sizes),), -torch.inf).scatter_reduce(0, groups.ids, others, "amax")[groups.ids]
    leads = is_best & (groups.sum(is_best.to(scores.dtype)) == 1)[groups.ids] & ~groups.alone()
    lead = torch.where(leads, scores - second, torch.zeros_like(scores))
    if normalize_by_std:
        lead = lead / (groups.std(scores) + epsilon)
    advantages = _on_tokens(lead, rewards, mask)
    return advantages, advantages


def rloo(*, rewards: Tensor, mask: Tensor, groups: Groups, group_of_one: GroupOfOne = "raw") -> tuple[Tensor, Tensor]:
    """R - mean of the *other* siblings' R (REINFORCE leave-one-out, arXiv:2402.14740, sec. 3.2)."""
    scores = _scores(rewards, mask)
    size = groups.size_of_row(scores.dtype)
    left_out = (scores - groups.mean(scores)) * size / (size - 1).clamp(min=1)
    advantages = _on_tokens(groups.settle_alone(left_out, scores, group_of_one), rewards, mask)
    return advantages, advantages


def opo(*, rewards: Tensor, mask: Tensor, groups: Groups, group_of_one: GroupOfOne = "raw") -> tuple[Tensor, Tensor]:
    """R - length-weighted mean of the group's R, the variance-optimal baseline when gradient norms grow with length
    (arXiv:2505.23585). Length is the number of sampled tokens; tool output does not count.
    """
    scores = _scores(rewards, mask)
    lengths = mask.sum(dim=-1).to(scores.dtype)
    baseline = (groups.sum(lengths * scores) / groups.sum(lengths).clamp(min=1))[groups.ids]
    advantages = _on_tokens(groups.settle_alone(scores - baseline, scores, group_of_one), rewards, mask)
    return advantages, advantages


def gpg(
    *, rewards: Tensor, mask: Tensor, groups: Groups, f_norm: float = 1.0, group_of_one: GroupOfOne = "raw"
) -> tuple[Tensor, Tensor]:
    """alpha (R - mean of group) / f_norm, alpha = B / number of rows with a reward that is not 0 (GPG, arXiv:2504.02546).

    The paper's alpha corrects for groups without signal; the reference counts nonzero rewards instead. Kept for parity.
    """
    scores = _scores(rewards, mask)
    alpha = len(scores) / torch.count_nonzero(scores).clamp(min=1).to(scores.dtype)
    centered = groups.settle_alone(scores - groups.mean(scores), scores, group_of_one)
    advantages = _on_tokens(alpha * centered / f_norm, rewards, mask)
    return advantages, advantages


def reinforce_plus_plus_baseline(
    *, rewards: Tensor, mask: Tensor, groups: Groups, group_of_one: GroupOfOne = "raw"
) -> tuple[Tensor, Tensor]:
    """R - mean of group on every token, then whitened over the batch's tokens (REINFORCE++-baseline, arXiv:2501.03262)."""
    scores = _scores(rewards, mask)
    centered = groups.settle_alone(scores - groups.mean(scores), scores, group_of_one)
    advantages = whiten(_on_tokens(centered, rewards, mask), mask)
    return advantages, advantages


def gdpo(
    *,
    rewards: Tensor,
    mask: Tensor,
    groups: Groups,
    reward_terms: Mapping[str, Tensor] | None = None,
    reward_weights: Mapping[str, float] | None = None,
    normalize_by_std: bool = True,
    epsilon: float = STD_EPSILON,
    group_of_one: GroupOfOne = "raw",
    whiten_batch: bool = True,
) -> tuple[Tensor, Tensor]:
    """Each reward term standardised within the group on its own, then the weighted sum whitened over the batch (GDPO,
    arXiv:2601.05242): a term with a wide range no longer drowns the others.

    Args:
        rewards: [B, T], the only term when ``reward_terms`` is None.
        mask: [B, T] bool.
        groups: siblings.
        reward_terms: name -> [B] (a value per trajectory) or [B, T].
        reward_weights: name -> weight; absent names weigh 1.
        normalize_by_std: divide each term by its group's std.
        epsilon: added to it.
        group_of_one: see ``GroupOfOne``.
        whiten_batch: the last step; over tokens, as the reference does (the paper: over trajectories).

    Raises:
        ValueError: a term of the wrong shape, or a weight for a term that is not there.
    """
    terms = {"reward": rewards} if reward_terms is None else reward_terms
    weights = reward_weights or {}
    if unknown := sorted(set(weights) - set(terms)):
        raise ValueError(f"reward_weights name {', '.join(unknown)}, but the terms are {', '.join(sorted(terms))}")
    total = torch.zeros_like(rewards[:, 0], dtype=torch.float64)
    for name, term in terms.items():
        if term.shape not in (mask.shape, mask.shape[:1]):
            raise ValueError(f"reward term {name!r} has shape {list(term.shape)}; give [{len(mask)}] or {list(mask.shape)}")
        scores = (term if term.dim() == 1 else masked_sum(term, mask, dim=-1)).to(total)
        per_row = _grpo_scores(scores, groups, normalize_by_std=normalize_by_std, epsilon=epsilon, group_of_one=group_of_one)
        total = total + weights.get(name, 1.0) * per_row
    advantages = _on_tokens(total, rewards, mask)
    if whiten_batch:
        advantages = whiten(advantages, mask)
    return advantages, advantages


# ---- one value per token


def gae(
    *,
    rewards: Tensor,
    mask: Tensor,
    groups: Groups,
    values: Tensor | None,
    gamma: float = 1.0,
    lam: float = 1.0,
    whiten_batch: bool = True,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16): A_t = sum over j of (gamma lam)^j delta_{t+j}, delta_t = r_t +
    gamma V_{t+1} - V_t, where t+1 is the next *sampled* token: what a tool said is neither valued nor discounted.

    Returns = A + V before whitening; advantages whitened over the batch's tokens unless ``whiten_batch`` is False.

    Raises:
        ValueError: no ``values``.
    """
    del groups
    if values is None:
        raise ValueError("gae needs values [B, T] from a critic; without one use grpo, rloo or reinforce_plus_plus")
    order, kept = to_front(mask)
    reward = zero_masked(rewards.gather(1, order), kept)
    value = zero_masked(values.gather(1, order), kept)
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1)
    delta = reward + gamma * next_value - value
    packed = zero_masked(discounted_suffix_sum(delta, gamma * lam), kept)
    advantages, returns = back_in_place(packed, order), back_in_place(packed + value, order)
    return (whiten(advantages, mask) if whiten_batch else advantages), returns


def reinforce_plus_plus(
    *, rewards: Tensor, mask: Tensor, groups: Groups, gamma: float = 1.0, whiten_batch: bool = True
) -> tuple[Tensor, Tensor]:
    """Discounted reward-to-go whitened over the batch's tokens (REINFORCE++, arXiv:2501.03262); it crosses tool output."""
    del groups
    returns = returns_to_go(rewards, mask, gamma)
    return (whiten(returns, mask) if whiten_batch else returns), returns


def remax(*, rewards: Tensor, mask: Tensor, groups: Groups, reward_baselines: Tensor) -> tuple[Tensor, Tensor]:
    """Reward-to-go minus the reward of the greedy rollout of the same task (ReMax, arXiv:2310.10505).

    Args:
        rewards: [B, T].
        mask: [B, T] bool.
        groups: unused.
        reward_baselines: [B] score of the greedy rollout.
    """
    del groups
    returns = returns_to_go(rewards, mask, 1.0)
    return returns - broadcast_to_tokens(reward_baselines.to(returns), mask), returns


ADVANTAGES: Mapping[str, Estimator] = MappingProxyType(
    {
        "gae": gae,
        "grpo": grpo,
        "grpo_passk": grpo_passk,
        "rloo": rloo,
        "reinforce_plus_plus": reinforce_plus_plus,
        "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
        "remax": remax,
        "opo": opo,
        "gpg": gpg,
        "gdpo": gdpo,
        "optimal_token_baseline": optimal_token_baseline,
        "tir_optimal_token_baseline": tir_optimal_token_baseline,
        "turn_grpo": turn_grpo,
        "turn_return": turn_return,
        "gigpo": gigpo,
    }
)

_GIVEN = {"rewards", "mask", "groups", "values"}


def advantage_parameters(name: str) -> dict[str, Any]:
    """The options and further inputs of an estimator with their defaults (``inspect.Parameter.empty`` where required).

    Raises:
        ValueError: an unknown estimator.
    """
    parameters = inspect.signature(_estimator(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _GIVEN}


def _estimator(name: str) -> Estimator:
    try:
        return ADVANTAGES[name]
    except KeyError:
        raise ValueError(f"advantage estimator {name!r} is unknown; use one of {', '.join(ADVANTAGES)}") from None


@torch.no_grad()
def compute_advantages(
    name: str,
    *,
    rewards: Tensor,
    mask: Tensor,
    groups: Labels,
    values: Tensor | None = None,
    **params: Any,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of a step's trajectories.

    Args:
        name: a key of ``ADVANTAGES``; each function's docstring has its formula, paper and parameters.
        rewards: [B, T] reward at the token that earned it.
        mask: [B, T] bool (or 0/1) tokens the policy sampled.
        groups: one label per row, equal for siblings of a task: a tensor [B] or any hashables.
        values: [B, T] of a critic; for ``gae`` only, ignored elsewhere.
        **params: options and further inputs of the estimator, see ``advantage_parameters``.

    Returns:
        advantages [B, T] and returns [B, T], detached, at least fp32, 0 where the mask is False.

    Raises:
        ValueError: unknown name, shapes that differ, an option out of range.
        TypeError: an option the estimator does not have, or an input that is missing.
    """
    function = _estimator(name)
    check_shapes(rewards=rewards, mask=mask, values=values)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    siblings = Groups.of(groups, num_rows=len(rewards), device=rewards.device)
    if function is gae:
        params["values"] = None if values is None else values.to(dtype)
    kept = as_bool(mask)
    return function(rewards=zero_masked(rewards.to(dtype), kept), mask=kept, groups=siblings, **params)
