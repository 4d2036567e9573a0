"""Each aggregation by hand, and its normaliser from outside."""

import pytest
import torch

from agentrl.algorithms.aggregation import aggregate

MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [False, False, False, False]])
LOSS = torch.tensor([[1.0, 2.0, 3.0, 9.0], [10.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 16 / 4),
        ("token-sum", 16.0),
        ("seq-mean-token-sum", (6 + 10) / 2),
        ("seq-mean-token-sum-norm", (6 + 10) / 2 / 4),
        ("seq-mean-token-mean", (2 + 10) / 2),
    ],
)
def test_fully_masked_rows_count_nowhere(mode: str, expected: float) -> None:
    assert aggregate(LOSS, MASK, loss_agg_mode=mode).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 16 / 40),
        ("token-sum", 16.0),
        ("seq-mean-token-sum", 16 / 10),
        ("seq-mean-token-sum-norm", 16 / 10 / 8),
        ("seq-mean-token-mean", 12 / 10),
    ],
)
def test_counts_of_the_whole_step_replace_those_of_the_micro_batch(mode: str, expected: float) -> None:
    value = aggregate(LOSS, MASK, loss_agg_mode=mode, num_tokens=40, num_sequences=10, horizon=8)
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("count", [None, 0])
def test_a_batch_without_tokens_has_loss_zero_and_zero_gradient(mode: str, count: int | None) -> None:
    loss = LOSS.clone().requires_grad_()
    value = aggregate(loss, torch.zeros_like(MASK), loss_agg_mode=mode, num_tokens=count, num_sequences=count)
    value.backward()
    assert value.item() == 0
    assert loss.grad is not None
    assert loss.grad.abs().max() == 0


def test_unknown_modes_and_unsplittable_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="token-mean, token-sum"):
        aggregate(LOSS, MASK, loss_agg_mode="mean")
    with pytest.raises(ValueError, match="needs horizon"):
        aggregate(LOSS, MASK, loss_agg_mode="seq-mean-token-sum-norm", num_sequences=3)
    with pytest.raises(ValueError, match="num_tokens=-1"):
        aggregate(LOSS, MASK, loss_agg_mode="token-mean", num_tokens=-1)
