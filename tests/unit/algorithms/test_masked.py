"""Reductions and scans under a mask, against loops written out."""

import math

import pytest
import torch

from agentrl.algorithms.masked import (
    back_in_place,
    broadcast_to_tokens,
    check_shapes,
    discounted_suffix_sum,
    masked_max,
    masked_mean,
    masked_sum,
    masked_variance,
    pad_rows,
    returns_to_go,
    to_front,
    whiten,
    zero_masked,
)

MASK = torch.tensor([[True, False, True], [False, False, False]])
VALUES = torch.tensor([[1.0, math.nan, 5.0], [math.inf, 2.0, -math.inf]], dtype=torch.float64)


def test_sums_and_means_see_only_true_entries() -> None:
    assert masked_sum(VALUES, MASK) == 6
    assert masked_mean(VALUES, MASK) == 3
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [3.0, 0.0]
    assert masked_max(VALUES, MASK, dim=1).tolist() == [5.0, 0.0]
    assert masked_variance(VALUES, MASK) == 8  # (1 - 3)² + (5 - 3)², over 2 - 1


def test_numeric_masks_mean_the_same_as_bool_ones() -> None:
    assert masked_sum(VALUES, MASK.double()) == 6
    assert torch.equal(zero_masked(VALUES, MASK.int()), zero_masked(VALUES, MASK))


def test_no_gradient_flows_from_masked_junk() -> None:
    values = VALUES.clone().requires_grad_()
    masked_sum(zero_masked(values, MASK).exp(), MASK).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[math.exp(1), 0.0, math.exp(5)], [0.0, 0.0, 0.0]]


def test_whitening_gives_mean_zero_and_variance_one() -> None:
    mask = torch.tensor([[True, True, False, True, True]])
    white = whiten(torch.tensor([[1.0, 2.0, 99.0, 4.0, 5.0]], dtype=torch.float64), mask)
    assert masked_mean(white, mask) == pytest.approx(0, abs=1e-12)
    assert masked_variance(white, mask) == pytest.approx(1, abs=1e-6)
    assert white[0, 2] == 0


def test_whitening_without_spread_or_with_one_token_gives_zero() -> None:
    assert whiten(torch.full((1, 4), 7.0), torch.ones(1, 4, dtype=torch.bool)).abs().max() == 0
    assert whiten(torch.full((1, 1), 7.0), torch.ones(1, 1, dtype=torch.bool)).item() == 0


def test_whitening_takes_the_moments_of_a_batch_that_lives_elsewhere() -> None:
    white = whiten(
        torch.tensor([[3.0]], dtype=torch.float64),
        torch.tensor([[True]]),
        mean=torch.tensor(1.0, dtype=torch.float64),
        variance=torch.tensor(4.0, dtype=torch.float64),
    )
    assert white.item() == pytest.approx(1.0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_suffix_sum_equals_the_loop(decay: float, length: int) -> None:
    values = torch.randn(3, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    expected = torch.zeros_like(values)
    running = torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(length)):
        running = values[:, t] + decay * running
        expected[:, t] = running
    torch.testing.assert_close(discounted_suffix_sum(values, decay), expected, rtol=1e-12, atol=1e-12)


def test_returns_step_over_holes_without_discount_or_reset() -> None:
    mask = torch.tensor([[True, True, False, False, True]])
    rewards = torch.tensor([[0.0, 1.0, 50.0, 50.0, 4.0]], dtype=torch.float64)
    assert returns_to_go(rewards, mask, 0.5).tolist() == [[0.5 * (1 + 0.5 * 4), 1 + 0.5 * 4, 0.0, 0.0, 4.0]]


def test_closing_holes_keeps_order_and_can_be_undone() -> None:
    mask = torch.tensor([[False, True, False, True]])
    values = torch.tensor([[10, 11, 12, 13]])
    order, kept = to_front(mask)
    assert values.gather(1, order).tolist() == [[11, 13, 10, 12]]
    assert kept.tolist() == [[True, True, False, False]]
    assert torch.equal(back_in_place(values.gather(1, order), order), values)


def test_rows_are_broadcast_onto_sampled_tokens_only() -> None:
    assert broadcast_to_tokens(torch.tensor([2.0, 3.0]), MASK).tolist() == [[2.0, 0.0, 2.0], [0.0, 0.0, 0.0]]


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"log_probs \[2, 3\], mask \[2, 4\]"):
        check_shapes(log_probs=torch.zeros(2, 3), mask=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one shape"):
        check_shapes(log_probs=torch.zeros(3))


def test_a_packed_stream_becomes_padded_rows_and_gradients_flow_back() -> None:
    flat = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    rows = pad_rows(flat, [3, 1])
    assert rows.tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]
    (rows * torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).sum().backward()
    assert flat.grad is not None
    assert flat.grad.tolist() == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(ValueError, match="add up to 3"):
        pad_rows(flat, [3])
