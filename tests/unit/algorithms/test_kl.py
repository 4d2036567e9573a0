"""KL estimators by hand, their gradients, and the controllers."""

import math

import pytest
import torch

from agentrl.algorithms.kl import AdaptiveKLController, FixedKLController, kl_loss, kl_penalty

D = 0.3  # log_prob - ref_log_prob


def value_and_gradient(estimator: str, difference: float = D) -> tuple[float, float]:
    log_probs = torch.tensor([[difference - 1.0]], dtype=torch.float64, requires_grad=True)
    kl = kl_penalty(log_probs, torch.tensor([[-1.0]], dtype=torch.float64), estimator)
    (gradient,) = torch.autograd.grad(kl.sum(), log_probs)
    return kl.item(), gradient.item()


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", D, 1.0),
        ("kl", D, 1.0),
        ("abs", D, 1.0),
        ("k2", D * D / 2, D),
        ("mse", D * D / 2, D),
        ("k3", math.exp(-D) + D - 1, 1 - math.exp(-D)),
        ("low_var_kl", math.exp(-D) + D - 1, 1 - math.exp(-D)),
    ],
)
def test_estimators_by_hand(estimator: str, value: float, gradient: float) -> None:
    assert value_and_gradient(estimator) == pytest.approx((value, gradient), rel=1e-12)


@pytest.mark.parametrize("base", ["k1", "abs", "k2", "k3", "low_var_kl"])
def test_plus_takes_the_value_of_the_estimator_and_the_gradient_of_k2(base: str) -> None:
    assert value_and_gradient(f"{base}+") == pytest.approx((value_and_gradient(base)[0], D), rel=1e-12)


def test_a_mask_keeps_junk_out_of_value_and_gradient() -> None:
    mask = torch.tensor([[True, False]])
    log_probs = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    kl = kl_penalty(log_probs, torch.tensor([[-1.5, -math.inf]]), "k3", mask=mask)
    kl.sum().backward()
    assert kl[0, 1] == 0
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == [pytest.approx(1 - math.exp(-0.5)), 0.0]


def test_the_loss_divides_by_the_count_of_the_whole_step() -> None:
    mask = torch.tensor([[True, True, False]])
    log_probs = torch.tensor([[-1.0, -2.0, 5.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.5, -2.5, 0.0]], dtype=torch.float64)
    loss = kl_loss(log_probs, reference, mask, estimator="k1", loss_agg_mode="token-mean", num_tokens=10)
    assert loss.item() == pytest.approx(1.0 / 10)


def test_an_unknown_estimator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="k1, abs, k2, k3"):
        kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), "full")


def test_the_adaptive_coefficient_moves_by_the_clipped_error_and_the_fixed_one_never() -> None:
    adaptive = AdaptiveKLController(value=0.1, target=6.0, horizon=100.0)
    adaptive.update(current_kl=600.0, n_steps=10)
    assert adaptive.value == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    adaptive.update(current_kl=5.4, n_steps=10)
    assert adaptive.value == pytest.approx(0.1 * 1.02 * (1 - 0.1 * 10 / 100))
    fixed = FixedKLController(0.1)
    fixed.update(current_kl=600.0, n_steps=10)
    assert fixed.value == 0.1
    with pytest.raises(ValueError, match="positive"):
        AdaptiveKLController(value=0.1, target=0.0, horizon=1.0)
