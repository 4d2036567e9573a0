"""How many requests one client may send: an ASGI middleware in front of every HTTP surface.

It owns a token bucket per client address and answers 429 with ``Retry-After`` when one is empty, before a route is looked up, a
token compared or a body read. It keeps one client's flood from starving the others; it is no defence against many addresses.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from agentrl.errors import ConfigError

MAX_CLIENTS: Final = 4096
"""Buckets kept; the client that was quiet longest is forgotten first, and starts anew with a full bucket."""
BURST_S: Final = 2.0
"""Seconds of the rate that may come at once."""

Message = MutableMapping[str, Any]
App = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


class Buckets:
    """Token buckets by client name. Pure: the caller brings the time, in seconds.

    Args:
        per_s: requests per second and client, above 0.
        burst: requests that a client may send at once.

    Raises:
        ConfigError: a rate that lets nothing through.
    """

    def __init__(self, per_s: float, *, burst: float | None = None) -> None:
        if not per_s > 0:
            raise ConfigError(f"rate_limit={per_s:g} requests per second lets nothing through: give more than 0, or none at all")
        self._per_s = per_s
        self._burst = max(1.0, per_s * BURST_S if burst is None else burst)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._left)

    def take(self, client: str, now: float) -> float:
        """0 when the request may pass, else the seconds until the next one may."""
        left, at = self._left.pop(client, (self._burst, now))
        left = min(self._burst, left + max(0.0, now - at) * self._per_s)
        wait_s = 0.0 if left >= 1 else (1 - left) / self._per_s
        self._left[client] = (left - 1 if left >= 1 else left, max(at, now))
        if len(self._left) > MAX_CLIENTS:
            self._left.popitem(last=False)
        return wait_s


class RateLimit:
    """The middleware. Clients are told apart by address."""

    def __init__(self, app: App, *, per_s: float) -> None:
        self._app = app
        self._buckets = Buckets(per_s)
        self._per_s = per_s

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] == "http":
            client = (scope.get("client") or ("local",))[0]
            if wait_s := self._buckets.take(client, time.monotonic()):
                await self._refuse(wait_s, send)
                return
        await self._app(scope, receive, send)

    async def _refuse(self, wait_s: float, send: Callable[[Message], Awaitable[None]]) -> None:
        text = f'{{"detail": "more than {self._per_s:g} requests per second from this address: slow down"}}'.encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(text)).encode()),
            (b"retry-after", str(max(1, math.ceil(wait_s))).encode()),
        ]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": text})
