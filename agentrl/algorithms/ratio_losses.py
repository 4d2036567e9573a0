"""Policy losses on the ratio current / old: clipped, gated, or with the ratio's gradient stopped."""

import torch
from torch import Tensor

from agentrl.algorithms.kl import LOG_RATIO_LIMIT
from agentrl.algorithms.masked import masked_mean
from agentrl.algorithms.policy_terms import Metrics, PolicyTerms, clip_bounds

GSPO_LOG_RATIO_LIMIT = 10.0
"""GSPO's sequence log-ratio is a mean per token; clamped from above at 10, the reference's bound."""

GEO_MEAN_WEIGHT_EPSILON = 1e-10
"""Added to importance weights before their logarithm, so that a weight of zero (IcePop) zeroes the row without -inf."""


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic loss per token and where clipping made it the larger one, both [B, T]."""
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(free, clipped), clipped > free


def dual_clip(per_token: Tensor, advantages: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Cap the loss of bad actions at ``-bound * advantage``; also where the cap acted, both [B, T]."""
    if bound <= 1:
        raise ValueError(f"clip_ratio_c={bound:g} must exceed 1, or it would cap on-policy tokens; 3 is usual")
    cap = -advantages * bound
    capped = (advantages < 0) & (per_token > cap)
    return torch.where(advantages < 0, torch.minimum(cap, per_token), per_token), capped


def ppo(
    terms: PolicyTerms,
    *,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    clip_ratio_c: float | None = 3.0,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7), DAPO's separate bounds (arXiv:2503.14476, eq. 10), dual clip
    (arXiv:1912.09729, sec. "dual-clip PPO").

    ``clip_ratio_c`` bounds the loss of a token with negative advantage whose ratio exploded (None: no dual clip).
    Differs from the papers: the log-ratio is clamped to ±20 before ``exp``.
    """
    low, high = clip_bounds(clip_ratio, clip_ratio_low, clip_ratio_high)
    per_token, clipped = clipped_surrogate(terms.ratio, terms.advantages, low, high)
    capped = torch.zeros_like(clipped)
    if clip_ratio_c is not None:
        per_token, capped = dual_clip(per_token, terms.advantages, clip_ratio_c)
    return terms.loss(per_token), {
        "pg_clipfrac": terms.share(clipped),
        "ppo_kl": terms.ppo_kl(),
        "pg_clipfrac_lower": terms.share(capped),
    }


def gspo(
    terms: PolicyTerms,
    *,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Group sequence policy optimisation, token form (arXiv:2507.18071, sec. 4.3): the ratio is the sequence's geometric mean,
    its gradient each token's own. The paper's bounds are 3e-4 and 4e-4 and its aggregation ``seq-mean-token-mean``;
    here, as in the reference, ``loss_agg_mode`` is obeyed.
    """
    low, high = clip_bounds(clip_ratio, clip_ratio_low, clip_ratio_high)
    of_sequence = masked_mean(terms.log_ratio.detach(), terms.mask, dim=-1).unsqueeze(-1)
    log_ratio = terms.log_probs - terms.log_probs.detach() + of_sequence
    ratio = log_ratio.clamp(max=GSPO_LOG_RATIO_LIMIT).exp()
    per_token, clipped = clipped_surrogate(ratio, terms.advantages, low, high)
    return terms.loss(per_token), {
        "pg_clipfrac": terms.share(clipped),
        "ppo_kl": terms.reduce.metric(-terms.log_ratio, terms.mask),
        "pg_clipfrac_lower": terms.zero(),
    }


def cispo(
    terms: PolicyTerms,
    *,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4-5): REINFORCE weighted by the clipped ratio without its gradient, so that no
    token is silenced. The paper clips only above: ``clip_ratio_low=1.0`` gives that.
    """
    low, high = clip_bounds(clip_ratio, clip_ratio_low, clip_ratio_high)
    ratio = terms.ratio.detach()
    clipped = ratio.clamp(1 - low, 1 + high)
    return terms.loss(-clipped * terms.advantages * terms.log_probs), {
        "pg_clipfrac": terms.share(ratio != clipped),
        "ppo_kl": terms.ppo_kl(),
        "pg_clipfrac_lower": terms.zero(),
    }


def sapo(
    terms: PolicyTerms, *, tau_pos: float = 1.0, tau_neg: float = 1.05, obey_loss_agg_mode: bool = False
) -> tuple[Tensor, Metrics]:
    """Soft adaptive policy optimisation (arXiv:2511.20347): a sigmoid gate 4/tau * s(tau (ratio - 1)) in place of the clip.

    Its slope is 1 at ratio 1 and fades on both sides, faster (``tau_neg``) where the advantage is not positive. The
    paper aggregates by ``seq-mean-token-mean``, and so does this whatever ``loss_agg_mode`` says, as the reference does;
    ``obey_loss_agg_mode`` changes that.
    """
    tau = torch.where(terms.advantages > 0, tau_pos, tau_neg).to(terms.log_probs.dtype)
    gate = torch.sigmoid(tau * (terms.ratio - 1)) * (4 / tau)
    per_token = -gate * terms.advantages
    if terms.weights is not None:
        per_token = per_token * terms.weights
    reduce = terms.reduce if obey_loss_agg_mode else terms.reduce.with_mode("seq-mean-token-mean")
    return reduce.loss(per_token, terms.mask), {
        "pg_clipfrac": terms.zero(),
        "ppo_kl": terms.ppo_kl(),
        "pg_clipfrac_lower": terms.zero(),
    }


def geo_mean(
    terms: PolicyTerms,
    *,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Geometric-mean policy optimisation (GMPO, arXiv:2507.20673, sec. 3): one ratio per sequence, the geometric mean of token
    ratios clipped pessimistically in log space at [-low, high].

    The loss is a mean over rows; ``loss_agg_mode`` does not apply. Without ``num_sequences`` fully masked rows count in
    its divisor, as in the reference. Advantages are averaged per row: give one value per sequence.
    ``pg_clipfrac`` and ``pg_clipfrac_lower`` count clipped tokens with positive and negative advantage.
    """
    low, high = clip_bounds(clip_ratio, clip_ratio_low, clip_ratio_high)
    log_ratio = terms.log_ratio
    clamped = log_ratio.clamp(-low, high)
    sign = terms.advantages.sign()
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * clamped)
    ratio = masked_mean(pessimistic, terms.mask, dim=-1).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    per_row = -masked_mean(terms.advantages, terms.mask, dim=-1) * ratio
    if terms.weights is not None:
        per_row = per_row * masked_mean((terms.weights + GEO_MEAN_WEIGHT_EPSILON).log(), terms.mask, dim=-1).exp()
    num_rows = len(per_row) if terms.reduce.num_sequences is None else max(terms.reduce.num_sequences, 1)
    clipped = log_ratio != clamped
    return per_row.sum() / num_rows, {
        "pg_clipfrac": terms.share(clipped & (terms.advantages > 0)),
        "ppo_kl": terms.reduce.metric(-log_ratio, terms.mask),
        "pg_clipfrac_lower": terms.share(clipped & (terms.advantages < 0)),
    }


def gpg(terms: PolicyTerms) -> tuple[Tensor, Metrics]:
    """Group policy gradient (arXiv:2504.02546): plain REINFORCE, -advantage * log_prob. ``old_log_probs`` does not enter."""
    return terms.loss(-terms.log_probs * terms.advantages), {}
