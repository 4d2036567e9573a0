"""Policy, value and entropy losses by hand. One row, few tokens, so that each number can be checked on paper."""

import inspect
import math

import pytest
import torch
from torch import Tensor

from agentrl.algorithms.losses import POLICY_LOSSES, entropy_bonus, policy_loss, policy_loss_parameters, value_loss
from agentrl.algorithms.trust_region_losses import (
    loglinear_proximal,
    random_covariance_mask,
    token_covariance,
    top_covariance_mask,
)

F64 = torch.float64
REQUIRED = {"dro": {"dro_beta": 0.1}}


def run(
    name: str,
    ratios: list[float],
    advantages: list[float],
    *,
    old: float = math.log(0.1),
    mode: str = "token-sum",
    **params: object,
) -> tuple[float, list[float], dict[str, float]]:
    """Loss, d loss / d log_probs and metrics of one row whose tokens have these ratios current / old."""
    old_log_probs = torch.full((1, len(ratios)), old, dtype=F64)
    log_probs = (old_log_probs + torch.tensor([ratios], dtype=F64).log()).requires_grad_()
    loss, metrics = policy_loss(
        name,
        log_probs=log_probs,
        old_log_probs=old_log_probs,
        advantages=torch.tensor([advantages], dtype=F64),
        mask=torch.ones(1, len(ratios), dtype=torch.bool),
        loss_agg_mode=mode,
        **params,
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    for value in metrics.values():
        assert value.shape == ()
        assert not value.requires_grad
    return loss.item(), gradient[0].tolist(), {key: value.item() for key, value in metrics.items()}


# ---- ratio losses


def test_ppo_clips_only_what_would_go_further_the_way_the_advantage_pushes() -> None:
    loss, gradient, metrics = run("ppo", [1.5, 0.5, 1.5, 0.5], [1, 1, -1, -1], clip_ratio_low=0.2, clip_ratio_high=0.3)
    assert loss == pytest.approx(-1.3 - 0.5 + 1.5 + 0.8)
    assert gradient == pytest.approx([0, -0.5, 1.5, 0])
    assert metrics == pytest.approx(
        {"pg_clipfrac": 0.5, "ppo_kl": -(2 * math.log(1.5) + 2 * math.log(0.5)) / 4, "pg_clipfrac_lower": 0.0}
    )


def test_dual_clip_caps_the_loss_of_a_bad_token_whose_ratio_exploded() -> None:
    loss, gradient, metrics = run("ppo", [5.0, 2.0], [-1, -1], clip_ratio_c=3.0)
    assert loss == pytest.approx(3.0 + 2.0)
    assert gradient == pytest.approx([0, 2.0])
    assert metrics["pg_clipfrac_lower"] == pytest.approx(0.5)
    assert run("ppo", [5.0], [-1], clip_ratio_c=None)[0] == pytest.approx(5.0)
    with pytest.raises(ValueError, match="must exceed 1"):
        run("ppo", [1.0], [1], clip_ratio_c=1.0)


def test_gspo_uses_the_sequence_ratio_with_each_tokens_gradient() -> None:
    ratio = math.sqrt(1.2 * 0.9)
    loss, gradient, _ = run("gspo", [1.2, 0.9], [1, 2], clip_ratio=0.2)
    assert loss == pytest.approx(-ratio * 3)
    assert gradient == pytest.approx([-ratio, -2 * ratio])
    _, gradient, metrics = run("gspo", [1.2, 0.9], [1, 2], clip_ratio=0.03)
    assert gradient == [0, 0]
    assert metrics["pg_clipfrac"] == 1.0


def test_cispo_never_silences_a_token() -> None:
    loss, gradient, metrics = run("cispo", [2.0, 0.5], [1, -1], clip_ratio_low=0.2, clip_ratio_high=0.28)
    assert gradient == pytest.approx([-1.28, 0.8])
    assert loss == pytest.approx(-1.28 * math.log(0.2) + 0.8 * math.log(0.05))
    assert metrics["pg_clipfrac"] == 1.0


def test_sapo_has_slope_one_at_ratio_one_and_fades_beyond() -> None:
    _, gradient, _ = run("sapo", [1.0, 1.0, 3.0], [1, -1, 1])
    gate_slope = 4 * torch.sigmoid(torch.tensor(2.0)).item() * (1 - torch.sigmoid(torch.tensor(2.0)).item())
    assert gradient == pytest.approx([-1 / 3, 1 / 3, -3 * gate_slope / 3], rel=1e-6)  # mean over three tokens


def test_sapo_obeys_the_aggregation_only_on_request() -> None:
    assert run("sapo", [1.0, 1.0], [1, 1])[0] == pytest.approx(-2.0)  # gate(1) = 2
    assert run("sapo", [1.0, 1.0], [1, 1], obey_loss_agg_mode=True)[0] == pytest.approx(-4.0)


def test_geo_mean_clips_tokens_before_the_geometric_mean() -> None:
    loss, gradient, metrics = run("geo_mean", [math.exp(0.9), math.exp(0.1)], [1, 1], clip_ratio=0.4)
    ratio = math.exp((0.4 + 0.1) / 2)
    assert loss == pytest.approx(-ratio)
    assert gradient == pytest.approx([0, -ratio / 2])
    assert metrics["pg_clipfrac"] == pytest.approx(0.5)


def test_gpg_is_plain_reinforce() -> None:
    loss, gradient, metrics = run("gpg", [2.0, 1.0], [1, -3])
    assert loss == pytest.approx(-math.log(0.2) + 3 * math.log(0.1))
    assert gradient == pytest.approx([-1, 3])
    assert metrics == {}


# ---- trust regions


def test_dppo_drops_a_token_whose_probability_moved_too_far_its_advantages_way() -> None:
    # probability 0.1 -> 0.4: +0.3; 0.1 -> 0.05: -0.05
    _, gradient, metrics = run("dppo_tv", [4.0, 4.0, 0.5], [1, -1, -1], clip_ratio=0.2)
    assert gradient == pytest.approx([0, 4.0, 0.5])
    assert metrics["pg_clipfrac"] == pytest.approx(1 / 3)
    _, gradient, metrics = run("dppo_tv", [4.0], [-1], clip_ratio_c=3.0)
    assert gradient == pytest.approx([3.0])
    assert metrics["pg_clipfrac_lower"] == 1.0


def test_dppo_kl_measures_the_binary_divergence() -> None:
    p, q = 0.1, 0.4
    divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert run("dppo_kl", [4.0], [1], clip_ratio=divergence - 0.01)[1] == [0]
    assert run("dppo_kl", [4.0], [1], clip_ratio=divergence + 0.01)[1] == pytest.approx([-4.0])
    assert run("dppo_kl", [4.0], [-1], clip_ratio=divergence - 0.01)[1] == pytest.approx([4.0])


def test_prime_rl_pulls_dropped_tokens_back() -> None:
    loss, gradient, metrics = run("prime_rl", [4.0, 1.0], [1, 1], clip_ratio=0.2, kl_tau=0.01)
    assert gradient == pytest.approx([2 * 0.01 * math.log(4), -1])
    assert loss == pytest.approx(0.01 * math.log(4) ** 2 - 1)
    assert metrics["pg_clipfrac"] == pytest.approx(0.5)
    assert metrics["mismatch_kl"] == pytest.approx((4 - math.log(4) - 1) / 2)


def test_dro_is_the_gradient_of_a_square() -> None:
    _, gradient, _ = run("dro", [math.exp(0.5), 1.0], [1, -1], dro_beta=0.2)
    assert gradient == pytest.approx([-(1 - 0.2 * 0.5), 1])
    with pytest.raises(ValueError, match="must be positive"):
        run("dro", [1.0], [1], dro_beta=0.0)


def test_kl_cov_penalises_only_the_tokens_with_the_largest_covariance() -> None:
    ratios, advantages = [2.0, 1.0, 1.0, 0.5], [2.0, 0.0, 0.0, 0.0]
    loss, gradient, metrics = run("kl_cov", ratios, advantages, kl_cov_ratio=0.25, ppo_kl_coef=0.1)
    assert loss == pytest.approx(-4 + 0.1 * math.log(2))
    assert gradient == pytest.approx([-4 + 0.1, 0, 0, 0])
    assert metrics["ppo_kl"] == pytest.approx(2 * math.log(2) / 4)


def test_clip_cov_drops_at_most_its_share_of_eligible_tokens() -> None:
    ratios, advantages = [1.1, 1.0, 1.0, 0.95], [8.0, 0.0, 0.0, -8.0]
    _, gradient, metrics = run("clip_cov", ratios, advantages, clip_cov_ratio=0.25, clip_cov_lb=0.1, clip_cov_ub=5.0)
    assert metrics["pg_clipfrac"] == pytest.approx(0.25)
    assert sum(value == 0 for value in gradient) == 3
    chosen = torch.tensor([[False, False, False, True]])
    assert run("clip_cov", ratios, advantages, covariance_mask=chosen)[1] == pytest.approx([-8.8, 0, 0, 0])


def test_covariance_is_measured_against_the_means_of_sampled_tokens() -> None:
    mask = torch.tensor([[True, True, True, False]])
    covariance = token_covariance(torch.tensor([[1.0, 0.0, -1.0, 99.0]]), torch.tensor([[-1.0, -2.0, -3.0, math.nan]]), mask)
    assert covariance[0, :3].tolist() == pytest.approx([1, 0, 1])
    assert top_covariance_mask(torch.tensor([[1.0, 3.0, 2.0, 9.0]]), mask, share=0.7).tolist() == [[False, True, True, False]]
    assert not top_covariance_mask(covariance, torch.zeros_like(mask), share=0.5).any()
    chosen = random_covariance_mask(covariance, mask, count=1, lower=0.5, upper=5.0, generator=torch.Generator().manual_seed(0))
    assert chosen.sum() == 1
    assert not chosen[0, 1]


def test_reinforce_weighs_by_the_truncated_ratio_without_its_gradient() -> None:
    _, gradient, metrics = run("reinforce", [4.0, 0.5], [1, 1], is_level="token", is_threshold=2.0)
    assert gradient == pytest.approx([-2.0, -0.5])
    assert metrics["is_weight_mean"] == pytest.approx(1.25)
    assert run("reinforce", [4.0, 0.5], [1, 1])[1] == pytest.approx([-1, -1])
    assert run("reinforce", [4.0, 0.5], [1, 1], is_level="sequence", is_threshold=9.0)[1] == pytest.approx([-2, -2])


# ---- decoupled PPO


def proximal(ratios: list[float], old: float = math.log(0.1)) -> Tensor:
    return torch.tensor([ratios], dtype=F64).log() + old


def test_decoupled_ppo_clips_around_the_proximal_policy_and_weighs_by_prox_over_behaviour() -> None:
    # current / behaviour 3 and 1.5; proximal / behaviour 2 and 1.5: current / proximal 1.5 (clipped) and 1
    loss, gradient, metrics = run("decoupled_ppo", [3.0, 1.5], [1, 1], clip_ratio=0.2, proximal_log_probs=proximal([2.0, 1.5]))
    assert loss == pytest.approx(-(1.2 * 2 + 1 * 1.5))
    assert gradient == pytest.approx([0, -1.5])
    assert metrics["behav_weight_mean"] == pytest.approx(1.75)
    assert metrics["pg_clipfrac"] == pytest.approx(0.5)
    assert metrics["behav_kl"] == pytest.approx(-(math.log(2) + math.log(1.5)) / 2)


@pytest.mark.parametrize(("mode", "first"), [("mask", 0.0), ("truncate", -1.8)])
def test_behaviour_weights_are_masked_or_truncated_at_the_cap(mode: str, first: float) -> None:
    _, gradient, metrics = run(
        "decoupled_ppo",
        [2.0, 1.5],
        [1, 1],
        proximal_log_probs=proximal([2.0, 1.5]),
        behav_weight_cap=1.8,
        behav_cap_mode=mode,
    )
    assert gradient == pytest.approx([first, -1.5])
    assert metrics["behav_capped_fraction"] == pytest.approx(0.5)


def test_the_proximal_policy_is_interpolated_by_versions() -> None:
    current = torch.tensor([[-1.0, -1.0, -1.0, -1.0]])
    behavior = torch.tensor([[-2.0, -2.0, -2.0, -2.0]])
    versions = torch.tensor([[10, 9, 6, 11]])  # sampled by the proximal version, one older, four older, not yet announced
    approximated = loglinear_proximal(current, behavior, versions, proximal_version=10)
    assert approximated[0].tolist() == pytest.approx([-2.0, -1.5, -2 + 4 / 5, -2.0])


def test_decoupled_ppo_accepts_versions_with_junk_under_the_mask() -> None:
    log_probs = torch.tensor([[math.log(0.2), math.nan]], dtype=F64, requires_grad=True)
    loss, _ = policy_loss(
        "decoupled_ppo",
        log_probs=log_probs,
        old_log_probs=torch.tensor([[math.log(0.1), math.inf]], dtype=F64),
        advantages=torch.ones(1, 2, dtype=F64),
        mask=torch.tensor([[True, False]]),
        loss_agg_mode="token-mean",
        versions=torch.tensor([[9, -1]]),
        proximal_version=10,
        clip_ratio=1.0,
    )
    assert loss.item() == pytest.approx(-2.0)  # sqrt(2) * sqrt(2): half the way each
    with pytest.raises(ValueError, match="proximal_version"):
        run("decoupled_ppo", [1.0], [1], versions=torch.tensor([[9]]))
    with pytest.raises(ValueError, match="behav_cap_mode"):
        run("decoupled_ppo", [1.0], [1], behav_cap_mode="clamp")


# ---- all of them


@pytest.mark.parametrize("name", sorted(set(POLICY_LOSSES) - {"clip_cov", "kl_cov"}))
def test_on_policy_every_loss_has_the_policy_gradient(name: str) -> None:
    """Ratio 1: the gradient is -advantage per token, whatever the trust region. I9."""
    params = REQUIRED.get(name, {})
    mode = "seq-mean-token-mean"
    advantages = [0.7, 0.7, 0.7] if name == "geo_mean" else [0.5, -1.0, 2.0]
    _, gradient, metrics = run(name, [1.0, 1.0, 1.0], advantages, mode=mode, **params)
    assert gradient == pytest.approx([-a / 3 for a in advantages], rel=1e-9)
    assert metrics.get("ppo_kl", 0.0) == pytest.approx(0, abs=1e-12)
    assert metrics.get("pg_clipfrac", 0.0) == 0


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_importance_weights_scale_the_loss_and_carry_no_gradient(name: str) -> None:
    params = REQUIRED.get(name, {}) | ({"covariance_mask": torch.zeros(1, 2)} if name.endswith("_cov") else {})
    plain = run(name, [1.1, 0.9], [1, -0.5], **params)
    weights = torch.full((1, 2), 0.25, dtype=F64, requires_grad=True)
    weighted = run(name, [1.1, 0.9], [1, -0.5], rollout_is_weights=weights, **params)
    assert weighted[0] == pytest.approx(0.25 * plain[0], rel=1e-8)
    assert weighted[1] == pytest.approx([0.25 * g for g in plain[1]], rel=1e-8)
    assert weights.grad is None


def test_half_precision_logprobs_are_widened_before_the_ratio() -> None:
    log_probs = torch.tensor([[-1.0]], dtype=torch.bfloat16, requires_grad=True)
    loss, metrics = policy_loss(
        "ppo",
        log_probs=log_probs,
        old_log_probs=torch.tensor([[-1.001]]),
        advantages=torch.tensor([[1.0]]),
        mask=torch.tensor([[True]]),
        loss_agg_mode="token-mean",
    )
    assert loss.dtype == metrics["ppo_kl"].dtype == torch.float32
    assert loss.item() == pytest.approx(-math.exp(0.001), rel=1e-6)


def test_options_can_be_listed_and_wrong_ones_are_refused() -> None:
    assert policy_loss_parameters("sapo") == {"tau_pos": 1.0, "tau_neg": 1.05, "obey_loss_agg_mode": False}
    assert policy_loss_parameters("dro") == {"dro_beta": inspect.Parameter.empty}
    with pytest.raises(ValueError, match="use one of ppo, gspo"):
        run("pop", [1.0], [1])
    with pytest.raises(TypeError, match="clip_raito"):
        run("ppo", [1.0], [1], clip_raito=0.2)
    with pytest.raises(ValueError, match=r"advantages \[1, 3\]"):
        policy_loss(
            "ppo",
            log_probs=torch.zeros(1, 2),
            old_log_probs=torch.zeros(1, 2),
            advantages=torch.zeros(1, 3),
            mask=torch.ones(1, 2, dtype=torch.bool),
            loss_agg_mode="token-mean",
        )


# ---- value and entropy


def value(prediction: float, cliprange: float | None) -> tuple[float, float, float]:
    vpreds = torch.tensor([[prediction]], dtype=F64, requires_grad=True)
    loss, clipfrac = value_loss(
        vpreds=vpreds,
        returns=torch.tensor([[1.0]], dtype=F64),
        values=torch.tensor([[0.0]], dtype=F64),
        mask=torch.tensor([[True]]),
        cliprange_value=cliprange,
        loss_agg_mode="token-mean",
    )
    (gradient,) = torch.autograd.grad(loss, vpreds)
    return loss.item(), clipfrac.item(), gradient.item()


def test_a_value_that_moved_past_the_clip_towards_its_target_stops_learning() -> None:
    assert value(0.5, 0.2) == pytest.approx((0.5 * 0.8**2, 1.0, 0.0))
    assert value(0.1, 0.2) == pytest.approx((0.5 * 0.9**2, 0.0, -0.9))
    assert value(-0.5, 0.2) == pytest.approx((0.5 * 1.5**2, 0.0, -1.5))
    assert value(0.5, None) == pytest.approx((0.5 * 0.5**2, 0.0, -0.5))


def test_the_entropy_bonus_lowers_the_loss_of_a_spread_policy() -> None:
    entropy = torch.tensor([[2.0, 4.0, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    term, mean = entropy_bonus(entropy, mask, coefficient=0.01, loss_agg_mode="token-mean")
    term.backward()
    assert term.item() == pytest.approx(-0.03)
    assert mean.item() == pytest.approx(3.0)
    assert entropy.grad is not None
    assert entropy.grad[0].tolist() == pytest.approx([-0.005, -0.005, 0])
