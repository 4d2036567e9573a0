"""Policy, value and entropy losses by name.

A loss takes padded rows [B, T] (logprobs are small; ``masked.pad_rows`` unpacks a packed stream) and the mask of tokens to
train on. Values under a False mask are ignored, whatever they are. With ``num_tokens`` and ``num_sequences`` of the whole step,
micro-batch losses, gradients and metrics *sum* to those of the whole batch (see ``aggregation``).
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from agentrl.algorithms import ratio_losses, trust_region_losses
from agentrl.algorithms.aggregation import LOSS_AGG_MODES, Reduction, aggregate
from agentrl.algorithms.masked import check_shapes, zero_masked
from agentrl.algorithms.policy_terms import Metrics, PolicyTerms

PolicyLoss: TypeAlias = Callable[..., tuple[Tensor, Metrics]]

POLICY_LOSSES: Mapping[str, PolicyLoss] = MappingProxyType(
    {
        "ppo": ratio_losses.ppo,
        "gspo": ratio_losses.gspo,
        "cispo": ratio_losses.cispo,
        "sapo": ratio_losses.sapo,
        "geo_mean": ratio_losses.geo_mean,
        "gpg": ratio_losses.gpg,
        "clip_cov": trust_region_losses.clip_cov,
        "kl_cov": trust_region_losses.kl_cov,
        "dro": trust_region_losses.dro,
        "dppo_tv": trust_region_losses.dppo_tv,
        "dppo_kl": trust_region_losses.dppo_kl,
        "prime_rl": trust_region_losses.prime_rl,
        "reinforce": trust_region_losses.reinforce,
        "decoupled_ppo": trust_region_losses.decoupled_ppo,
    }
)

NEEDS_WHOLE_BATCH: frozenset[str] = frozenset({"clip_cov", "kl_cov"})
"""Losses that choose tokens by comparing all of them: split-invariant only with ``covariance_mask``."""


def policy_loss_parameters(name: str) -> dict[str, Any]:
    """The options of a loss and their defaults (``inspect.Parameter.empty`` where required); for checking a configuration.

    Raises:
        ValueError: an unknown loss.
    """
    parameters = inspect.signature(_policy_loss(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _policy_loss(name: str) -> PolicyLoss:
    try:
        return POLICY_LOSSES[name]
    except KeyError:
        raise ValueError(f"policy loss {name!r} is unknown; use one of {', '.join(POLICY_LOSSES)}") from None


def policy_loss(
    name: str,
    *,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss_agg_mode: str,
    rollout_is_weights: Tensor | None = None,
    num_tokens: int | None = None,
    num_sequences: int | None = None,
    horizon: int | None = None,
    **params: Any,
) -> tuple[Tensor, Metrics]:
    """The policy-gradient loss ``name`` and what to log of it.

    Args:
        name: a key of ``POLICY_LOSSES``; each function's docstring has its formula, paper and parameters.
        log_probs: [B, T] of the current policy; the only input that receives gradient. Half precision is widened to fp32.
        old_log_probs: [B, T] of the policy the ratio is anchored at.
        advantages: [B, T].
        mask: [B, T] bool (or 0/1) tokens to train on.
        loss_agg_mode: one of ``aggregation.LOSS_AGG_MODES`` (``sapo`` and ``geo_mean`` aggregate as their papers do).
        rollout_is_weights: [B, T] importance weights rollout -> old; a constant factor per token.
        num_tokens: True mask entries over all micro-batches and ranks of the step; None: of this call.
        num_sequences: rows with a True mask entry over the whole step; None: of this call.
        horizon: constant length of ``seq-mean-token-sum-norm``; None: T.
        **params: options of the loss, see ``policy_loss_parameters``.

    Returns:
        The loss [] and metrics, detached [] tensors on the loss's device (no synchronisation): ``pg_clipfrac`` and
        ``pg_clipfrac_lower`` shares of tokens, ``ppo_kl`` the mean log old - log current, and what a loss adds. With
        ``num_tokens`` given, metrics are parts too: sum them over micro-batches.

    Raises:
        ValueError: unknown name or mode, shapes that differ, an option out of range.
        TypeError: an option the loss does not have, or one that is missing.
    """
    function = _policy_loss(name)
    reduction = Reduction(mode=loss_agg_mode, num_tokens=num_tokens, num_sequences=num_sequences, horizon=horizon)
    terms = PolicyTerms.clean(
        log_probs=log_probs,
        old_log_probs=old_log_probs,
        advantages=advantages,
        mask=mask,
        weights=rollout_is_weights,
        reduce=reduction,
    )
    return function(terms, **params)


def value_loss(
    *,
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    mask: Tensor,
    cliprange_value: float | None,
    loss_agg_mode: str,
    num_tokens: int | None = None,
    num_sequences: int | None = None,
    horizon: int | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped value loss, max((v - R)², (clip(v, v_old ± range) - R)²) / 2 (arXiv:2005.12729, sec. 3; Schulman's code).

    Args:
        vpreds: [B, T] of the current critic; carries grad.
        returns: [B, T] targets.
        values: [B, T] of the critic before the step.
        mask: [B, T].
        cliprange_value: half-width of the clip; None: plain squared error.
        loss_agg_mode: as in ``policy_loss``, with ``num_tokens``, ``num_sequences`` and ``horizon``.

    Returns:
        The loss [] and the share of tokens where the clipped error was the larger one, detached [].
    """
    check_shapes(vpreds=vpreds, returns=returns, values=values, mask=mask)
    reduction = Reduction(mode=loss_agg_mode, num_tokens=num_tokens, num_sequences=num_sequences, horizon=horizon)
    vpreds = zero_masked(vpreds, mask).to(torch.promote_types(vpreds.dtype, torch.float32))
    returns = zero_masked(returns.detach(), mask)
    values = zero_masked(values.detach(), mask)
    error = (vpreds - returns).square()
    if cliprange_value is None:
        return 0.5 * reduction.loss(error, mask), error.new_zeros(())
    near = torch.maximum(torch.minimum(vpreds, values + cliprange_value), values - cliprange_value)
    clipped_error = (near - returns).square()
    loss = 0.5 * reduction.loss(torch.maximum(error, clipped_error), mask)
    return loss, reduction.metric((clipped_error > error).to(error.dtype), mask)


def entropy_bonus(
    entropy: Tensor,
    mask: Tensor,
    *,
    coefficient: float,
    loss_agg_mode: str,
    num_tokens: int | None = None,
    num_sequences: int | None = None,
    horizon: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The term to add to the loss, ``-coefficient * aggregated entropy`` (arXiv:1707.06347, eq. 9), and the mean entropy.

    Args:
        entropy: [B, T] nats per token; carries grad where the coefficient is not 0.
        mask: [B, T].
        coefficient: weight; positive keeps the policy spread out.
        loss_agg_mode: as in ``policy_loss``, with ``num_tokens``, ``num_sequences`` and ``horizon``.

    Returns:
        The term [] and the aggregated entropy, detached [].
    """
    check_shapes(entropy=entropy, mask=mask)
    mean = aggregate(
        entropy,
        mask,
        loss_agg_mode=loss_agg_mode,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        horizon=horizon,
    )
    return -coefficient * mean, mean.detach()


__all__ = [
    "LOSS_AGG_MODES",
    "NEEDS_WHOLE_BATCH",
    "POLICY_LOSSES",
    "aggregate",
    "entropy_bonus",
    "policy_loss",
    "policy_loss_parameters",
    "value_loss",
]
