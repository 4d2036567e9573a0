"""Concurrency and counter policies: bounds, direction, convergence, and what three reports must agree on."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.serving.load_policy import ConcurrencyPolicy, Count, Drift, LoadReport, drift_of, next_limit, parse_loads

reports = st.builds(
    LoadReport,
    running=st.integers(0, 500),
    waiting=st.integers(0, 500),
    held=st.just(0),
    cache_usage=st.floats(0, 1),
    max_running=st.none() | st.integers(1, 512),
)
limits = st.none() | st.floats(4, 4096)
POLICY = ConcurrencyPolicy()


@given(limit=limits, report=reports, in_flight=st.integers(0, 5000))
def test_the_limit_stays_within_its_bounds(limit: float | None, report: LoadReport, in_flight: int) -> None:
    assert POLICY.floor <= next_limit(limit, report, in_flight) <= POLICY.ceiling


@given(limit=limits, report=reports, in_flight=st.integers(0, 5000), more=st.integers(1, 500))
def test_a_longer_queue_never_gives_a_higher_limit(limit: float | None, report: LoadReport, in_flight: int, more: int) -> None:
    longer = LoadReport(
        running=report.running,
        waiting=report.waiting + more,
        held=0,
        cache_usage=report.cache_usage,
        max_running=report.max_running,
    )
    assert next_limit(limit, longer, in_flight) <= next_limit(limit, report, in_flight)


@given(limit=st.floats(4, 4096), report=reports, in_flight=st.integers(0, 5000))
def test_the_limit_grows_only_where_it_holds_requests_back(limit: float, report: LoadReport, in_flight: int) -> None:
    if in_flight < int(limit):
        assert next_limit(limit, report, in_flight) <= max(limit, POLICY.floor)


@given(places=st.integers(8, 400), start=st.floats(4, 4096))
def test_under_constant_demand_the_engine_ends_up_full_with_a_short_queue(places: int, start: float) -> None:
    limit = start
    seen: list[float] = []
    for _ in range(300):
        in_flight = int(limit)
        report = LoadReport(
            running=min(in_flight, places), waiting=max(0, in_flight - places), held=0, cache_usage=0.5, max_running=None
        )
        limit = next_limit(limit, report, in_flight)
        seen.append(limit)
    assert min(seen[-50:]) >= 0.7 * places
    assert max(seen[-50:]) <= 1.4 * places + 4


@given(drained=st.integers(1, 5000))
def test_an_empty_engine_is_never_throttled_to_nothing(drained: int) -> None:
    idle = LoadReport(running=0, waiting=0, held=0, cache_usage=0.0, max_running=None)
    limit = float(POLICY.floor)
    for _ in range(drained % 50):
        limit = next_limit(limit, idle, int(limit))
    assert limit >= POLICY.floor


def test_a_full_cache_with_a_queue_lowers_the_limit() -> None:
    report = LoadReport(running=100, waiting=2, held=0, cache_usage=0.99, max_running=None)
    assert next_limit(100.0, report, 102) == pytest.approx(80.0)


def test_the_first_limit_is_what_the_engine_batches_at_once() -> None:
    report = LoadReport(running=0, waiting=0, held=0, cache_usage=0.0, max_running=48)
    assert next_limit(None, report, 0) == 48


def test_reports_of_data_parallel_ranks_add_up() -> None:
    rank = {"num_running_reqs": 3, "num_waiting_reqs": 1, "token_usage": 0.2, "max_running_requests": 16}
    other = rank | {"token_usage": 0.6, "queues": {"paused": 2, "retracted": 1}}
    report = parse_loads({"loads": [rank, other]})
    assert (report.running, report.waiting, report.held, report.total) == (6, 3, 2, 11)
    assert (report.cache_usage, report.max_running) == (0.6, 32)
    with pytest.raises(ValueError, match="names no rank"):
        parse_loads({"loads": []})


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"loads": 3},
        {"loads": [None]},
        {"loads": [{}]},
        {"loads": [{"num_running_reqs": "x", "num_waiting_reqs": 0}]},
        {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0, "queues": [3]}]},
        {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0, "token_usage": [1]}]},
    ],
)
def test_what_is_no_load_report_is_one_kind_of_error(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="load report|rank|invalid"):
        parse_loads(body)


def counted(*pairs: tuple[int, int, int]) -> list[Count]:
    return [Count(at=float(i), least=least, most=most, reported=reported) for i, (least, most, reported) in enumerate(pairs)]


def test_a_difference_counts_only_when_three_reports_agree() -> None:
    assert drift_of(counted((2, 2, 5), (2, 2, 5))) == Drift()
    assert drift_of(counted((2, 2, 5), (2, 4, 5), (2, 2, 9))) == Drift(foreign=1)
    assert drift_of(counted((2, 2, 5), (2, 2, 2), (2, 2, 9))) == Drift()
    assert drift_of(counted((3, 3, 0), (2, 3, 0), (3, 4, 0))) == Drift(missing=2, is_idle=True)
    assert drift_of(counted((3, 3, 1), (3, 3, 1), (3, 3, 1))) == Drift(missing=2)


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda p: (min(p), max(p), (min(p) + max(p)) // 2)), max_size=8
    )
)
def test_reports_between_our_own_counts_are_never_drift(pairs: list[tuple[int, int, int]]) -> None:
    drift = drift_of(counted(*pairs))
    assert (drift.foreign, drift.missing) == (0, 0)
