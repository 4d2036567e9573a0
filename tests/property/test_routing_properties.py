"""Properties of the pure server choice."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.serving.routing import Candidate, Overload, choose_server

CANDIDATES = st.lists(st.tuples(st.integers(0, 100_000), st.sampled_from([0.5, 1.0, 2.0, 4.0])), min_size=1, max_size=12).map(
    lambda rows: [Candidate(f"http://s{i}", tokens, capacity) for i, (tokens, capacity) in enumerate(rows)]
)


@given(CANDIDATES, st.integers(0, 20), st.integers(0, 50_000), st.integers(0, 2**16))
def test_the_choice_is_home_or_a_least_loaded_candidate(servers: list[Candidate], home: int, prefix: int, seed: int) -> None:
    url = choose_server(servers, home=f"http://s{home}", prefix_tokens=prefix, rng=random.Random(seed))
    least = min(server.load for server in servers)
    chosen = next(server for server in servers if server.url == url)
    assert url == f"http://s{home}" or chosen.load == least


@given(CANDIDATES, st.integers(0, 50_000), st.integers(0, 2**16))
def test_home_is_left_only_when_it_is_far_above_the_best_alternative(servers: list[Candidate], prefix: int, seed: int) -> None:
    overload = Overload(tokens=1000, prefixes=3.0, ratio=1.5)
    home = servers[0]
    url = choose_server(servers, home=home.url, prefix_tokens=prefix, overload=overload, rng=random.Random(seed))
    least = min(server.load for server in servers)
    must_leave = home.load > least + (1000 + 3 * prefix) / home.capacity and home.load > 1.5 * least
    assert (url != home.url) == must_leave


@given(CANDIDATES, st.integers(0, 2**16))
def test_a_busy_fleet_alone_never_moves_anyone(servers: list[Candidate], seed: int) -> None:
    level = [Candidate(server.url, int(10_000_000 * server.capacity), server.capacity) for server in servers]
    for server in level:
        assert choose_server(level, home=server.url, rng=random.Random(seed)) == server.url


@given(CANDIDATES, st.integers(1, 5_000), st.integers(0, 2**16), st.sampled_from([2, 8, 64]))
def test_larger_traffic_of_the_same_shape_moves_the_same_requests(
    servers: list[Candidate], prefix: int, seed: int, scale: int
) -> None:
    overload = Overload(tokens=0)
    larger = [Candidate(server.url, server.tokens_in_flight * scale, server.capacity) for server in servers]
    home = servers[-1].url
    small = choose_server(servers, home=home, prefix_tokens=prefix, overload=overload, rng=random.Random(seed))
    large = choose_server(larger, home=home, prefix_tokens=prefix * scale, overload=overload, rng=random.Random(seed))
    assert small == large


@given(CANDIDATES, st.integers(0, 20_000), st.integers(0, 20_000), st.integers(0, 2**16))
def test_a_longer_prefix_never_makes_a_request_leave_that_a_shorter_one_would_keep(
    servers: list[Candidate], prefix: int, more: int, seed: int
) -> None:
    home = servers[0].url
    if choose_server(servers, home=home, prefix_tokens=prefix, rng=random.Random(seed)) == home:
        assert choose_server(servers, home=home, prefix_tokens=prefix + more, rng=random.Random(seed)) == home


def test_ties_are_broken_evenly() -> None:
    servers = [Candidate(f"http://s{i}", 0) for i in range(4)]
    rng = random.Random(3)
    counts = Counter(choose_server(servers, rng=rng) for _ in range(4000))
    assert set(counts) == {server.url for server in servers}
    assert max(counts.values()) - min(counts.values()) < 200


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=8), st.integers(0, 2**16))
def test_placing_many_requests_fills_servers_in_proportion_to_capacity(capacities: list[float], seed: int) -> None:
    rng = random.Random(seed)
    tokens = dict.fromkeys((f"http://s{i}" for i in range(len(capacities))), 0)
    capacity = dict(zip(tokens, capacities, strict=True))
    for _ in range(400):
        url = choose_server([Candidate(url, tokens[url], capacity[url]) for url in tokens], rng=rng)
        tokens[url] += 100
    loads = [tokens[url] / capacity[url] for url in tokens]
    assert max(loads) - min(loads) <= 100 / min(capacities)


def test_nobody_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="no candidate"):
        choose_server([], rng=random.Random(0))
