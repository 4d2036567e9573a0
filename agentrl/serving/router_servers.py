"""The servers behind an SGLang router: asked for by ``GET /workers``, added to the manager, followed as they come and go.

The router is a directory here, nothing more. Generations do not pass through it: it hides which server answers, forwards neither
pause nor weight updates nor aborts (404), and plays a request that failed again by itself, which could sample it twice. Its view of
health is not used either: a server that is paused for new weights does not answer health checks in the time that it gives them.
"""

import asyncio
import logging
import re
from collections.abc import Iterable
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
import orjson

from agentrl.errors import ConfigError
from agentrl.serving.server_manager import AsyncLLMServerManager

log = logging.getLogger(__name__)

POLL_S = 5.0
TIMEOUT_S = 10.0
GONE_AFTER_S = 30.0
"""A router that was started again answers at once, with no workers until it has looked at each of them: that takes it seconds."""

_RANK = re.compile(r"@\d+$")
"""A router with ``--dp-aware`` lists a server once per data-parallel rank, with the rank behind its url."""


class RouterServers:
    """Keeps the manager's servers equal to a router's workers.

    Args:
        url: ``http://host:port`` of an sglang-router or SGLang model gateway.
        manager: gets the servers.
        session: for asking the router.
        api_key: bearer key of router and servers (data endpoints).
        admin_key: bearer key of the servers' control endpoints.
        poll_s: how often the router is asked.
        gone_after_s: how long the list must lack a server until it is removed.
    """

    def __init__(
        self,
        url: str,
        *,
        manager: AsyncLLMServerManager,
        session: aiohttp.ClientSession,
        api_key: str | None = None,
        admin_key: str | None = None,
        poll_s: float = POLL_S,
        gone_after_s: float = GONE_AFTER_S,
    ) -> None:
        self._url, self._manager, self._session = url.rstrip("/"), manager, session
        self._api_key, self._admin_key, self._poll_s = api_key, admin_key, poll_s
        self._gone_after_s = gone_after_s
        self._known: set[str] = set()
        self._missing_since: dict[str, float] = {}
        """Loop time of the first answer without the server, for known ones that the latest lacks."""
        self._is_lost = False

    async def run(self) -> None:
        """Follow the router until cancelled, then remove its servers. A router that is away changes nothing.

        Raises:
            ConfigError: the url is no router, or its workers cannot be used one by one.
        """
        try:
            while True:
                await self._follow()
                await asyncio.sleep(self._poll_s)
        finally:
            self._remove(list(self._known))

    async def _follow(self) -> None:
        try:
            self._adopt(await self._workers())
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if not self._is_lost:
                log.warning("router_lost url=%s error=%r: its %d known servers stay in use", self._url, error, len(self._known))
            self._is_lost = True
        else:
            self._is_lost = False

    async def _workers(self) -> set[str]:
        """Base urls of the workers.

        Raises:
            ConfigError: as ``run``.
            aiohttp.ClientError: no answer, or an answer of the router's own troubles (5xx).
            TimeoutError: no answer in time.
        """
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        async with (
            asyncio.timeout(TIMEOUT_S),
            self._session.get(f"{self._url}/workers", headers=headers) as answer,
        ):
            text = await answer.read()
            if answer.status >= 500:
                answer.raise_for_status()
        entries = _entries(text) if answer.status == 200 else None
        if entries is None:
            raise ConfigError(
                f"serve.router_url={self._url} answers GET /workers with status {answer.status} and no list of workers: it is no SGLang "
                "router. Urls of servers go into serve.urls; a router that asks for a key gets serve.api_key"
            )
        return {_server_url(self._url, entry) for entry in entries}

    def _adopt(self, workers: set[str]) -> None:
        now = asyncio.get_running_loop().time()
        for url in sorted(workers - self._known):
            log.info("router_server_added url=%s router=%s", url, self._url)
            self._manager.add_server(url, api_key=self._api_key, admin_key=self._admin_key)
        self._known |= workers
        self._missing_since = {url: self._missing_since.get(url, now) for url in self._known - workers}
        self._remove([url for url, since in self._missing_since.items() if now - since >= self._gone_after_s])

    def _remove(self, urls: Iterable[str]) -> None:
        for url in urls:
            log.info("router_server_removed url=%s router=%s", url, self._url)
            self._manager.remove_server(url)
            self._known.discard(url)


def _entries(text: bytes) -> list[dict[str, Any]] | None:
    """The workers of an answer; None when it is not one."""
    try:
        body = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    workers: Any = cast("dict[str, Any]", body).get("workers") if isinstance(body, dict) else None
    if not isinstance(workers, list):
        return None
    entries = cast("list[Any]", workers)
    return [cast("dict[str, Any]", entry) for entry in entries] if all(isinstance(entry, dict) for entry in entries) else None


def _server_url(router: str, entry: dict[str, Any]) -> str:
    url, kind = _RANK.sub("", str(entry.get("url", ""))), entry.get("worker_type", "regular")
    if kind != "regular":
        raise ConfigError(
            f"the router {router} has a {kind} worker at {url}: prefill and decode servers generate only together, and cannot be used "
            "one by one. Start regular servers for the run"
        )
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"the router {router} has a worker at {url!r}, which is not HTTP. Start its workers without --grpc-mode"
        )
    return url.rstrip("/")
