"""From a loss per token to one number, with a normaliser that does not depend on how the batch was cut.

A micro-batch knows only its own tokens. Dividing by *its* count and averaging over micro-batches weighs tokens of short
micro-batches more. So the step's counts come in from outside: with ``num_tokens`` / ``num_sequences`` of the whole step
(all micro-batches, all ranks), the micro-batch losses *sum* to the loss of the whole batch, and so do their gradients.
A data-parallel reduction that averages gradients over R ranks must be undone by a factor R; that is the learner's job.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from agentrl.algorithms.masked import as_bool, masked_sum

LossAggMode: TypeAlias = Literal[
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"
]
LOSS_AGG_MODES: tuple[str, ...] = get_args(LossAggMode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """How a loss per token becomes a number.

    | mode | value | paper |
    |---|---|---|
    | ``token-mean`` | sum over tokens / tokens | DAPO, arXiv:2503.14476, eq. 12 |
    | ``token-sum`` | sum over tokens | |
    | ``seq-mean-token-sum`` | sum over tokens / sequences | REINFORCE on sequences |
    | ``seq-mean-token-sum-norm`` | the same / ``horizon`` | Dr. GRPO, arXiv:2503.20783, sec. 3.2 |
    | ``seq-mean-token-mean`` | mean over sequences of each one's token mean | GRPO, arXiv:2402.03300, eq. 3 |

    A sequence is a row with at least one True mask entry; fully masked rows count nowhere.
    """

    mode: str
    num_tokens: int | None = None
    """True mask entries of the whole step; None takes this tensor's own."""
    num_sequences: int | None = None
    """Rows with a True mask entry in the whole step; None takes this tensor's own."""
    horizon: int | None = None
    """Constant length for ``seq-mean-token-sum-norm``; None takes the padded width T, as the reference does."""

    def __post_init__(self) -> None:
        if self.mode not in LOSS_AGG_MODES:
            raise ValueError(f"loss_agg_mode={self.mode!r} is unknown; use one of {', '.join(LOSS_AGG_MODES)}")
        for name in ("num_tokens", "num_sequences", "horizon"):
            count = getattr(self, name)
            if count is not None and count < 0:
                raise ValueError(f"{name}={count} is negative; it counts the whole step (all micro-batches, all ranks)")
        if self.mode == "seq-mean-token-sum-norm" and self.num_sequences is not None and self.horizon is None:
            raise ValueError(
                f"loss_agg_mode={self.mode!r} with num_sequences={self.num_sequences} needs horizon: the padded width differs"
                " between micro-batches. Pass the longest response allowed, the same in every call."
            )

    def token_count(self, mask: Tensor, dtype: torch.dtype) -> Tensor | int:
        """The divisor of token means; at least 1."""
        return as_bool(mask).sum().clamp(min=1).to(dtype) if self.num_tokens is None else max(self.num_tokens, 1)

    def sequence_count(self, mask: Tensor, dtype: torch.dtype) -> Tensor | int:
        """The divisor of sequence means; at least 1."""
        if self.num_sequences is not None:
            return max(self.num_sequences, 1)
        return as_bool(mask).any(dim=-1).sum().clamp(min=1).to(dtype)

    def loss(self, values: Tensor, mask: Tensor) -> Tensor:
        """[B, T] -> [], by the mode."""
        if self.mode == "token-sum":
            return masked_sum(values, mask)
        if self.mode == "token-mean":
            return masked_sum(values, mask) / self.token_count(mask, values.dtype)
        per_sequence = masked_sum(values, mask, dim=-1)
        if self.mode == "seq-mean-token-mean":
            per_sequence = per_sequence / as_bool(mask).sum(dim=-1).clamp(min=1).to(values.dtype)
        elif self.mode == "seq-mean-token-sum-norm":
            per_sequence = per_sequence / (mask.shape[-1] if self.horizon is None else self.horizon)
        return per_sequence.sum() / self.sequence_count(mask, values.dtype)

    def metric(self, values: Tensor, mask: Tensor) -> Tensor:
        """Mean over tokens, detached; with ``num_tokens`` a part that sums to the mean over the step."""
        return (masked_sum(values, mask) / self.token_count(mask, values.dtype)).detach()

    def with_mode(self, mode: str) -> "Reduction":
        """The same counts under another mode (losses that are defined on sequences)."""
        return Reduction(mode=mode, num_tokens=self.num_tokens, num_sequences=self.num_sequences, horizon=self.horizon)


def aggregate(
    values: Tensor,
    mask: Tensor,
    *,
    loss_agg_mode: str,
    num_tokens: int | None = None,
    num_sequences: int | None = None,
    horizon: int | None = None,
) -> Tensor:
    """Reduce a loss per token [B, T] to [].

    Args:
        values: [B, T] loss per token.
        mask: [B, T] bool (or 0/1): tokens that count.
        loss_agg_mode: one of ``LOSS_AGG_MODES``.
        num_tokens: True entries over all micro-batches and ranks of the step; None: this tensor's.
        num_sequences: rows with a True entry over the whole step; None: this tensor's.
        horizon: constant length of ``seq-mean-token-sum-norm``; None: T.

    Raises:
        ValueError: unknown mode, a negative count, or a mode that cannot be split without ``horizon``.
    """
    reduction = Reduction(mode=loss_agg_mode, num_tokens=num_tokens, num_sequences=num_sequences, horizon=horizon)
    return reduction.loss(values, mask)
