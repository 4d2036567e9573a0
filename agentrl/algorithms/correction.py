"""The rollout policy is not the trained one: weights, rejection and measures of the gap.

Three policies: *rollout* (what the server sampled with: older weights, other kernels), *old* (the trainer's own logprobs of
the same tokens, the anchor of PPO's ratio) and the current one. ``log_ratio`` is log old - log rollout (decoupled), or log
current - log rollout (bypass). Importance weights (TIS, IcePop) scale the loss; rejection removes tokens or sequences
from the mask. Both are constants to the gradient.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from agentrl.algorithms.kl import LOG_RATIO_LIMIT, exp_bounded, half_square
from agentrl.algorithms.masked import as_bool, check_shapes, masked_max, masked_mean, masked_sum, zero_masked

Bounds: TypeAlias = float | str | tuple[float, float]
"""``2.0``, ``"2.0"``, ``"0.5_5.0"`` or ``(0.5, 5.0)``."""

Metrics: TypeAlias = dict[str, Tensor]
"""Name -> detached [] tensor."""

LOG_PPL_LIMIT = 80.0
"""Mean negative logprobs are clamped to 80 before ``exp``: e^80 = 5.5e34 is still an fp32 number after a sum over rows."""

RULES: tuple[str, ...] = (
    *("token_k1", "token_k2", "token_k3"),
    *("seq_sum_k1", "seq_sum_k2", "seq_sum_k3"),
    *("seq_mean_k1", "seq_mean_k2", "seq_mean_k3"),
    *("seq_max_k2", "seq_max_k3"),
)


def parse_bounds(spec: Bounds) -> tuple[float | None, float]:
    """(lower or None, upper) of a threshold.

    Raises:
        ValueError: not a number or a pair, a bound that is not positive, or lower > upper.
    """
    try:
        if isinstance(spec, str):
            parts = [float(part) for part in spec.split("_")]
        elif isinstance(spec, tuple | list):
            parts = [float(part) for part in spec]
        else:
            parts = [float(spec)]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2):
        raise ValueError(f"threshold {spec!r} is neither a number nor a pair; write 2.0, '0.5_5.0' or (0.5, 5.0)")
    lower, upper = (None, parts[0]) if len(parts) == 1 else (parts[0], parts[1])
    if not upper > 0 or (lower is not None and not 0 < lower <= upper):
        raise ValueError(f"threshold {spec!r} must have 0 < lower <= upper: bounds are ratios or divergences")
    return lower, upper


def _raw_weights(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """Unbounded weights, [B, T], 0 where the mask is False; ``log_ratio`` is 0 there already."""
    if level == "token":
        return zero_masked(exp_bounded(log_ratio), mask)
    if level == "sequence":
        return zero_masked(exp_bounded(log_ratio.sum(dim=-1, keepdim=True)).expand(mask.shape), mask)
    raise ValueError(f"importance level {level!r} is unknown; use 'token' or 'sequence'")


def _bounded_weights(raw: Tensor, threshold: Bounds) -> Tensor:
    lower, upper = parse_bounds(threshold)
    if lower is None:
        return raw.clamp(max=upper)
    return torch.where((raw >= lower) & (raw <= upper), raw, torch.zeros_like(raw))


def is_weights(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    level: str,
    threshold: Bounds,
    batch_normalize: bool,
    batch_mean: float | Tensor | None = None,
) -> Tensor:
    """Importance weights rollout -> trained policy, [B, T], detached, 0 where the mask is False.

    ``level="token"``: exp(log_ratio_t), low variance, biased. ``"sequence"``: exp(sum_t log_ratio_t) on every token of
    the row, unbiased, high variance. A single threshold C truncates, min(w, C): TIS (Ionides 2008; Yao et al., "Your
    efficient RL framework secretly brings you off-policy RL training", 2025; V-trace's rho-bar, arXiv:1802.01561).
    Two thresholds zero what lies outside: IcePop (arXiv:2510.18855, double-sided masking).

    Args:
        log_ratio: [B, T] log trained - log rollout.
        mask: [B, T].
        level: ``token`` or ``sequence``.
        threshold: C, or (lower, upper).
        batch_normalize: divide by the mean weight (over tokens, or over non-empty rows at sequence level), so that the
            loss keeps its scale. A self-normalised estimate: biased, consistent.
        batch_mean: that mean over the whole step, for a batch that is cut into micro-batches; None takes this tensor's.

    Raises:
        ValueError: unknown level, bad threshold, or shapes that differ.
    """
    check_shapes(log_ratio=log_ratio, mask=mask)
    raw = _raw_weights(zero_masked(log_ratio.detach(), mask), mask, level)
    weights = _bounded_weights(raw, threshold)
    if not batch_normalize:
        return weights
    mean = mean_weight(weights, mask, level=level) if batch_mean is None else torch.as_tensor(batch_mean).to(weights)
    return torch.where(mean > torch.finfo(torch.float32).tiny, weights / mean, weights)


def mean_weight(weights: Tensor, mask: Tensor, *, level: str) -> Tensor:
    """What ``batch_normalize`` divides by, []: the mean over tokens, or over the non-empty rows' means."""
    if level == "token":
        return masked_mean(weights, mask)
    return masked_mean(masked_mean(weights, mask, dim=-1), as_bool(mask).any(dim=-1))


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """Kish's effective share of the tokens, [] in (0, 1]: (mean w)² / mean w²; 0 when all weights are 0."""
    mean_square = masked_mean(weights.square(), mask)
    return masked_mean(weights, mask).square() / mean_square.clamp(min=torch.finfo(weights.dtype).tiny)


def _parse_rules(
    rules: str | Sequence[str], thresholds: Bounds | Sequence[Bounds] | Mapping[str, Bounds]
) -> dict[str, tuple[float, float]]:
    """Rule -> (lower, upper) on the statistic itself: log-ratios for k1, divergences for k2 and k3."""
    names = [name.strip() for name in (rules.split(",") if isinstance(rules, str) else rules)]
    names = list(dict.fromkeys(name for name in names if name))
    unknown = [name for name in names if name not in RULES]
    if unknown or not names:
        raise ValueError(f"rejection rules {unknown or rules!r} are unknown; use some of {', '.join(RULES)}")
    if isinstance(thresholds, Mapping):
        missing = [name for name in names if name not in thresholds]
        if missing:
            raise ValueError(f"no threshold for {', '.join(missing)}; give one per rule")
        specs: list[Bounds] = [thresholds[name] for name in names]
    elif isinstance(thresholds, str):
        specs = [part.strip() for part in thresholds.split(",") if part.strip()]
    elif isinstance(thresholds, int | float) or (len(names) == 1 and len(thresholds) == 2):
        specs = [thresholds]  # pyright: ignore[reportAssignmentType] # a lone (lower, upper)
    else:
        specs = list(thresholds)
    if len(specs) == 1:
        specs = specs * len(names)
    if len(specs) != len(names):
        raise ValueError(f"{len(specs)} thresholds for {len(names)} rejection rules; give one for all or one per rule")
    return {name: _rule_bounds(name, spec) for name, spec in zip(names, specs, strict=True)}


def _rule_bounds(name: str, spec: Bounds) -> tuple[float, float]:
    lower, upper = parse_bounds(spec)
    if name.endswith("k1"):
        lower = 1.0 / upper if lower is None else lower
        if lower > upper:
            raise ValueError(f"{name} with threshold {spec!r} means [1/{upper:g}, {upper:g}], which is empty; use one above 1")
        return math.log(lower), math.log(upper)
    if lower is not None:
        raise ValueError(f"{name} measures a divergence and takes one upper bound, not {spec!r}")
    return -math.inf, upper


def _rule_statistic(name: str, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """[B, T] for token rules, [B, 1] for sequence rules; ``log_ratio`` is 0 where the mask is False."""
    bounded = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    level, estimator = name.rsplit("_", 1)
    if estimator == "k1":
        per_token = -bounded
    elif estimator == "k2":
        per_token = half_square(bounded)
    else:
        per_token = bounded.exp() - 1.0 - bounded
    if level == "token":
        return per_token
    reduce = {"seq_sum": masked_sum, "seq_mean": masked_mean, "seq_max": masked_max}[level]
    return reduce(per_token, mask, dim=-1).unsqueeze(-1)


def rejection_mask(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    rules: str | Sequence[str],
    thresholds: Bounds | Sequence[Bounds] | Mapping[str, Bounds],
) -> Tensor:
    """The mask without the tokens or sequences that left the trust region, [B, T], in the mask's dtype.

    A rule is a level and an estimator of the divergence trained/rollout from l = log_ratio: ``k1`` -l, bounded on both sides
    and given in ratio space ("0.5_2.0"; a single u means [1/u, u]); ``k2`` l²/2 and ``k3`` exp(l) - 1 - l, bounded above.
    ``token_*`` drops tokens; ``seq_sum_*``, ``seq_mean_*`` (geometric) and ``seq_max_*`` drop whole rows. All rules must pass.
    Masked importance sampling: Liu, Li et al., "When speed kills stability", 2025; the geometric rule is that
    report's; prime-rl's and slime's sequence veto is ``seq_max_k2``.

    Args:
        log_ratio: [B, T] log trained - log rollout; detached here.
        mask: [B, T].
        rules: names from ``RULES``, a sequence or comma-separated.
        thresholds: one for all rules, or one per rule in order (comma-separated or a sequence), or by name.

    Raises:
        ValueError: unknown rule, bad or missing threshold, or shapes that differ.
    """
    check_shapes(log_ratio=log_ratio, mask=mask)
    kept = as_bool(mask)
    log_ratio = zero_masked(log_ratio.detach(), mask)
    for name, (lower, upper) in _parse_rules(rules, thresholds).items():
        statistic = _rule_statistic(name, log_ratio, mask)
        kept = kept & (statistic >= lower) & (statistic <= upper)
    return kept.to(mask.dtype)


def off_policy_sequence_mask(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, threshold: float) -> Tensor:
    """The mask without rows that are both bad and stale, [B, T], in the mask's dtype (DeepSeek-V3.2, arXiv:2512.02556, sec. 3.1).

    A row goes when its advantage (mean over its tokens) is negative and mean(log rollout - log current) > ``threshold``:
    a model learns little from mistakes it would no longer make, and they are what destabilises.

    Args:
        log_ratio: [B, T] log current - log rollout.
        advantages: [B, T].
        mask: [B, T].
        threshold: nats per token.
    """
    check_shapes(log_ratio=log_ratio, advantages=advantages, mask=mask)
    divergence = masked_mean(-log_ratio.detach(), mask, dim=-1)
    rejected = (divergence > threshold) & (masked_mean(advantages, mask, dim=-1) < 0)
    return (as_bool(mask) & ~rejected.unsqueeze(-1)).to(mask.dtype)


def offpolicy_metrics(
    old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, *, count_empty_rows: bool = True
) -> Metrics:
    """How far the trained policy is from the one that sampled; names as in verl's ``rollout_corr/*``, without the prefix.

    Per token: ``kl`` mean log rollout - log old (k1 of KL(rollout || old)), ``k3_kl`` the same by k3, ``chi2_token`` mean
    ratio² - 1. Per row: ``chi2_seq`` mean (product of ratios)² - 1; from mean negative logprobs ``training_log_ppl``, ``rollout_log_ppl``,
    their ``exp`` (``*_ppl``), ``log_ppl_diff`` (training - rollout; also ``_abs``, ``_max``, ``_min``) and ``ppl_ratio``.

    Args:
        old_log_probs: [B, T] of the trained policy.
        rollout_log_probs: [B, T] as the server reported.
        mask: [B, T].
        count_empty_rows: rows without a sampled token enter the means over rows with log-perplexity 0, as in the reference;
            False leaves them out.

    Returns:
        Detached [] tensors.
    """
    check_shapes(old_log_probs=old_log_probs, rollout_log_probs=rollout_log_probs, mask=mask)
    old = zero_masked(old_log_probs.detach(), mask)
    rollout = zero_masked(rollout_log_probs.detach(), mask)
    log_ratio = old - rollout
    rows = torch.ones_like(old[:, 0], dtype=torch.bool) if count_empty_rows else as_bool(mask).any(dim=-1)
    old_mean, rollout_mean = masked_mean(old, mask, dim=-1), masked_mean(rollout, mask, dim=-1)
    difference = rollout_mean - old_mean

    def over_rows(values: Tensor) -> Tensor:
        return masked_mean(values, rows)

    def perplexity(negative_log: Tensor) -> Tensor:
        return over_rows(negative_log.clamp(max=LOG_PPL_LIMIT).exp())

    ratio = exp_bounded(log_ratio)
    bounded = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return {
        "training_ppl": perplexity(-old_mean),
        "training_log_ppl": over_rows(-old_mean),
        "kl": masked_mean(-log_ratio, mask),
        "k3_kl": masked_mean(ratio - bounded - 1, mask),
        "rollout_ppl": perplexity(-rollout_mean),
        "rollout_log_ppl": over_rows(-rollout_mean),
        "log_ppl_diff": over_rows(difference),
        "log_ppl_abs_diff": over_rows(difference.abs()),
        "log_ppl_diff_max": masked_max(difference, rows, dim=0),
        "log_ppl_diff_min": -masked_max(-difference, rows, dim=0),
        "ppl_ratio": perplexity(difference),
        "chi2_token": masked_mean(ratio.square(), mask) - 1,
        "chi2_seq": over_rows(exp_bounded(log_ratio.sum(dim=-1)).square()) - 1,
    }


@dataclass(frozen=True, slots=True, eq=False)
class RolloutCorrection:
    """What ``correct_rollout`` decided."""

    weights: Tensor | None
    """[B, T] for ``policy_loss(rollout_is_weights=)``; None without ``is_level``."""
    mask: Tensor
    """[B, T] loss mask: the response mask without what was rejected."""
    metrics: Metrics
    """``rollout_corr/*``, detached [] tensors."""


def correct_rollout(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    *,
    is_level: str | None = None,
    is_threshold: Bounds = 2.0,
    is_batch_normalize: bool = False,
    rules: str | Sequence[str] | None = None,
    thresholds: Bounds | Sequence[Bounds] | Mapping[str, Bounds] | None = None,
) -> RolloutCorrection:
    """Weights, rejection and every ``rollout_corr/*`` metric of a step's batch in one call.

    Call it on the whole batch (or on whole rows: nothing but ``is_batch_normalize`` and the metrics crosses rows).
    Neither weights nor rejection is the default: then it only measures. Weights come from the mask before rejection.

    Args:
        old_log_probs: [B, T] of the trained policy (decoupled), or of the current one (bypass).
        rollout_log_probs: [B, T] as the server reported.
        mask: [B, T] response mask.
        is_level: ``token``, ``sequence`` or None for no weights.
        is_threshold: C (TIS) or (lower, upper) (IcePop).
        is_batch_normalize: see ``is_weights``.
        rules: see ``rejection_mask``; None rejects nothing.
        thresholds: required with ``rules``.

    Raises:
        ValueError: as ``is_weights`` and ``rejection_mask``; ``rules`` without ``thresholds``.
    """
    metrics = offpolicy_metrics(old_log_probs, rollout_log_probs, mask)
    log_ratio = zero_masked(old_log_probs.detach(), mask) - zero_masked(rollout_log_probs.detach(), mask)
    weights = None
    if is_level is not None:
        weights = is_weights(log_ratio, mask, level=is_level, threshold=is_threshold, batch_normalize=is_batch_normalize)
        metrics |= weight_metrics(log_ratio, mask, level=is_level, threshold=is_threshold)
        if is_batch_normalize:
            unscaled = _bounded_weights(_raw_weights(log_ratio, mask, is_level), is_threshold)
            metrics["rollout_is_batch_norm_factor"] = mean_weight(unscaled, mask, level=is_level)
    kept = mask
    if rules is not None:
        if thresholds is None:
            raise ValueError(f"rejection rules {rules!r} need thresholds; set one per rule")
        kept = rejection_mask(log_ratio, mask, rules=rules, thresholds=thresholds)
        metrics |= rejection_metrics(log_ratio, mask, rules=rules, thresholds=thresholds)
    return RolloutCorrection(weights, kept, {f"rollout_corr/{name}": value for name, value in metrics.items()})


def weight_metrics(log_ratio: Tensor, mask: Tensor, *, level: str, threshold: Bounds) -> Metrics:
    """``rollout_is_*`` of the weights before batch normalisation.

    ``mean``, ``std``, ``eff_sample_size``, ``seq_*`` describe the weights that act; ``ratio_fraction_high|low`` (tokens, at
    sequence level rows), ``seq_fraction_*`` and ``oob_ratio`` the raw ones against the bounds (lower: 1/C for TIS), as do
    ``max`` and ``min`` at sequence level. Rows without sampled tokens are left out.
    """
    log_ratio = zero_masked(log_ratio.detach(), mask)
    raw = _raw_weights(log_ratio, mask, level)
    weights = _bounded_weights(raw, threshold)
    lower, upper = parse_bounds(threshold)
    lower_shown = 1.0 / upper if lower is None else lower
    rows = as_bool(mask).any(dim=-1)
    per_row, raw_per_row = masked_mean(weights, mask, dim=-1), masked_mean(raw, mask, dim=-1)
    judged, over = (raw_per_row, rows) if level == "sequence" else (raw, as_bool(mask))
    extremes = raw if level == "sequence" else weights
    outside = (raw > upper) | (raw < (0.0 if lower is None else lower))

    def share(condition: Tensor, where: Tensor) -> Tensor:
        return masked_mean(condition.to(weights.dtype), where)

    return {
        "rollout_is_mean": masked_mean(weights, mask),
        "rollout_is_std": _population_std(weights, mask),
        "rollout_is_max": masked_max(extremes.flatten(), as_bool(mask).flatten(), dim=0),
        "rollout_is_min": -masked_max(-extremes.flatten(), as_bool(mask).flatten(), dim=0),
        "rollout_is_eff_sample_size": effective_sample_size(weights, mask),
        "rollout_is_ratio_fraction_high": share(judged > upper, over),
        "rollout_is_ratio_fraction_low": share(judged < lower_shown, over),
        "rollout_is_oob_ratio": share(outside, mask),
        "rollout_is_seq_mean": masked_mean(per_row, rows),
        "rollout_is_seq_std": _sample_std(per_row, rows),
        "rollout_is_seq_max": masked_max(per_row, rows, dim=0),
        "rollout_is_seq_min": -masked_max(-per_row, rows, dim=0),
        "rollout_is_seq_max_deviation": masked_max((per_row - 1).abs(), rows, dim=0),
        "rollout_is_seq_fraction_high": share(raw_per_row > upper, rows),
        "rollout_is_seq_fraction_low": share(raw_per_row < lower_shown, rows),
    }


def rejection_metrics(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    rules: str | Sequence[str],
    thresholds: Bounds | Sequence[Bounds] | Mapping[str, Bounds],
) -> Metrics:
    """``rollout_rs_*``: what is rejected in all, and per rule its statistic's spread and what it alone rejects.

    ``rollout_rs_masked_fraction`` counts sampled tokens, ``rollout_rs_seq_masked_fraction`` rows that lost a token, out of
    rows that have one. Per rule ``rollout_rs_<rule>_{mean,std,max,min,fraction_high,fraction_low,masked_fraction,
    seq_masked_fraction}``, over tokens for ``token_*`` and over rows for ``seq_*``; k1 statistics are log-ratios.
    """
    log_ratio = zero_masked(log_ratio.detach(), mask)
    sampled = as_bool(mask)
    rows = sampled.any(dim=-1)
    dtype = log_ratio.dtype

    def lost(kept: Tensor) -> tuple[Tensor, Tensor]:
        gone = sampled & ~kept
        return masked_mean(gone.to(dtype), mask), masked_mean(gone.any(dim=-1).to(dtype), rows)

    metrics: Metrics = {}
    everyone = sampled
    for name, (lower, upper) in _parse_rules(rules, thresholds).items():
        statistic = _rule_statistic(name, log_ratio, mask)
        kept = ((statistic >= lower) & (statistic <= upper)).expand(mask.shape)
        everyone = everyone & kept
        values, over = (statistic.flatten(), sampled.flatten()) if name.startswith("token") else (statistic[:, 0], rows)
        key = f"rollout_rs_{name}"
        metrics[f"{key}_mean"] = masked_mean(values, over)
        metrics[f"{key}_std"] = _population_std(values, over)
        metrics[f"{key}_max"] = masked_max(values, over, dim=0)
        metrics[f"{key}_min"] = -masked_max(-values, over, dim=0)
        metrics[f"{key}_fraction_high"] = masked_mean((values > upper).to(dtype), over)
        metrics[f"{key}_fraction_low"] = masked_mean((values < lower).to(dtype), over)
        metrics[f"{key}_masked_fraction"], metrics[f"{key}_seq_masked_fraction"] = lost(kept)
    metrics["rollout_rs_masked_fraction"], metrics["rollout_rs_seq_masked_fraction"] = lost(everyone)
    return metrics


def _population_std(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((values - masked_mean(values, mask)).square(), mask).sqrt()


def _sample_std(values: Tensor, mask: Tensor) -> Tensor:
    squares = masked_sum((values - masked_mean(values, mask)).square(), mask)
    return (squares / (mask.sum() - 1).clamp(min=1)).sqrt()
