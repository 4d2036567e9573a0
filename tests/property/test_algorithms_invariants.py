"""What must hold for any batch: masked values do not matter (I2), neither does the cut into micro-batches (I8), row order or
padding; and nothing overflows in fp32."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentrl.algorithms.advantages import compute_advantages
from agentrl.algorithms.aggregation import LOSS_AGG_MODES
from agentrl.algorithms.correction import RULES, correct_rollout, is_weights, off_policy_sequence_mask, rejection_mask
from agentrl.algorithms.kl import ESTIMATORS, kl_loss, kl_penalty
from agentrl.algorithms.losses import POLICY_LOSSES, entropy_bonus, policy_loss, value_loss

SEEDS = st.integers(0, 2**16)
JUNK = [1e30, math.inf, -math.inf, math.nan]
PARAMS: dict[str, dict[str, Any]] = {
    "dro": {"dro_beta": 0.1},
    "ppo": {"clip_ratio_c": 1.5},
    "reinforce": {"is_level": "sequence"},
    "decoupled_ppo": {"proximal_version": 5, "behav_weight_cap": 1.2},
    "kl_cov": {"kl_cov_ratio": 0.3},
    "clip_cov": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.01},
}
few = settings(max_examples=10, deadline=None)


@dataclass(frozen=True)
class Batch:
    """[B, T] each, with holes, right padding, one empty row, two groups of three and a lone row."""

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    weights: Tensor
    rewards: Tensor
    values: Tensor
    versions: Tensor
    turn_ids: Tensor
    mask: Tensor

    def rows(self, chosen: Tensor, width: int | None = None) -> "Batch":
        return Batch(**{f.name: getattr(self, f.name)[chosen][:, :width] for f in fields(self)})


GROUPS = torch.tensor([3, 3, 3, 1, 1, 1, 2, 9])


def make(seed: int, *, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (8, 9)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype) * (high - low) + low

    lengths = torch.randint(1, shape[1] + 1, (8, 1), generator=generator)
    mask = (torch.rand(shape, generator=generator) < 0.7) & (torch.arange(shape[1]) < lengths)
    mask[:, 0] = True
    mask[7] = False
    old = uniform(-4, -0.01)
    return Batch(
        log_probs=(old + uniform(-spread, spread)).clamp(max=-1e-3),
        old_log_probs=old,
        advantages=torch.randn(shape, generator=generator, dtype=dtype),
        weights=uniform(0, 2),
        rewards=torch.randint(-1, 3, shape, generator=generator).to(dtype),
        values=uniform(-1, 1),
        versions=torch.randint(0, 6, shape, generator=generator),
        turn_ids=torch.arange(shape[1]).div(3, rounding_mode="floor").expand(shape),
        mask=mask,
    )


def spoil(batch: Batch, junk: float) -> Batch:
    """Junk at every masked place."""
    spoiled = {
        f.name: torch.where(batch.mask, getattr(batch, f.name), junk)
        for f in fields(batch)
        if f.name not in ("mask", "versions", "turn_ids")
    }
    integers = {name: torch.where(batch.mask, getattr(batch, name), -99) for name in ("versions", "turn_ids")}
    return replace(batch, **spoiled, **integers)


def loss_of(name: str, batch: Batch, mode: str = "token-mean", **extra: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient, metrics."""
    params = dict(PARAMS.get(name, {})) | extra
    if name == "decoupled_ppo":
        params["versions"] = batch.versions
    if name == "clip_cov" and "covariance_mask" not in params:
        params["generator"] = torch.Generator().manual_seed(0)
    log_probs = batch.log_probs.clone().requires_grad_()
    loss, metrics = policy_loss(
        name,
        log_probs=log_probs,
        old_log_probs=batch.old_log_probs,
        advantages=batch.advantages,
        mask=batch.mask,
        loss_agg_mode=mode,
        rollout_is_weights=batch.weights,
        **params,
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient, metrics


def same(left: Any, right: Any, *, exact: bool = True) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(left, right, **tolerance)


# ---- I2: masked tokens do not matter


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@few
@given(seed=SEEDS, junk=st.sampled_from(JUNK), mode=st.sampled_from(LOSS_AGG_MODES))
def test_masked_tokens_touch_no_policy_loss_gradient_or_metric(name: str, seed: int, junk: float, mode: str) -> None:
    batch = make(seed)
    same(loss_of(name, batch, mode), loss_of(name, spoil(batch, junk), mode))


ADVANTAGE_INPUTS: dict[str, Callable[[Batch], dict[str, Any]]] = {
    "gae": lambda b: {"values": b.values, "gamma": 0.9, "lam": 0.8},
    "grpo": lambda b: {},
    "grpo_passk": lambda b: {},
    "rloo": lambda b: {},
    "opo": lambda b: {},
    "gpg": lambda b: {},
    "gdpo": lambda b: {"reward_terms": {"a": b.rewards, "b": b.values}},
    "reinforce_plus_plus": lambda b: {"gamma": 0.9},
    "reinforce_plus_plus_baseline": lambda b: {},
    "remax": lambda b: {"reward_baselines": torch.linspace(-1, 1, len(b.mask), dtype=torch.float64)},
    "optimal_token_baseline": lambda b: {"old_log_probs": b.old_log_probs, "sum_pi_squared": b.values.abs()},
    "tir_optimal_token_baseline": lambda b: {
        "old_log_probs": b.old_log_probs,
        "sum_pi_squared": b.values.abs(),
        "rollout_is_weights": b.weights,
    },
    "turn_grpo": lambda b: {"turn_ids": b.turn_ids},
    "turn_return": lambda b: {"turn_ids": b.turn_ids, "gamma": 0.9},
    "gigpo": lambda b: {"turn_ids": b.turn_ids, "anchor_ids": b.turn_ids.clamp(max=1)},
}


def advantages_of(name: str, batch: Batch, groups: Tensor = GROUPS) -> tuple[Tensor, Tensor]:
    return compute_advantages(name, rewards=batch.rewards, mask=batch.mask, groups=groups, **ADVANTAGE_INPUTS[name](batch))


@pytest.mark.parametrize("name", sorted(ADVANTAGE_INPUTS))
@few
@given(seed=SEEDS, junk=st.sampled_from(JUNK))
def test_masked_tokens_touch_no_advantage(name: str, seed: int, junk: float) -> None:
    batch = make(seed)
    clean, dirty = advantages_of(name, batch), advantages_of(name, spoil(batch, junk))
    same(clean, dirty)
    assert all(bool(out.isfinite().all()) for out in clean)


@few
@given(seed=SEEDS, junk=st.sampled_from(JUNK), estimator=st.sampled_from(ESTIMATORS))
def test_masked_tokens_touch_neither_kl_value_entropy_nor_correction(seed: int, junk: float, estimator: str) -> None:
    def everything(batch: Batch) -> list[Any]:
        log_probs, vpreds, entropy = (x.clone().requires_grad_() for x in (batch.log_probs, batch.values, batch.weights))
        kl = kl_loss(log_probs, batch.old_log_probs, batch.mask, estimator=estimator, loss_agg_mode="token-mean")
        value, clipfrac = value_loss(
            vpreds=vpreds,
            returns=batch.rewards,
            values=batch.advantages,
            mask=batch.mask,
            cliprange_value=0.2,
            loss_agg_mode="token-mean",
        )
        bonus, mean_entropy = entropy_bonus(entropy, batch.mask, coefficient=0.1, loss_agg_mode="seq-mean-token-mean")
        gradients = torch.autograd.grad(kl + value + bonus, [log_probs, vpreds, entropy])
        corrected = correct_rollout(
            batch.log_probs,
            batch.old_log_probs,
            batch.mask,
            is_level="sequence",
            is_threshold="0.5_2",
            is_batch_normalize=True,
            rules=RULES,
            thresholds=["0.6_1.7" if rule.endswith("k1") else 0.1 for rule in RULES],
        )
        sequences = off_policy_sequence_mask(batch.log_probs - batch.old_log_probs, batch.advantages, batch.mask, threshold=0.01)
        return [
            (kl.detach(), value.detach(), clipfrac, bonus.detach(), mean_entropy),
            gradients,
            (corrected.weights, corrected.mask, sequences),
            corrected.metrics,
        ]

    batch = make(seed)
    for clean, dirty in zip(everything(batch), everything(spoil(batch, junk)), strict=True):
        same(clean, dirty)


# ---- I8: the cut into micro-batches does not matter


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@few
@given(seed=SEEDS, mode=st.sampled_from(LOSS_AGG_MODES))
def test_micro_batches_sum_to_the_whole_batch(name: str, seed: int, mode: str) -> None:
    batch = make(seed)
    generator = torch.Generator().manual_seed(seed)
    counts = {
        "num_tokens": int(batch.mask.sum()),
        "num_sequences": int(batch.mask.any(dim=1).sum()),
        "horizon": batch.mask.shape[1],
    }
    chosen = batch.mask & (torch.rand(batch.mask.shape, generator=generator) < 0.3)

    def run(part: Batch, selected: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return loss_of(name, part, mode, **counts, **({"covariance_mask": selected} if name.endswith("_cov") else {}))

    whole_loss, whole_gradient, whole_metrics = run(batch, chosen)
    gradient = torch.zeros_like(whole_gradient)
    losses: list[Tensor] = []
    metrics: list[dict[str, Tensor]] = []
    for rows in torch.randperm(8, generator=generator).split([1, 3, 4]):
        width = max(int(batch.mask[rows].sum(dim=0).nonzero().max()) + 1 if batch.mask[rows].any() else 1, 1)
        loss, part, measured = run(batch.rows(rows, width), chosen[rows][:, :width])
        gradient[rows, :width] = part
        losses.append(loss)
        metrics.append(measured)
    same(torch.stack(losses).sum(), whole_loss, exact=False)
    same(gradient, whole_gradient, exact=False)
    for key, value in whole_metrics.items():
        same(torch.stack([measured[key] for measured in metrics]).sum(), value, exact=False)


@few
@given(seed=SEEDS, mode=st.sampled_from(LOSS_AGG_MODES))
def test_kl_value_and_entropy_terms_also_sum_over_micro_batches(seed: int, mode: str) -> None:
    batch = make(seed)
    counts = {"num_tokens": int(batch.mask.sum()), "num_sequences": int(batch.mask.any(dim=1).sum()), "horizon": 9}

    def terms(part: Batch) -> Tensor:
        kl = kl_loss(part.log_probs, part.old_log_probs, part.mask, estimator="k3+", loss_agg_mode=mode, **counts)
        value, clipfrac = value_loss(
            vpreds=part.values,
            returns=part.rewards,
            values=part.advantages,
            mask=part.mask,
            cliprange_value=0.3,
            loss_agg_mode=mode,
            **counts,
        )
        bonus, _ = entropy_bonus(part.weights, part.mask, coefficient=0.1, loss_agg_mode=mode, **counts)
        return torch.stack([kl, value, clipfrac, bonus])

    parts = [terms(batch.rows(rows)) for rows in torch.arange(8).split(3)]
    same(torch.stack(parts).sum(dim=0), terms(batch), exact=False)


# ---- order, padding, shifts


@pytest.mark.parametrize("name", sorted(ADVANTAGE_INPUTS))
@few
@given(seed=SEEDS)
def test_advantages_follow_their_rows_when_rows_and_labels_are_shuffled(name: str, seed: int) -> None:
    batch = make(seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    relabelled = (GROUPS * 7 + 1)[order]
    inputs = ADVANTAGE_INPUTS[name](batch)
    if "reward_baselines" in inputs:
        return_order = {"reward_baselines": inputs["reward_baselines"][order]}
    else:
        return_order = ADVANTAGE_INPUTS[name](batch.rows(order))
    shuffled = batch.rows(order)
    for out, expected in zip(
        compute_advantages(name, rewards=shuffled.rewards, mask=shuffled.mask, groups=relabelled, **return_order),
        advantages_of(name, batch),
        strict=True,
    ):
        same(out, expected[order], exact=False)


@pytest.mark.parametrize("name", sorted(set(ADVANTAGE_INPUTS) - {"optimal_token_baseline"}))
@few
@given(seed=SEEDS, at=st.integers(0, 9))
def test_more_tool_output_changes_no_advantage(name: str, seed: int, at: int) -> None:
    """A masked column anywhere: returns cross it. (The single-turn token baseline compares positions and is exempt.)"""
    batch = make(seed)

    def widen(values: Tensor) -> Tensor:
        return torch.cat([values[:, :at], torch.zeros_like(values[:, :1]), values[:, at:]], dim=1)

    wider = Batch(**{f.name: widen(getattr(batch, f.name)) for f in fields(batch)})
    for out, expected in zip(advantages_of(name, wider), advantages_of(name, batch), strict=True):
        same(out[wider.mask], expected[batch.mask], exact=False)


@pytest.mark.parametrize("name", sorted(set(POLICY_LOSSES) - {"clip_cov"}))
@few
@given(seed=SEEDS, mode=st.sampled_from(LOSS_AGG_MODES))
def test_row_order_and_right_padding_do_not_change_a_loss(name: str, seed: int, mode: str) -> None:
    batch = make(seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    padded = Batch(
        **{
            f.name: torch.cat([getattr(batch, f.name), torch.zeros_like(getattr(batch, f.name)[:, :2])], dim=1)[order]
            for f in fields(batch)
        }
    )
    loss, gradient, metrics = loss_of(name, batch, mode, horizon=9)
    moved_loss, moved_gradient, moved_metrics = loss_of(name, padded, mode, horizon=9)
    same(moved_loss, loss, exact=False)
    same(moved_gradient[:, :9], gradient[order], exact=False)
    same(moved_metrics, metrics, exact=False)


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "grpo_passk", "reinforce_plus_plus_baseline", "turn_return"])
@few
@given(seed=SEEDS, shift=st.floats(-5, 5))
def test_a_constant_added_to_every_score_of_a_group_changes_nothing(name: str, seed: int, shift: float) -> None:
    batch = make(seed)
    rows = torch.arange(6)  # two groups of three; a lone row keeps its raw reward by default
    first = torch.zeros_like(batch.rewards)
    first[:, 0] = shift
    params = {} if name == "turn_return" else ADVANTAGE_INPUTS[name](batch)
    if name == "turn_return":
        params = {"turn_ids": torch.zeros_like(batch.turn_ids)[rows]}
    plain, _ = compute_advantages(name, rewards=batch.rewards[rows], mask=batch.mask[rows], groups=GROUPS[rows], **params)
    shifted, _ = compute_advantages(
        name, rewards=(batch.rewards + first)[rows], mask=batch.mask[rows], groups=GROUPS[rows], **params
    )
    torch.testing.assert_close(shifted, plain, rtol=1e-6, atol=1e-6)


@few
@given(seed=SEEDS, scale=st.floats(0.1, 50))
def test_grpo_does_not_see_the_scale_of_rewards(seed: int, scale: float) -> None:
    batch = make(seed).rows(torch.arange(6))
    plain, _ = compute_advantages("grpo", rewards=batch.rewards, mask=batch.mask, groups=GROUPS[:6])
    scaled, _ = compute_advantages("grpo", rewards=batch.rewards * scale, mask=batch.mask, groups=GROUPS[:6])
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-4)  # epsilon against a std of at least 0.05


@few
@given(seed=SEEDS, estimator=st.sampled_from(["k2", "k3", "abs", "k2+", "k3+"]))
def test_these_estimators_are_never_negative_and_zero_at_equality(seed: int, estimator: str) -> None:
    batch = make(seed, spread=5.0)
    assert bool((kl_penalty(batch.log_probs, batch.old_log_probs, estimator) >= 0).all())
    assert kl_penalty(batch.log_probs, batch.log_probs, estimator).abs().max() == 0


@few
@given(seed=SEEDS)
def test_tighter_thresholds_reject_more_and_rejection_only_removes(seed: int) -> None:
    batch = make(seed)
    log_ratio = batch.log_probs - batch.old_log_probs
    for rule in RULES:
        loose = rejection_mask(log_ratio, batch.mask, rules=rule, thresholds=3.0)
        tight = rejection_mask(log_ratio, batch.mask, rules=rule, thresholds=1.2 if rule.endswith("k1") else 0.05)
        assert bool((tight <= loose).all())
        assert bool((loose <= batch.mask).all())


# ---- fp32 at the extremes


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@few
@given(seed=SEEDS, spread=st.sampled_from([30.0, 200.0, 5000.0]), mode=st.sampled_from(LOSS_AGG_MODES))
def test_extreme_ratios_stay_finite_in_fp32(name: str, seed: int, spread: float, mode: str) -> None:
    batch = make(seed, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    low = -torch.rand(batch.mask.shape, generator=generator) * spread
    wild = replace(
        batch, log_probs=low, old_log_probs=low.flip(0), advantages=batch.advantages * 1e3, weights=batch.weights * 1e3
    )
    loss, gradient, metrics = loss_of(name, wild, mode)
    assert loss.isfinite()
    assert bool(gradient.isfinite().all())
    assert all(bool(value.isfinite()) for value in metrics.values())


@few
@given(seed=SEEDS, spread=st.sampled_from([30.0, 5000.0]), level=st.sampled_from(["token", "sequence"]))
def test_extreme_gaps_stay_finite_in_correction_and_kl(seed: int, spread: float, level: str) -> None:
    batch = make(seed, dtype=torch.float32)
    low = -torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(seed)) * spread
    corrected = correct_rollout(low, low.flip(0), batch.mask, is_level=level, is_threshold=1e9, rules=RULES, thresholds=2.0)
    assert corrected.weights is not None
    assert bool(corrected.weights.isfinite().all())
    assert all(bool(value.isfinite()) for value in corrected.metrics.values())
    for estimator in ESTIMATORS:
        log_probs = low.clone().requires_grad_()
        kl = kl_penalty(log_probs, low.flip(0), estimator)
        (gradient,) = torch.autograd.grad(kl.sum(), log_probs)
        assert bool(kl.isfinite().all()), estimator
        assert bool(gradient.isfinite().all()), estimator


@few
@given(seed=SEEDS)
def test_weights_are_one_when_nothing_moved(seed: int) -> None:
    """I9: staleness 0 and the same weights give ratio 1."""
    batch = make(seed)
    for level in ("token", "sequence"):
        weights = is_weights(
            torch.zeros_like(batch.mask, dtype=torch.float32), batch.mask, level=level, threshold=2.0, batch_normalize=True
        )
        assert torch.equal(weights, batch.mask.float())
