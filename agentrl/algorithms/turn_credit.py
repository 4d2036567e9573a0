"""Credit per turn: when rewards come at several turns of a rollout, a token should answer for its own turn and later ones.

``turn_ids`` [B, T] number the policy's turns of a row 0, 1, …; a token's reward counts for the turn it lies in. Values
under a False mask are ignored.
"""

import torch
from torch import Tensor

from agentrl.algorithms.grouping import Groups
from agentrl.algorithms.masked import discounted_suffix_sum, zero_masked

STD_EPSILON = 1e-6
"""Added to a group's standard deviation, the reference's value."""


def _per_turn(rewards: Tensor, mask: Tensor, turn_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards [B, K] float64, whether the row has that turn [B, K], turn of each token [B, T] with 0 where masked)."""
    if turn_ids.shape != mask.shape:
        raise ValueError(f"turn_ids {list(turn_ids.shape)} must be shaped like the mask {list(mask.shape)}")
    turns = zero_masked(turn_ids.to(torch.long), mask)
    if bool((turns < 0).any()):
        raise ValueError("turn_ids must be 0 or more on every sampled token")
    num_turns = int(turns.max()) + 1 if turns.numel() else 1
    shape = (len(turns), num_turns)
    sums = rewards.new_zeros(shape, dtype=torch.float64).scatter_add(1, turns, zero_masked(rewards, mask).double())
    present = rewards.new_zeros(shape).scatter_add(1, turns, mask.to(rewards.dtype)) > 0
    return sums, present, turns


def _standardise(values: Tensor, present: Tensor, groups: Groups, *, normalize_by_std: bool, epsilon: float) -> Tensor:
    """Against the siblings that have this column, [B, K]; 0 with fewer than two of them."""
    there = present.to(values.dtype)
    count = groups.sum(there)
    mean = (groups.sum(values * there) / count.clamp(min=1))[groups.ids]
    centered = zero_masked(values - mean, present)
    if normalize_by_std:
        variance = groups.sum(centered.square()) / (count - 1).clamp(min=1)
        centered = centered / (variance.sqrt()[groups.ids] + epsilon)
    return zero_masked(centered, (count > 1)[groups.ids])


def _to_tokens(per_turn: Tensor, turns: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    return zero_masked(per_turn.gather(1, turns).to(dtype), mask)


def turn_grpo(
    *,
    rewards: Tensor,
    mask: Tensor,
    groups: Groups,
    turn_ids: Tensor,
    turn_lambda: float = 1.0,
    normalize_by_std: bool = True,
    epsilon: float = STD_EPSILON,
) -> tuple[Tensor, Tensor]:
    """MT-GRPO (arXiv:2505.11821): each turn's reward is standardised among the siblings *at that turn*; a token gets its own
    turn's value plus later turns', each further one times ``turn_lambda``.

    With two turns that is the paper's A_1 = A_turn + lambda A_outcome and A_2 = A_outcome. Differs: any number of turns,
    and a turn that only one sibling reached carries no signal of its own.

    Returns:
        Advantages, and the turn's undiscounted reward-to-go, [B, T].
    """
    per_turn, present, turns = _per_turn(rewards, mask, turn_ids)
    standardised = _standardise(per_turn, present, groups, normalize_by_std=normalize_by_std, epsilon=epsilon)
    advantages = discounted_suffix_sum(standardised, turn_lambda)
    return _to_tokens(advantages, turns, mask, rewards.dtype), _to_tokens(
        discounted_suffix_sum(per_turn, 1.0), turns, mask, rewards.dtype
    )


def turn_return(
    *,
    rewards: Tensor,
    mask: Tensor,
    groups: Groups,
    turn_ids: Tensor,
    gamma: float = 1.0,
    normalize_by_std: bool = True,
    epsilon: float = STD_EPSILON,
) -> tuple[Tensor, Tensor]:
    """GTPO (arXiv:2511.14846): the discounted reward-to-go per *turn*, standardised among the siblings at that turn.

    With a reward only at the end and gamma 1 every sibling that reaches a turn is compared by outcome, as in GRPO.

    Returns:
        Advantages and the discounted turn returns, [B, T].
    """
    per_turn, present, turns = _per_turn(rewards, mask, turn_ids)
    to_go = discounted_suffix_sum(per_turn, gamma)
    advantages = _standardise(to_go, present, groups, normalize_by_std=normalize_by_std, epsilon=epsilon)
    return _to_tokens(advantages, turns, mask, rewards.dtype), _to_tokens(to_go, turns, mask, rewards.dtype)


def gigpo(
    *,
    rewards: Tensor,
    mask: Tensor,
    groups: Groups,
    turn_ids: Tensor,
    anchor_ids: Tensor,
    step_weight: float = 1.0,
    gamma: float = 0.95,
    normalize_by_std: bool = True,
    epsilon: float = STD_EPSILON,
) -> tuple[Tensor, Tensor]:
    """Group-in-group policy optimisation (arXiv:2505.10978, sec. 4): A = A_episode + ``step_weight`` * A_step.

    A_episode compares whole rollouts (GRPO). A_step compares the discounted turn returns of turns that began in the same
    environment state, anywhere in the group. A state seen once, or a group of one, gives no step signal.

    Args:
        rewards: [B, T].
        mask: [B, T] bool.
        groups: siblings.
        turn_ids: [B, T].
        anchor_ids: [B, T] integer name of the state in which the token's turn began (a hash of the observation); read at
            the turn's first sampled token, compared within a group.
        step_weight: omega of the paper.
        gamma: discount per turn.
        normalize_by_std: divide by standard deviations; False centres only.
        epsilon: added to them.

    Returns:
        Advantages and the discounted turn returns, [B, T].
    """
    if anchor_ids.shape != mask.shape:
        raise ValueError(f"anchor_ids {list(anchor_ids.shape)} must be shaped like the mask {list(mask.shape)}")
    per_turn, present, turns = _per_turn(rewards, mask, turn_ids)
    scores = per_turn.sum(dim=1, keepdim=True)
    everyone = torch.ones_like(scores, dtype=torch.bool)
    episode = _standardise(scores, everyone, groups, normalize_by_std=normalize_by_std, epsilon=epsilon)

    to_go = discounted_suffix_sum(per_turn, gamma)
    rows, columns = present.nonzero(as_tuple=True)
    width = mask.shape[1]
    position = torch.where(mask, torch.arange(width, device=mask.device), width - 1).expand(mask.shape)
    first = torch.full_like(present, width - 1, dtype=torch.long).scatter_reduce(1, turns, position, "amin")
    anchors = anchor_ids.to(torch.long).gather(1, first)[rows, columns]
    states = torch.unique(torch.stack([groups.ids[rows], anchors]), dim=1, return_inverse=True)[1]
    same_state = Groups(states, torch.bincount(states))
    flat = to_go[rows, columns].unsqueeze(1)
    compared = _standardise(
        flat, torch.ones_like(flat, dtype=torch.bool), same_state, normalize_by_std=normalize_by_std, epsilon=epsilon
    )
    step = torch.zeros_like(to_go).index_put((rows, columns), compared[:, 0])
    return _to_tokens(episode + step_weight * step, turns, mask, rewards.dtype), _to_tokens(to_go, turns, mask, rewards.dtype)
