"""Metrics are declared once, and the page says what the code says."""

from pathlib import Path

from agentrl.telemetry.metrics import CHAPTERS, Metric, is_declared, markdown, undeclared

ROOT = Path(__file__).parents[3]


def test_the_page_is_what_the_declarations_say() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m agentrl.telemetry.metrics docs/metrics.md"


def test_families_are_spelled_out() -> None:
    assert list(Metric("a/{x,y}_{1,2}", "").names()) == ["a/x_1", "a/x_2", "a/y_1", "a/y_2"]


def test_a_name_is_declared_once() -> None:
    names = [name for chapter in CHAPTERS for metric in chapter.metrics for name in metric.names()]
    assert len(names) == len(set(names))
    assert all(metric.meaning for chapter in CHAPTERS for metric in chapter.metrics)


def test_only_what_is_described_counts_as_declared() -> None:
    assert is_declared("critic/values/max")
    assert is_declared("reward/format/mean")
    assert is_declared("rollout_corr/rollout_rs_seq_mean_k1_masked_fraction")
    assert undeclared(["actor/lr", "reward/a/b/mean", "critic/values", "actor/surprise"]) == [
        "actor/surprise",
        "critic/values",
        "reward/a/b/mean",
    ]
