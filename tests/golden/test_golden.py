"""Every number of the reference file: values and gradients, float64, 1e-6."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agentrl.algorithms.advantages import compute_advantages
from agentrl.algorithms.correction import is_weights, offpolicy_metrics, rejection_mask
from agentrl.algorithms.kl import kl_penalty
from agentrl.algorithms.losses import policy_loss, value_loss

TOLERANCE = 1e-6
CASES: list[dict[str, Any]] = json.loads(gzip.decompress((Path(__file__).parent / "rl_math.json.gz").read_bytes()))["cases"]


def cases(kind: str) -> list[Any]:
    chosen = [case for case in CASES if case["kind"] == kind]
    assert chosen, kind
    return [
        pytest.param(case, id=f"{case['name']}-seed{case['seed']}{'-edge' if case['edge'] else ''}-{index}")
        for index, case in enumerate(chosen)
    ]


def tensors(values: dict[str, Any], mask_dtype: torch.dtype = torch.bool) -> dict[str, Tensor]:
    made = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items() if name != "groups"}
    if "groups" in values:
        made["groups"] = torch.tensor(values["groups"])
    if "mask" in made:
        made["mask"] = made["mask"].to(mask_dtype)
    return made


def close(actual: Any, expected: Any) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_file_is_the_one_that_was_reviewed() -> None:
    assert len(CASES) == 291
    assert {case["kind"] for case in CASES} == {
        "advantage",
        "policy_loss",
        "kl",
        "value_loss",
        "is_weights",
        "rejection_mask",
        "offpolicy_metrics",
    }


@pytest.mark.parametrize("case", cases("advantage"))
def test_advantages_and_returns(case: dict[str, Any]) -> None:
    inputs = tensors(case["inputs"])
    advantages, returns = compute_advantages(case["name"], **inputs, **case["params"])
    expected = tensors(case["outputs"])
    kept = inputs["mask"]
    close(advantages[kept], expected["advantages"][kept])
    close(returns[kept], expected["returns"][kept])


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("case", cases("policy_loss"))
def test_policy_losses_gradients_and_metrics(case: dict[str, Any], mask_dtype: torch.dtype) -> None:
    inputs = tensors(case["inputs"], mask_dtype)
    inputs["log_probs"].requires_grad_()
    loss, metrics = policy_loss(case["name"], **inputs, **case["params"])
    loss.backward()
    outputs = dict(case["outputs"])
    close(loss.detach(), outputs.pop("loss"))
    close(inputs["log_probs"].grad, outputs.pop("grad_log_probs"))
    for name, value in outputs.items():
        close(metrics[name], value)


@pytest.mark.parametrize("case", cases("kl"))
def test_kl_estimators_and_gradients(case: dict[str, Any]) -> None:
    inputs = tensors(case["inputs"])
    log_probs = inputs["log_probs"].requires_grad_()
    kl = kl_penalty(log_probs, inputs["ref_log_probs"], case["name"])
    (kl * inputs["mask"]).sum().backward()
    close(kl.detach(), case["outputs"]["kl"])
    close(log_probs.grad, case["outputs"]["grad_log_probs"])


@pytest.mark.parametrize("case", cases("value_loss"))
def test_value_loss_and_gradient(case: dict[str, Any]) -> None:
    inputs = tensors(case["inputs"])
    inputs["vpreds"].requires_grad_()
    loss, clipfrac = value_loss(**inputs, **case["params"], loss_agg_mode="token-mean")
    loss.backward()
    close(loss.detach(), case["outputs"]["loss"])
    close(clipfrac, case["outputs"]["clipfrac"])
    close(inputs["vpreds"].grad, case["outputs"]["grad_vpreds"])


@pytest.mark.parametrize("case", cases("is_weights"))
def test_importance_weights(case: dict[str, Any]) -> None:
    inputs = tensors(case["inputs"])
    close(is_weights(**inputs, level=case["name"], **case["params"]), case["outputs"]["weights"])


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("case", cases("rejection_mask"))
def test_rejection_rules(case: dict[str, Any], mask_dtype: torch.dtype) -> None:
    inputs = tensors(case["inputs"], mask_dtype)
    kept = rejection_mask(**inputs, rules=case["name"], thresholds=case["params"]["threshold"])
    assert kept.dtype == mask_dtype
    close(kept, case["outputs"]["mask"])


@pytest.mark.parametrize("case", cases("offpolicy_metrics"))
def test_offpolicy_metrics(case: dict[str, Any]) -> None:
    metrics = offpolicy_metrics(**tensors(case["inputs"]))
    assert set(metrics) == set(case["outputs"])
    for name, value in case["outputs"].items():
        close(metrics[name], value)
