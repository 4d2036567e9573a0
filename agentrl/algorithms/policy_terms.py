"""What every policy loss is given, cleaned once: nothing under a False mask survives, and only logprobs carry gradient."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from agentrl.algorithms.aggregation import Reduction
from agentrl.algorithms.kl import LOG_RATIO_LIMIT, exp_bounded
from agentrl.algorithms.masked import as_bool, check_shapes, zero_masked

Metrics: TypeAlias = dict[str, Tensor]
"""Name -> detached [] tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class PolicyTerms:
    """Inputs of a policy loss, all [B, T], fp32 or wider, zero where the mask is False."""

    log_probs: Tensor
    """Of the current policy; carries grad."""
    old_log_probs: Tensor
    """Of the policy the ratio is anchored at; constant."""
    advantages: Tensor
    """Constant."""
    mask: Tensor
    """bool."""
    weights: Tensor | None
    """Importance weights rollout -> old; constant."""
    reduce: Reduction

    @classmethod
    def clean(
        cls,
        *,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        weights: Tensor | None,
        reduce: Reduction,
    ) -> "PolicyTerms":
        check_shapes(
            log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask, rollout_is_weights=weights
        )
        kept = as_bool(mask)

        def constant(values: Tensor) -> Tensor:
            return zero_masked(values.detach(), kept).to(_wide(log_probs.dtype))

        return cls(
            log_probs=zero_masked(log_probs, kept).to(_wide(log_probs.dtype)),
            old_log_probs=constant(old_log_probs),
            advantages=constant(advantages),
            mask=kept,
            weights=None if weights is None else constant(weights),
            reduce=reduce,
        )

    def constant(self, values: Tensor, name: str) -> Tensor:
        """A further [B, T] input of one loss, cleaned the same way."""
        check_shapes(log_probs=self.log_probs, **{name: values})
        return zero_masked(values.detach(), self.mask).to(self.log_probs.dtype)

    @property
    def log_ratio(self) -> Tensor:
        """log current - log old, unbounded."""
        return self.log_probs - self.old_log_probs

    @property
    def bounded_log_ratio(self) -> Tensor:
        """The same clamped to ±``LOG_RATIO_LIMIT``; no gradient flows past the clamp."""
        return self.log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    @property
    def ratio(self) -> Tensor:
        """current / old."""
        return exp_bounded(self.log_ratio)

    def loss(self, per_token: Tensor) -> Tensor:
        """Weighted by the importance weights and reduced, []."""
        return self.reduce.loss(per_token if self.weights is None else per_token * self.weights, self.mask)

    def share(self, condition: Tensor) -> Tensor:
        """Share of tokens for which the condition holds, detached []."""
        return self.reduce.metric(condition.to(self.log_probs.dtype), self.mask)

    def zero(self) -> Tensor:
        """[] 0: a metric this loss has no use for."""
        return self.advantages.new_zeros(())

    def ppo_kl(self) -> Tensor:
        """Mean log old - log current (k1 of KL(old || current)), detached []."""
        return self.reduce.metric(-self.bounded_log_ratio, self.mask)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Ratios and losses are computed in at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def clip_bounds(clip_ratio: float, low: float | None, high: float | None) -> tuple[float, float]:
    """(epsilon below 1, epsilon above 1): each side's own value, or the common one."""
    return clip_ratio if low is None else low, clip_ratio if high is None else high
