"""A router is asked which servers there are; everything else goes to the servers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from agentrl.config import parse_config
from agentrl.errors import ConfigError, WeightSyncError
from agentrl.serving.router_servers import RouterServers
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.sglang_client import SGLangClient
from agentrl.supervise import running
from agentrl.testing.fake_sglang import FakeSGLang, pseudo_tokens
from agentrl.testing.waits import until
from agentrl.types import SamplingParams

pytestmark = pytest.mark.asyncio

LABEL = "run/0/7"


class Router:
    """Answers ``/workers`` as sglang-router does, and 404 to what that does not forward."""

    def __init__(self) -> None:
        self.workers: list[dict[str, Any]] = []
        self.status = 200
        self.keys: set[str | None] = set()
        self.times_asked = 0
        self.url = ""
        self._port = 0

    def lists(self, *servers: FakeSGLang, **fields: Any) -> None:
        worker = {
            "model_id": "m",
            "priority": 50,
            "cost": 1.0,
            "worker_type": "regular",
            "is_healthy": False,
            "load": 0,
            "connection_mode": "HTTP",
            "metadata": {"tp_size": "1", "dp_size": "1"},
            "disable_health_check": False,
        }
        self.workers = [{"id": str(i), "url": s.url, **worker, **fields} for i, s in enumerate(servers)]

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/workers", self._list)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()
        self._port = int(self._runner.addresses[0][1])
        self.url = f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _list(self, request: web.Request) -> web.Response:
        self.times_asked += 1
        self.keys.add(request.headers.get("Authorization"))
        return web.json_response({"workers": self.workers, "total": len(self.workers), "stats": {}}, status=self.status)


@pytest_asyncio.fixture
async def router() -> AsyncIterator[Router]:
    router = Router()
    await router.start()
    yield router
    await router.stop()


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_servers_come_and_go_with_the_router_and_generate_directly(router: Router, session: aiohttp.ClientSession) -> None:
    async with (
        FakeSGLang(label=LABEL, api_key="k") as a,
        FakeSGLang(label=LABEL, api_key="k") as b,
        FakeSGLang(label=LABEL, api_key="k") as c,
        AsyncLLMServerManager() as manager,
    ):
        router.lists(a, b)
        servers = RouterServers(router.url, manager=manager, session=session, api_key="k", poll_s=0.01, gone_after_s=0.05)
        async with running(servers=servers.run()):
            await until(lambda: set(manager.urls) == {a.url, b.url})
            for url in manager.urls:
                manager.set_verified(url, LABEL)
            manager.require_version(LABEL)
            generation = await manager.generate(
                [5, 6, 7], SamplingParams(max_new_tokens=4), trajectory_id="t", group_id="g", deadline=120
            )
            assert list(generation.ids) == pseudo_tokens([5, 6, 7], 4)
            assert len(a.requests) + len(b.requests) == 1
            router.lists(b, c)
            await until(lambda: set(manager.urls) == {b.url, c.url})
            router.status = 503
            await router.stop()
            await asyncio.sleep(0.1)
            assert set(manager.urls) == {b.url, c.url}, "a router that is away changes nothing"
            router.status = 200
            router.lists(c)
            await router.start()
            await until(lambda: set(manager.urls) == {c.url})
        assert not manager.urls
    assert router.keys == {"Bearer k"}


async def test_a_router_that_was_started_again_and_lists_nothing_yet_costs_no_server(
    router: Router, session: aiohttp.ClientSession
) -> None:
    async with FakeSGLang(label=LABEL) as server, AsyncLLMServerManager() as manager:
        router.lists(server)
        async with running(servers=RouterServers(router.url, manager=manager, session=session, poll_s=0.01).run()):
            await until(lambda: manager.urls == [server.url])
            incarnation = manager.incarnation(server.url)
            router.lists()
            asked = router.times_asked
            await until(lambda: router.times_asked > asked + 2)
            assert manager.urls == [server.url]
            router.lists(server)
            asked = router.times_asked
            await until(lambda: router.times_asked > asked + 2)
            assert manager.incarnation(server.url) == incarnation


async def test_a_server_that_is_listed_once_per_data_parallel_rank_is_one_server(
    router: Router, session: aiohttp.ClientSession
) -> None:
    async with FakeSGLang(label=LABEL) as server, AsyncLLMServerManager() as manager:
        router.lists(server, server)
        for rank, entry in enumerate(router.workers):
            entry["url"] += f"@{rank}"
        async with running(servers=RouterServers(router.url, manager=manager, session=session).run()):
            await until(lambda: manager.urls == [server.url])


async def test_what_is_no_router_or_cannot_be_used_one_by_one_is_refused(router: Router, session: aiohttp.ClientSession) -> None:
    async with FakeSGLang() as server, AsyncLLMServerManager() as manager:
        with pytest.raises(ConfigError, match=r"no SGLang router.*serve\.urls"):
            await RouterServers(server.url, manager=manager, session=session).run()
        router.lists(server, worker_type="prefill")
        with pytest.raises(ConfigError, match="a prefill worker"):
            await RouterServers(router.url, manager=manager, session=session).run()
        router.lists(server, url="grpc://127.0.0.1:9")
        with pytest.raises(ConfigError, match="not HTTP"):
            await RouterServers(router.url, manager=manager, session=session).run()
        assert not manager.urls


async def test_a_router_given_as_a_server_is_named_when_it_refuses_control(
    router: Router, session: aiohttp.ClientSession
) -> None:
    with pytest.raises(WeightSyncError, match=r"/model_info answered 404.*serve\.router_url"):
        await SGLangClient(router.url, session=session).describe(timeout_s=60)


async def test_servers_are_listed_in_one_place_only() -> None:
    with pytest.raises(ConfigError, match="Give one of them"):
        parse_config({"serve": {"urls": ["http://a:1"], "router_url": "http://r:1"}}, place="test")
