"""Choose a server for one request. Pure: numbers in, a choice out; randomness comes in as an argument.

The load of a server is the tokens it has in flight per unit of capacity. A request has a *home*, the server that
holds its prefix in cache (its trajectory's last server, or the one where its group's first member went), and stays
there unless home is overloaded **compared with the best alternative**: an absolute limit would throw every request
off its cache as soon as the whole fleet is busy, and a move is never free, since the prefix is computed again.
"""

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Candidate(NamedTuple):
    """A server that may take the request. A tuple, because one of each server is made per request."""

    url: str
    tokens_in_flight: int
    capacity: float = 1.0
    """Relative speed; a server with capacity 2 should hold twice the tokens."""

    @property
    def load(self) -> float:
        return self.tokens_in_flight / self.capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Overload:
    """When a request leaves its home. Margin and ratio must both hold."""

    tokens: int = 2048
    """Home must be this many tokens (per unit of capacity) above the best alternative, besides what follows."""
    prefixes: float = 12.0
    """And this many times the request's own prefix above it: about so many requests like this one. It scales the margin with
    the traffic, and makes a request the harder to move the more another server would have to compute again. Measured by
    ``bench/routing.py``: at 1 to 4, idle servers pull requests off their cache and nobody ends sooner."""
    ratio: float = 1.5
    """Home must be above this multiple of the best alternative."""

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.prefixes < 0 or self.ratio < 1:
            raise ValueError(f"overload tokens={self.tokens}, prefixes={self.prefixes} must be >= 0 and ratio={self.ratio} >= 1")


DEFAULT_OVERLOAD = Overload()


class Homes:
    """Where trajectories and groups have their prefix: the newest ``keep`` of them."""

    def __init__(self, *, keep: int = 100_000) -> None:
        self._urls: OrderedDict[str, str] = OrderedDict()
        self._keep = keep

    def __contains__(self, key: str) -> bool:
        return key in self._urls

    def get(self, key: str) -> str | None:
        return self._urls.get(key)

    def remember(self, key: str, url: str) -> None:
        self._urls[key] = url
        self._urls.move_to_end(key)
        while len(self._urls) > self._keep:
            self._urls.popitem(last=False)


def choose_server(
    candidates: Sequence[Candidate],
    *,
    home: str | None = None,
    prefix_tokens: int = 0,
    overload: Overload = DEFAULT_OVERLOAD,
    rng: random.Random,
) -> str:
    """The url that takes the request.

    Args:
        candidates: the servers that may take it, at least one.
        home: where its prefix is cached; ignored when not among the candidates.
        prefix_tokens: tokens that another server would have to compute again.
        overload: when home is too busy.
        rng: breaks ties between equally loaded servers, so that many clients do not pick the same one.
    """
    if not candidates:
        raise ValueError("no candidate to choose from; wait until a server is routable")
    best_load = min(candidate.load for candidate in candidates)
    if home is not None:
        for candidate in candidates:
            if candidate.url == home and not _is_overloaded(candidate, best_load, prefix_tokens, overload):
                return home
    return rng.choice([candidate.url for candidate in candidates if candidate.load == best_load])


def _is_overloaded(home: Candidate, best_load: float, prefix_tokens: int, overload: Overload) -> bool:
    margin = (overload.tokens + overload.prefixes * prefix_tokens) / home.capacity
    return home.load > best_load + margin and home.load > best_load * overload.ratio
