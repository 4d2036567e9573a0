"""Importance weights, rejection rules and the measures of the gap, by hand."""

import math

import pytest
import torch

from agentrl.algorithms.correction import (
    RULES,
    correct_rollout,
    effective_sample_size,
    is_weights,
    off_policy_sequence_mask,
    offpolicy_metrics,
    parse_bounds,
    rejection_mask,
    weight_metrics,
)

MASK = torch.tensor([[True, False, True], [True, True, False]])
RATIOS = torch.tensor([[4.0, 1.0, 0.5], [1.0, 0.25, 1.0]], dtype=torch.float64)
LOG_RATIO = RATIOS.log().masked_fill(~MASK, math.nan)


def weights(level: str, threshold: object, *, batch_normalize: bool = False, **params: object) -> list[list[float]]:
    return is_weights(LOG_RATIO, MASK, level=level, threshold=threshold, batch_normalize=batch_normalize, **params).tolist()  # pyright: ignore[reportArgumentType]


def test_truncation_caps_tokens_or_the_product_of_the_row() -> None:
    assert sum(weights("token", 2.0), []) == pytest.approx([2.0, 0, 0.5, 1.0, 0.25, 0])
    assert sum(weights("sequence", 1.5), []) == pytest.approx([1.5, 0, 1.5, 0.25, 0.25, 0])


@pytest.mark.parametrize("threshold", ["0.4_3.0", (0.4, 3.0)])
def test_icepop_zeroes_what_lies_outside_both_bounds(threshold: object) -> None:
    assert sum(weights("token", threshold), []) == pytest.approx([0, 0, 0.5, 1.0, 0, 0])


def test_normalisation_makes_the_mean_one_over_tokens_or_over_rows() -> None:
    assert torch.tensor(weights("token", 9.0, batch_normalize=True)).sum().item() == pytest.approx(4)
    rows = weights("sequence", 9.0, batch_normalize=True)
    assert (rows[0][0] + rows[1][0]) / 2 == pytest.approx(1)
    assert weights("token", 9.0, batch_normalize=True, batch_mean=2.0)[0][0] == pytest.approx(2.0)
    assert weights("token", "30_40", batch_normalize=True) == [[0.0] * 3] * 2


def test_effective_sample_size_is_the_share_of_tokens_that_count() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert effective_sample_size(torch.ones(1, 4), mask).item() == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([[1.0, 0, 0, 0]]), mask).item() == pytest.approx(0.25)
    assert effective_sample_size(torch.zeros(1, 4), mask).item() == 0


KEPT_ALL = [[True, False, True], [True, True, False]]
FIRST_ROW_GONE = [[False] * 3, [True, True, False]]
SECOND_ROW_GONE = [[True, False, True], [False] * 3]
LOG2, LOG4 = math.log(2), math.log(4)


@pytest.mark.parametrize(
    ("rule", "threshold", "kept"),
    [
        ("token_k1", "0.5_3", [[False, False, True], [True, False, False]]),  # bounds on rollout / trained: 1/4, 2 and 1, 4
        ("token_k1", 4.0, KEPT_ALL),
        ("token_k1", [0.25, 4.0], KEPT_ALL),
        ("token_k2", 0.5, [[False, False, True], [True, False, False]]),
        ("token_k3", 0.7, [[False, False, True], [True, True, False]]),  # 4 - 1 - log 4 = 1.6, 0.25 - 1 + log 4 = 0.64
        ("seq_sum_k1", "0.6_4.1", FIRST_ROW_GONE),  # log 1/2 and log 4
        ("seq_sum_k2", LOG4**2 / 2 + 0.01, FIRST_ROW_GONE),
        ("seq_sum_k3", 1.0, FIRST_ROW_GONE),
        ("seq_mean_k1", "0.5_1.9", SECOND_ROW_GONE),
        ("seq_mean_k2", LOG4**2 / 4 + 0.01, FIRST_ROW_GONE),
        ("seq_mean_k3", 0.5, FIRST_ROW_GONE),
        ("seq_max_k2", LOG4**2 / 2 + 0.01, KEPT_ALL),
        ("seq_max_k3", 1.0, FIRST_ROW_GONE),
    ],
)
def test_each_rejection_rule_by_hand(rule: str, threshold: object, kept: list[list[bool]]) -> None:
    assert rejection_mask(LOG_RATIO, MASK, rules=rule, thresholds=threshold).tolist() == kept  # pyright: ignore[reportArgumentType]


def test_there_are_eleven_rules_and_all_given_ones_must_pass() -> None:
    assert len(RULES) == 11
    by_text = rejection_mask(LOG_RATIO, MASK, rules="token_k1, seq_max_k3", thresholds="0.5_3, 1.0")
    by_sequence = rejection_mask(LOG_RATIO, MASK, rules=["token_k1", "seq_max_k3"], thresholds=[(0.5, 3.0), 1.0])
    by_name = rejection_mask(
        LOG_RATIO, MASK, rules=["token_k1", "seq_max_k3"], thresholds={"seq_max_k3": 1.0, "token_k1": "0.5_3"}
    )
    assert by_text.tolist() == by_sequence.tolist() == by_name.tolist() == [[False] * 3, [True, False, False]]


@pytest.mark.parametrize(
    ("rules", "thresholds", "message"),
    [
        ("token_k9", 1.0, "token_k9"),
        ("", 1.0, "unknown"),
        ("token_k2", "0.1_0.2", "one upper bound"),
        ("token_k1", 0.5, "above 1"),
        ("token_k1", "2_1", "lower <= upper"),
        ("token_k1,token_k2", "1.1,1.2,1.3", "3 thresholds for 2"),
        (["token_k1"], {"token_k2": 1.0}, "no threshold for token_k1"),
        ("token_k3", "tight", "neither a number nor a pair"),
    ],
)
def test_rules_and_thresholds_that_make_no_sense_are_refused(rules: object, thresholds: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rejection_mask(LOG_RATIO, MASK, rules=rules, thresholds=thresholds)  # pyright: ignore[reportArgumentType]


def test_bounds_are_read_from_numbers_text_and_pairs() -> None:
    assert parse_bounds(2) == (None, 2.0)
    assert parse_bounds("1e-3") == (None, 1e-3)
    assert parse_bounds("0.5_5") == parse_bounds((0.5, 5)) == (0.5, 5.0)
    with pytest.raises(ValueError, match="importance level 'turn'"):
        weights("turn", 2.0)


def test_only_rows_both_bad_and_stale_are_dropped() -> None:
    log_ratio = torch.tensor([[-1.0, 0.0], [-1.0, 0.0], [0.1, 0.0]])
    advantages = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    mask = torch.ones(3, 2, dtype=torch.bool)
    kept = off_policy_sequence_mask(log_ratio, advantages, mask, threshold=0.4)
    assert kept.tolist() == [[False, False], [True, True], [True, True]]


def test_metrics_of_the_gap_by_hand() -> None:
    rollout = torch.tensor([[-1.0, math.nan, -2.0], [-1.0, -3.0, math.inf]], dtype=torch.float64)
    metrics = {name: value.item() for name, value in offpolicy_metrics(rollout + LOG_RATIO, rollout, MASK).items()}
    first, second = (LOG4 - LOG2) / 2, -LOG4 / 2  # mean log-ratio of each row
    assert metrics["kl"] == pytest.approx((LOG2 - LOG4 + 0 + LOG4) / 4)
    assert metrics["chi2_token"] == pytest.approx((16 + 0.25 + 1 + 1 / 16) / 4 - 1)
    assert metrics["chi2_seq"] == pytest.approx((4 + 1 / 16) / 2 - 1)
    assert metrics["rollout_log_ppl"] == pytest.approx((1.5 + 2) / 2)
    assert metrics["training_ppl"] == pytest.approx((math.exp(1.5 - first) + math.exp(2 - second)) / 2)
    assert metrics["log_ppl_diff"] == pytest.approx(-(first + second) / 2)
    assert metrics["log_ppl_diff_max"] == pytest.approx(-second)
    assert metrics["log_ppl_diff_min"] == pytest.approx(-first)
    assert metrics["ppl_ratio"] == pytest.approx((math.exp(-first) + math.exp(-second)) / 2)


def test_rows_without_sampled_tokens_can_be_left_out_of_the_means() -> None:
    mask = torch.tensor([[True], [False]])
    log_probs = torch.tensor([[-2.0], [-9.0]])
    assert offpolicy_metrics(log_probs, log_probs, mask)["training_log_ppl"].item() == pytest.approx(1.0)
    left_out = offpolicy_metrics(log_probs, log_probs, mask, count_empty_rows=False)
    assert left_out["training_log_ppl"].item() == pytest.approx(2.0)


def test_weight_metrics_tell_what_truncation_hides() -> None:
    metrics = {name: value.item() for name, value in weight_metrics(LOG_RATIO, MASK, level="token", threshold=2.0).items()}
    assert metrics["rollout_is_mean"] == pytest.approx((2 + 0.5 + 1 + 0.25) / 4)
    assert metrics["rollout_is_ratio_fraction_high"] == pytest.approx(0.25)
    assert metrics["rollout_is_ratio_fraction_low"] == pytest.approx(0.25)
    assert metrics["rollout_is_max"] == pytest.approx(2.0)
    assert metrics["rollout_is_min"] == pytest.approx(0.25)
    assert metrics["rollout_is_seq_max"] == pytest.approx(1.25)
    assert metrics["rollout_is_seq_fraction_high"] == pytest.approx(0.5)


def test_one_call_gives_weights_mask_and_prefixed_metrics() -> None:
    rollout = torch.full_like(LOG_RATIO, -1.0)
    measured = correct_rollout(rollout + LOG_RATIO, rollout, MASK)
    assert measured.weights is None
    assert torch.equal(measured.mask, MASK)
    corrected = correct_rollout(
        rollout + LOG_RATIO,
        rollout,
        MASK,
        is_level="token",
        is_batch_normalize=True,
        rules="token_k1,seq_max_k3",
        thresholds="0.5_3,5",
    )
    assert corrected.weights is not None
    assert corrected.weights.sum().item() == pytest.approx(4)
    assert corrected.mask.tolist() == [[False, False, True], [True, False, False]]
    metrics = {name: value.item() for name, value in corrected.metrics.items()}
    assert all(name.startswith("rollout_corr/") for name in metrics)
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(0.5)
    assert metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx(1.0)
    assert metrics["rollout_corr/rollout_rs_token_k1_masked_fraction"] == pytest.approx(0.5)
    assert metrics["rollout_corr/rollout_rs_seq_max_k3_masked_fraction"] == 0
    assert metrics["rollout_corr/rollout_is_batch_norm_factor"] == pytest.approx(3.75 / 4)
    assert set(metrics) > {f"rollout_corr/{name}" for name in offpolicy_metrics(rollout, rollout, MASK)}
    with pytest.raises(ValueError, match="need thresholds"):
        correct_rollout(rollout, rollout, MASK, rules="token_k1")
