"""Policy losses with another idea of nearness than a clipped ratio: divergence masks, covariance, quadratic, decoupled."""

from typing import Literal

import torch
from torch import Tensor

from agentrl.algorithms.correction import Bounds, is_weights
from agentrl.algorithms.kl import LOG_RATIO_LIMIT, SQUARE_LIMIT, exp_bounded
from agentrl.algorithms.masked import as_bool, check_shapes, masked_mean
from agentrl.algorithms.policy_terms import Metrics, PolicyTerms, clip_bounds
from agentrl.algorithms.ratio_losses import clipped_surrogate, dual_clip

PROBABILITY_EPSILON = 1e-8
"""Added to 1 - p in the binary KL, so that a token of probability 1 has a finite divergence."""


# ---- divergence masks: DPPO and its relatives


def _dppo(terms: PolicyTerms, inside: Tensor, clip_ratio_c: float) -> tuple[Tensor, Metrics]:
    ratio = terms.ratio.detach()
    per_token = -terms.advantages * ratio.clamp(max=clip_ratio_c) * terms.log_probs * inside.to(ratio.dtype)
    return terms.loss(per_token), {
        "pg_clipfrac": terms.share(~inside),
        "ppo_kl": terms.ppo_kl(),
        "pg_clipfrac_lower": terms.share(inside & (ratio > clip_ratio_c)),
    }


def _inside_tv(terms: PolicyTerms, low: float, high: float) -> Tensor:
    """Tokens whose probability has not moved past the bound in the direction their advantage pushes, [B, T] bool."""
    moved = terms.log_probs.detach().exp() - terms.old_log_probs.exp()
    return torch.where(terms.advantages > 0, moved <= high, moved >= -low)


def dppo_tv(
    terms: PolicyTerms,
    *,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    clip_ratio_c: float = 20.0,
) -> tuple[Tensor, Metrics]:
    """Divergence PPO, binary total variation (arXiv:2602.04879): a token is dropped when its *probability* (not its ratio)
    moved more than the threshold the way its advantage pushes; a rare token may change its ratio freely.

    ``clip_ratio*`` are probability differences. The ratio, without gradient, is truncated at ``clip_ratio_c`` (sec. 5.4
    advises a large one: 20). ``pg_clipfrac`` is the dropped share, ``pg_clipfrac_lower`` the truncated one.
    """
    low, high = clip_bounds(clip_ratio, clip_ratio_low, clip_ratio_high)
    return _dppo(terms, _inside_tv(terms, low, high), clip_ratio_c)


def dppo_kl(
    terms: PolicyTerms,
    *,
    clip_ratio: float = 0.05,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    clip_ratio_c: float = 20.0,
) -> tuple[Tensor, Metrics]:
    """Divergence PPO, binary KL (arXiv:2602.04879): as ``dppo_tv``, with the KL between the Bernoulli variables "this token or
    another" under the old and the current policy. ``clip_ratio*`` are nats.
    """
    low, high = clip_bounds(clip_ratio, clip_ratio_low, clip_ratio_high)
    log_prob, old_log_prob = terms.log_probs.detach(), terms.old_log_probs
    prob, old_prob = log_prob.exp(), old_log_prob.exp()
    rest = ((1 - old_prob + PROBABILITY_EPSILON) / (1 - prob + PROBABILITY_EPSILON)).log()
    divergence = old_prob * (old_log_prob - log_prob) + (1 - old_prob) * rest
    inside = torch.where(
        terms.advantages > 0,
        (divergence <= high) | (prob <= old_prob),
        (divergence <= low) | (prob >= old_prob),
    )
    return _dppo(terms, inside, clip_ratio_c)


def prime_rl(
    terms: PolicyTerms,
    *,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    kl_tau: float = 1e-3,
) -> tuple[Tensor, Metrics]:
    """prime-rl's default for stale data: DPPO's total-variation mask on the importance-sampled loss, plus the squared log-ratio
    of Kimi k1.5 (arXiv:2501.12599, sec. 2.3) on *every* token, dropped ones included: they are pulled back.

    ``old_log_probs`` are the rollout's own; nothing is recomputed. Differs from prime-rl: the log-ratio is clamped (±20 in
    the ratio, ±1e4 in the square), and aggregation follows ``loss_agg_mode`` (prime-rl: ``token-mean`` with the step's
    count).
    """
    low, high = clip_bounds(clip_ratio, clip_ratio_low, clip_ratio_high)
    inside = _inside_tv(terms, low, high)
    log_ratio = terms.log_ratio
    surrogate = torch.where(inside, -terms.advantages * terms.ratio, torch.zeros_like(log_ratio))
    pull = kl_tau * log_ratio.clamp(-SQUARE_LIMIT, SQUARE_LIMIT).square()
    bounded = terms.bounded_log_ratio.detach()
    return terms.loss(surrogate + pull), {
        "pg_clipfrac": terms.share(~inside & (terms.advantages > 0)),
        "ppo_kl": terms.ppo_kl(),
        "pg_clipfrac_lower": terms.share(~inside & (terms.advantages <= 0)),
        "mismatch_kl": terms.reduce.metric(bounded.exp() - bounded - 1, terms.mask),
    }


# ---- covariance: keep entropy by treating the few tokens that destroy it


def token_covariance(advantages: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    """(advantage - mean) * (log_prob - mean) per token over the whole tensor, [B, T], detached (arXiv:2505.22617, sec. 4)."""
    advantages, log_probs = advantages.detach(), log_probs.detach()
    return (advantages - masked_mean(advantages, mask)) * (log_probs - masked_mean(log_probs, mask))


def top_covariance_mask(covariance: Tensor, mask: Tensor, *, share: float) -> Tensor:
    """The ``share`` of sampled tokens with the largest covariance, at least one, [B, T] bool."""
    candidates = as_bool(mask)
    count = int(candidates.sum())
    chosen = torch.zeros_like(candidates).flatten()
    if count:
        ranked = covariance.masked_fill(~candidates, -torch.inf).flatten()
        chosen[ranked.topk(min(max(1, int(count * share)), count)).indices] = True
    return chosen.view_as(candidates)


def random_covariance_mask(
    covariance: Tensor,
    candidates: Tensor,
    *,
    count: int,
    lower: float,
    upper: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """At most ``count`` of the candidates with covariance in (lower, upper), at random, [B, T] bool."""
    eligible = (candidates & (covariance > lower) & (covariance < upper)).flatten().nonzero(as_tuple=True)[0]
    order = torch.randperm(len(eligible), generator=generator)[:count].to(eligible.device)
    chosen = torch.zeros_like(candidates).flatten()
    chosen[eligible[order]] = True
    return chosen.view_as(candidates)


def clip_cov(
    terms: PolicyTerms,
    *,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    clip_cov_ratio: float = 2e-4,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    covariance_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Metrics]:
    """Clip-Cov (arXiv:2505.22617, sec. 4): the clipped surrogate without a random few of the tokens whose covariance of
    advantage and logprob lies in (lb, ub): those collapse the entropy.

    The choice looks at the whole tensor. To keep the loss independent of the cut into micro-batches, choose once over
    the step (``token_covariance``, ``random_covariance_mask``) and pass ``covariance_mask`` [B, T]. ``pg_clipfrac`` is the
    dropped share.
    """
    if clip_cov_ratio <= 0:
        raise ValueError(f"clip_cov_ratio={clip_cov_ratio:g} must be positive")
    low, high = clip_bounds(clip_ratio, clip_ratio_low, clip_ratio_high)
    per_token, clipped = clipped_surrogate(terms.ratio, terms.advantages, low, high)
    if covariance_mask is None:
        covariance = token_covariance(terms.advantages, terms.log_probs, terms.mask)
        count = max(int(clip_cov_ratio * int(terms.mask.sum())), 1)
        covariance_mask = random_covariance_mask(
            covariance, terms.mask & ~clipped, count=count, lower=clip_cov_lb, upper=clip_cov_ub, generator=generator
        )
    else:
        covariance_mask = terms.constant(covariance_mask, "covariance_mask") != 0
    return terms.loss(torch.where(covariance_mask, torch.zeros_like(per_token), per_token)), {
        "pg_clipfrac": terms.share(covariance_mask),
        "ppo_kl": terms.ppo_kl(),
    }


def kl_cov(
    terms: PolicyTerms,
    *,
    kl_cov_ratio: float = 2e-4,
    ppo_kl_coef: float = 1.0,
    covariance_mask: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """KL-Cov (arXiv:2505.22617, sec. 4): the unclipped surrogate, plus |log-ratio| on the share of tokens whose advantage
    and logprob covary most.

    The choice looks at the whole tensor; see ``clip_cov`` for ``covariance_mask`` (``top_covariance_mask``). ``ppo_kl`` is
    the mean |log-ratio|, as in the reference.
    """
    if kl_cov_ratio <= 0:
        raise ValueError(f"kl_cov_ratio={kl_cov_ratio:g} must be positive")
    if covariance_mask is None:
        covariance = token_covariance(terms.advantages, terms.log_probs, terms.mask)
        covariance_mask = top_covariance_mask(covariance, terms.mask, share=kl_cov_ratio)
    else:
        covariance_mask = terms.constant(covariance_mask, "covariance_mask") != 0
    distance = terms.bounded_log_ratio.abs()
    per_token = -terms.advantages * terms.ratio + ppo_kl_coef * distance * covariance_mask.to(distance.dtype)
    return terms.loss(per_token), {"ppo_kl": terms.reduce.metric(distance, terms.mask)}


# ---- quadratic and plain off-policy


def dro(terms: PolicyTerms, *, dro_beta: float) -> tuple[Tensor, Metrics]:
    """Direct reward optimisation's quadratic (arXiv:2405.19107, sec. 3), as the reference has it:
    -(advantage * log_prob - beta/2 * log-ratio²), the advantage standing for reward minus value. Its gradient is that of
    the paper's square (advantage - beta * log-ratio)² / (2 beta).
    """
    if dro_beta <= 0:
        raise ValueError(f"dro_beta={dro_beta:g} must be positive; it is the weight of the pull to the old policy")
    log_ratio = terms.log_ratio
    square = log_ratio.clamp(-SQUARE_LIMIT, SQUARE_LIMIT).square()
    return terms.loss(-(terms.log_probs * terms.advantages - 0.5 * dro_beta * square)), {
        "ppo_kl": terms.reduce.metric(-log_ratio, terms.mask)
    }


def reinforce(
    terms: PolicyTerms,
    *,
    is_level: Literal["token", "sequence"] | None = None,
    is_threshold: Bounds = 2.0,
    is_batch_mean: float | None = None,
) -> tuple[Tensor, Metrics]:
    """REINFORCE, corrected for the sampler: -sg(w) * advantage * log_prob with w from current / ``old_log_probs``, which here are
    the rollout's ("bypass": two policies, no clipping). ``is_level`` None: no weight besides ``rollout_is_weights``.

    ``is_batch_mean`` normalises: the weights are divided by it. It is the step's, measured once before its first update
    (``correction.mean_weight``), so that the loss does not depend on the cut into micro-batches.
    """
    per_token = -terms.advantages * terms.log_probs
    metrics = {"ppo_kl": terms.ppo_kl()}
    if is_level is not None:
        weights = is_weights(
            terms.log_ratio,
            terms.mask,
            level=is_level,
            threshold=is_threshold,
            batch_normalize=is_batch_mean is not None,
            batch_mean=is_batch_mean,
        )
        per_token = per_token * weights
        metrics["is_weight_mean"] = terms.reduce.metric(weights, terms.mask)
    return terms.loss(per_token), metrics


# ---- decoupled PPO: trust region around a proximal policy, data from a behaviour policy


def loglinear_proximal(
    log_probs: Tensor,
    behavior_log_probs: Tensor,
    versions: Tensor,
    *,
    proximal_version: int,
    current_version: int | None = None,
) -> Tensor:
    """The proximal policy's logprobs without a forward pass, [B, T], detached (AReaL's log-linear approximation).

    log prox = log behaviour + a (log current - log behaviour), a = (v_prox - v_behaviour) / (v_current - v_behaviour): weights
    are assumed to have moved evenly between versions. A token sampled by the proximal version itself has a = 0, so that
    staleness 0 is exact.

    Args:
        log_probs: [B, T] of the current policy.
        behavior_log_probs: [B, T] as the server reported.
        versions: [B, T] integer version that sampled each token.
        proximal_version: version at the start of this step.
        current_version: version that is being made; None: ``proximal_version + 1``.
    """
    check_shapes(log_probs=log_probs, behavior_log_probs=behavior_log_probs, versions=versions)
    current_version = proximal_version + 1 if current_version is None else current_version
    dtype = log_probs.dtype
    reach = (current_version - versions).clamp(min=1).to(dtype)
    share = ((proximal_version - versions).to(dtype) / reach).clamp(0, 1)
    return torch.lerp(behavior_log_probs.detach(), log_probs.detach(), share)


def decoupled_ppo(
    terms: PolicyTerms,
    *,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    clip_ratio_c: float | None = None,
    proximal_log_probs: Tensor | None = None,
    versions: Tensor | None = None,
    proximal_version: int | None = None,
    behav_weight_cap: float | None = None,
    behav_cap_mode: Literal["mask", "truncate"] = "mask",
) -> tuple[Tensor, Metrics]:
    """Decoupled PPO (Hilton et al., arXiv:2110.00641, sec. 3; AReaL, arXiv:2505.24298, sec. 5): the clip is around a recent
    *proximal* policy, the data come from an older *behaviour* policy, and sg(prox / behaviour) corrects for the difference.

    ``old_log_probs`` are the behaviour's, as the server reported. The proximal logprobs are given (recomputed at the start of
    the step), or approximated from ``versions`` [B, T] and ``proximal_version`` (``loglinear_proximal``), or, with neither,
    the current ones without gradient (one update per batch: the ratio is 1).

    Args:
        terms: the common inputs.
        clip_ratio: half-width of the clip; ``_low`` and ``_high`` override a side.
        clip_ratio_c: dual-clip bound; None: none.
        proximal_log_probs: [B, T].
        versions: [B, T] integer, per-token policy version.
        proximal_version: version at the start of the step; required with ``versions``.
        behav_weight_cap: cap of prox / behaviour; None: none.
        behav_cap_mode: ``mask`` drops capped tokens (AReaL), ``truncate`` keeps them at the cap (TIS).
    """
    if behav_cap_mode not in ("mask", "truncate"):
        raise ValueError(f"behav_cap_mode={behav_cap_mode!r} is unknown; use 'mask' or 'truncate'")
    if proximal_log_probs is not None:
        proximal = terms.constant(proximal_log_probs, "proximal_log_probs")
    elif versions is not None:
        if proximal_version is None:
            raise ValueError("versions are given but not proximal_version; pass the version at the start of the step")
        proximal = loglinear_proximal(
            terms.log_probs, terms.old_log_probs, versions.where(terms.mask, proximal_version), proximal_version=proximal_version
        )
    else:
        proximal = terms.log_probs.detach()
    low, high = clip_bounds(clip_ratio, clip_ratio_low, clip_ratio_high)
    per_token, clipped = clipped_surrogate(exp_bounded(terms.log_probs - proximal), terms.advantages, low, high)
    lower = torch.zeros_like(clipped)
    if clip_ratio_c is not None:
        per_token, lower = dual_clip(per_token, terms.advantages, clip_ratio_c)
    behavior_gap = proximal - terms.old_log_probs
    weight = exp_bounded(behavior_gap)
    over = torch.zeros_like(clipped) if behav_weight_cap is None else weight > behav_weight_cap
    if behav_weight_cap is not None:
        weight = torch.where(over, 0.0 if behav_cap_mode == "mask" else behav_weight_cap, weight)
    moved = (terms.log_probs - proximal).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return terms.loss(per_token * weight), {
        "pg_clipfrac": terms.share(clipped),
        "ppo_kl": terms.reduce.metric(-moved, terms.mask),
        "pg_clipfrac_lower": terms.share(lower),
        "behav_kl": terms.reduce.metric(-behavior_gap, terms.mask),
        "behav_weight_mean": terms.reduce.metric(weight, terms.mask),
        "behav_capped_fraction": terms.share(over),
    }
