"""KL divergence between the policy and a reference, estimated from the sampled tokens, and controllers of its weight."""

from dataclasses import dataclass

from torch import Tensor

from agentrl.algorithms.aggregation import aggregate
from agentrl.algorithms.masked import check_shapes, zero_masked

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ±20 before ``exp``: e^20 = 4.9e8, so products and sums over a batch stay far from fp32's
3.4e38, while a token whose probability moved by that factor has lost all meaning as a weight. The reference's bound."""

SQUARE_LIMIT = 1e4
"""Log-ratios are clamped to ±1e4 before they are squared: no logit gap of a real model reaches it, and 1e8 per token
still sums in fp32 over any batch."""

K3_LIMIT = 10.0
"""The k3 value is clamped to ±10 (the reference's bound); past it the gradient is zero."""

ESTIMATORS: tuple[str, ...] = ("k1", "abs", "k2", "k3", "k1+", "abs+", "k2+", "k3+")

_ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def exp_bounded(log_ratio: Tensor) -> Tensor:
    """``exp`` of a log-ratio clamped to ±``LOG_RATIO_LIMIT``."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def half_square(log_ratio: Tensor) -> Tensor:
    """Half the square of a log-ratio clamped to ±``SQUARE_LIMIT``."""
    return 0.5 * log_ratio.clamp(-SQUARE_LIMIT, SQUARE_LIMIT).square()


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, estimator: str, *, mask: Tensor | None = None) -> Tensor:
    """KL(policy || reference) per sampled token, [B, T].

    With d = log_probs - ref_log_probs: ``k1`` d, ``abs`` |d|, ``k2`` d²/2, ``k3`` exp(-d) + d - 1 (Schulman, "Approximating
    KL divergence", 2020). ``k1`` and ``k3`` estimate the *value* without bias, but their gradient is not the gradient of
    the KL: that of ``k1`` has expectation zero, that of ``k3`` is KL(reference || policy)'s. ``k2``'s gradient is right
    (arXiv:2510.01555). A name ending in ``+`` therefore takes the value of the estimator and the gradient of ``k2``
    (straight-through). ``kl``, ``mse`` and ``low_var_kl`` are other names of k1, k2 and k3.

    Args:
        log_probs: [B, T] of the policy; may carry grad.
        ref_log_probs: [B, T] of the reference.
        estimator: one of ``ESTIMATORS`` or an alias.
        mask: [B, T]; where given, entries at False are 0 and whatever the inputs hold there is ignored.

    Raises:
        ValueError: an unknown estimator.
    """
    straight_through = estimator.endswith("+")
    base = estimator.removesuffix("+")
    base = _ALIASES.get(base, base)
    if base not in ("k1", "abs", "k2", "k3"):
        raise ValueError(f"KL estimator {estimator!r} is unknown; use one of {', '.join(ESTIMATORS)}")
    if mask is not None:
        log_probs, ref_log_probs = zero_masked(log_probs, mask), zero_masked(ref_log_probs, mask)
    difference = log_probs - ref_log_probs
    if base == "k1":
        value = difference
    elif base == "abs":
        value = difference.abs()
    elif base == "k2":
        return half_square(difference)
    else:
        reverse = (-difference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        value = (reverse.exp() - reverse - 1).clamp(-K3_LIMIT, K3_LIMIT)
    if not straight_through:
        return value
    gradient_source = half_square(difference)
    return gradient_source - gradient_source.detach() + value.detach()


def kl_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    *,
    estimator: str,
    loss_agg_mode: str,
    num_tokens: int | None = None,
    num_sequences: int | None = None,
    horizon: int | None = None,
) -> Tensor:
    """The KL term of a policy loss before its coefficient, [] (GRPO's, arXiv:2402.03300, eq. 3-4).

    Shapes [B, T]; ``num_tokens``, ``num_sequences`` and ``horizon`` as in ``aggregate``.
    """
    check_shapes(log_probs=log_probs, ref_log_probs=ref_log_probs, mask=mask)
    per_token = kl_penalty(log_probs, ref_log_probs.detach(), estimator, mask=mask)
    return aggregate(
        per_token,
        mask,
        loss_agg_mode=loss_agg_mode,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        horizon=horizon,
    )


@dataclass(slots=True)
class FixedKLController:
    """A KL coefficient that never changes."""

    value: float

    def update(self, current_kl: float, n_steps: int) -> None:
        """Nothing to do; the same shape as the adaptive controller's."""


@dataclass(slots=True)
class AdaptiveKLController:
    """A KL coefficient that steers the measured KL to a target (arXiv:1909.08593, sec. 2.2).

    ``value`` is the whole state: store it in the checkpoint and construct with it on resume.
    """

    value: float
    target: float
    horizon: float
    """Trajectories over which an error at the clip bound multiplies the coefficient by 1 ± 0.2."""

    ERROR_BOUND = 0.2

    def __post_init__(self) -> None:
        if self.target <= 0 or self.horizon <= 0:
            raise ValueError(f"target={self.target:g} and horizon={self.horizon:g} must both be positive")

    def update(self, current_kl: float, n_steps: int) -> None:
        """Move the coefficient after a batch of ``n_steps`` trajectories whose mean KL was ``current_kl``."""
        error = min(max(current_kl / self.target - 1, -self.ERROR_BOUND), self.ERROR_BOUND)
        self.value *= 1 + error * n_steps / self.horizon


__all__ = [
    "ESTIMATORS",
    "LOG_RATIO_LIMIT",
    "AdaptiveKLController",
    "FixedKLController",
    "exp_bounded",
    "half_square",
    "kl_loss",
    "kl_penalty",
]
