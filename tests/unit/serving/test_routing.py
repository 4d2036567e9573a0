"""Hand-computed server choices."""

import random

import pytest

from agentrl.serving.routing import Candidate, Overload, choose_server


def choose(loads: dict[str, int], home: str | None = None, prefix: int = 0) -> str:
    servers = [Candidate(url, tokens) for url, tokens in loads.items()]
    overload = Overload(tokens=100, prefixes=2.0, ratio=1.5)
    return choose_server(servers, home=home, prefix_tokens=prefix, overload=overload, rng=random.Random(0))


def test_without_a_home_the_least_loaded_server_takes_the_request() -> None:
    assert choose({"a": 10, "b": 9, "c": 11}) == "b"


def test_a_home_within_the_margin_keeps_the_request() -> None:
    assert choose({"a": 109, "b": 9}, home="a") == "a"


def test_a_home_beyond_the_margin_loses_it_to_the_best_alternative() -> None:
    assert choose({"a": 110, "b": 9, "c": 50}, home="a") == "b"


def test_a_long_prefix_makes_the_request_stay_longer() -> None:
    assert choose({"a": 1109, "b": 9}, home="a", prefix=500) == "a"
    assert choose({"a": 1110, "b": 9}, home="a", prefix=500) == "b"


def test_at_high_load_the_ratio_decides() -> None:
    assert choose({"a": 1400, "b": 1000}, home="a") == "a"
    assert choose({"a": 1501, "b": 1000}, home="a") == "b"


def test_a_home_that_may_not_take_requests_is_ignored() -> None:
    assert choose({"a": 5, "b": 9}, home="gone") == "a"


def test_twice_the_capacity_is_half_the_load() -> None:
    servers = [Candidate("small", 100), Candidate("big", 190, 2.0)]
    assert choose_server(servers, rng=random.Random(0)) == "big"


def test_senseless_overload_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="ratio=0.5"):
        Overload(ratio=0.5)
    with pytest.raises(ValueError, match="prefixes=-1"):
        Overload(prefixes=-1)
