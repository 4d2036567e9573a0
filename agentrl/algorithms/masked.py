"""Masked reductions and scans: the only place that decides what a mask means.

Letters used in this package: B trajectories (rows), T tokens per row (entry t describes token t), G groups, K turns.

Two rules hold everywhere. A value under a False mask is replaced by zero *before* any arithmetic, so that infinities and
nans there reach neither a result nor a gradient (``0 * inf`` is nan, and so is its gradient under a later ``where``).
And a scan over tokens (a return, GAE) runs over the tokens the policy sampled, in order: a hole in the mask, where a tool
spoke, is stepped over, neither discounted nor a reset.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

VARIANCE_EPSILON = 1e-8
"""Added to a variance before the inverse square root, so that a batch without spread whitens to zero, not to nan."""


def as_bool(mask: Tensor) -> Tensor:
    """The mask as bool; numeric masks hold 0 and 1."""
    return mask if mask.dtype == torch.bool else mask != 0


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` with exact zeros where the mask is False; no gradient flows there."""
    return torch.where(as_bool(mask), values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over the True entries, [] or reduced over ``dim``."""
    kept = zero_masked(values, mask)
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the True entries; 0 where there is none."""
    count = as_bool(mask).sum() if dim is None else as_bool(mask).sum(dim=dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1).to(values.dtype)


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance over the True entries, []; 0 with fewer than two of them."""
    count = as_bool(mask).sum()
    centered = values - masked_mean(values, mask)
    return masked_sum(centered.square(), mask) / (count - 1).clamp(min=1).to(values.dtype)


def masked_max(values: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Largest True entry along ``dim``; 0 where there is none."""
    kept = as_bool(mask)
    largest = torch.where(kept, values, torch.full((), -torch.inf, dtype=values.dtype, device=values.device)).amax(dim=dim)
    return zero_masked(largest, kept.any(dim=dim))


def whiten(values: Tensor, mask: Tensor, *, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
    """Values with mean 0 and variance 1 over the True entries, [B, T]; 0 where the mask is False.

    Args:
        values: [B, T].
        mask: [B, T].
        mean: [] mean to use instead of this tensor's own (a batch that lives on several ranks).
        variance: [] unbiased variance, likewise.
    """
    mean = masked_mean(values, mask) if mean is None else mean
    variance = masked_variance(values, mask) if variance is None else variance
    return zero_masked((zero_masked(values, mask) - mean) * torch.rsqrt(variance + VARIANCE_EPSILON), mask)


def to_front(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How to close the holes of a mask.

    Returns:
        order: [B, T] long, position of the k-th sampled token at k; ``x.gather(1, order)`` moves sampled tokens to the front.
        kept: [B, T] bool, True for the first n entries of a row with n sampled tokens.
    """
    order = torch.argsort((~as_bool(mask)).to(torch.uint8), dim=1, stable=True)
    return order, as_bool(mask).gather(1, order)


def back_in_place(packed: Tensor, order: Tensor) -> Tensor:
    """Undo ``gather(1, order)``."""
    return torch.zeros_like(packed).scatter(1, order, packed)


def discounted_suffix_sum(values: Tensor, decay: float) -> Tensor:
    """``y[t] = sum over j >= t of decay**(j - t) * values[j]`` along dim 1, in log2(T) vector steps.

    After step k entry t holds the first 2**k terms; adding the entry 2**k further on, decayed, doubles that.
    """
    total = values
    reach, factor = 1, decay
    while reach < values.shape[1] and factor != 0.0:
        shifted = torch.zeros_like(total)
        shifted[:, :-reach] = total[:, reach:]
        total = total + factor * shifted
        reach, factor = 2 * reach, factor * factor
    return total


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted reward-to-go, one discount per *sampled* token, [B, T]; 0 where the mask is False."""
    order, kept = to_front(mask)
    packed = discounted_suffix_sum(zero_masked(rewards.gather(1, order), kept), gamma)
    return back_in_place(zero_masked(packed, kept), order)


def pad_rows(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """A packed stream [N] of rows laid end to end as padded rows [B, max length], zeros to the right; gradients flow back.

    How a learner that packs its sequences calls the losses: logprobs are a vocabulary's width smaller than activations,
    so padding *them* costs nothing.

    Raises:
        ValueError: lengths that do not add up to N.
    """
    if sum(lengths) != len(flat):
        raise ValueError(f"lengths add up to {sum(lengths)} but the packed stream has {len(flat)} tokens")
    return pad_sequence(list(flat.split(list(lengths))), batch_first=True)


def broadcast_to_tokens(per_row: Tensor, mask: Tensor) -> Tensor:
    """[B] -> [B, T], 0 where the mask is False."""
    return zero_masked(per_row.unsqueeze(-1).expand(mask.shape), mask)


def check_shapes(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` naming the tensors unless all given ones are [B, T] of one shape."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"per-token tensors must share one shape [B, T]: got {listed}. Pad or align them first.")
