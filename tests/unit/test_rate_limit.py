"""Token buckets over a made-up clock, and the middleware in front of the two services."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.errors import ConfigError
from agentrl.rate_limit import MAX_CLIENTS, Buckets, RateLimit


def test_a_client_may_burst_and_then_waits_for_the_rate() -> None:
    buckets = Buckets(10, burst=3)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [0, 0, 0, pytest.approx(0.1)]
    assert buckets.take("b", 0.0) == 0, "others are not held up"
    assert buckets.take("a", 0.05) == pytest.approx(0.05), "asking too early costs nothing"
    assert buckets.take("a", 0.1) == 0


@settings(max_examples=100, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=60), per_s=st.floats(0.1, 50), burst=st.integers(1, 10)
)  # fmt: skip
def test_no_window_lets_more_through_than_burst_plus_rate(gaps: list[float], per_s: float, burst: int) -> None:
    buckets, now, passed = Buckets(per_s, burst=burst), 0.0, []
    for gap in gaps:
        now += gap
        if buckets.take("a", now) == 0:
            passed.append(now)
    for i, first in enumerate(passed):
        for j in range(i, len(passed)):
            assert j - i + 1 <= burst + (passed[j] - first) * per_s + 1e-6


def test_a_clock_that_goes_back_gives_nothing_away_and_takes_nothing() -> None:
    buckets = Buckets(1, burst=1)
    assert buckets.take("a", 100.0) == 0
    assert buckets.take("a", 0.0) == pytest.approx(1.0)
    assert buckets.take("a", 101.0) == 0


def test_the_memory_of_clients_is_bounded() -> None:
    buckets = Buckets(1)
    for n in range(MAX_CLIENTS + 100):
        buckets.take(str(n), 0.0)
    assert len(buckets) == MAX_CLIENTS


@pytest.mark.parametrize("per_s", [0, -1, float("nan")])
def test_a_rate_that_lets_nothing_through_is_refused(per_s: float) -> None:
    with pytest.raises(ConfigError, match="rate_limit"):
        Buckets(per_s)


@pytest.mark.asyncio
async def test_a_flood_is_answered_with_429_before_the_application_sees_it() -> None:
    seen = 0

    async def app(
        scope: MutableMapping[str, Any], receive: Any, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]
    ) -> None:
        nonlocal seen
        seen += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    transport = httpx.ASGITransport(RateLimit(app, per_s=0.001))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        answers = [await client.get("/") for _ in range(4)]
    assert [a.status_code for a in answers] == [200, 429, 429, 429]
    assert seen == 1
    assert int(answers[1].headers["retry-after"]) >= 1
    assert "0.001 requests per second" in answers[1].json()["detail"]


def test_both_services_offer_the_limit() -> None:
    from agentrl.sandbox.app import create_app

    limited = [m.cls for m in create_app(rate_limit=5, max_concurrency=1).user_middleware]
    assert limited[0] is RateLimit, "outermost: wrong tokens count too"
    assert RateLimit not in [m.cls for m in create_app(rate_limit=None, max_concurrency=1).user_middleware]
