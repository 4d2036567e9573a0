"""``/servers`` and ``agentrl servers`` against a manager with fake engines."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from agentrl.assembly.parts import run_secret
from agentrl.assembly.servers import SERVERS_TOKEN, ServersApiError, call_servers
from agentrl.cli.main import app
from agentrl.errors import ConfigError
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.servers_api import serving_servers_api
from agentrl.telemetry.run_dir import RunDir
from agentrl.testing.fake_sglang import FakeSGLang, pseudo_tokens
from agentrl.types import SamplingParams


@asynccontextmanager
async def served(tmp_path: Path, *servers: FakeSGLang) -> AsyncGenerator[tuple[AsyncLLMServerManager, str, Path]]:
    """A run directory whose serve answers."""
    run = RunDir(tmp_path)
    run.config.write_text("run: {name: r}\n")
    async with AsyncLLMServerManager() as manager:
        for server in servers:
            await server.start()
            manager.add_server(server.url)
        try:
            async with serving_servers_api(manager, token=run_secret(run, SERVERS_TOKEN)) as url:
                run.register("serve", url=url)
                yield manager, url, tmp_path
        finally:
            for server in servers:
                await server.kill()


async def cli(*arguments: str) -> str:
    """What the command prints; it runs beside the API's loop."""
    result = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.asyncio
async def test_servers_are_listed_added_drained_and_removed_from_the_command_line(tmp_path: Path) -> None:
    first, second = FakeSGLang(), FakeSGLang()
    async with served(tmp_path, first) as (manager, _, run), second:
        listing = json.loads(await cli("servers", "list", str(run), "--json"))
        assert [(s["url"], s["state"], s["p50_ms"]) for s in listing["servers"]] == [(first.url, "ready", None)]
        assert second.url in await cli("servers", "add", str(run), second.url, "--capacity", "2")
        assert [(s.url, s.capacity) for s in manager.stats()] == [(first.url, 1.0), (second.url, 2.0)]
        assert "draining" in await cli("servers", "drain", str(run), first.url, "--wait-s", "5")
        for index in range(4):
            sampling = SamplingParams(max_new_tokens=4)
            answer = await manager.generate([index], sampling, trajectory_id=f"t{index}", group_id=f"g{index}", deadline=60)
            assert (answer.server, answer.ids) == (second.url, pseudo_tokens([index], 4))
        assert "draining" not in await cli("servers", "drain", str(run), first.url, "--undo")
        assert second.url not in await cli("servers", "remove", str(run), second.url)
        assert manager.urls == [first.url]


@pytest.mark.asyncio
async def test_a_drain_waits_for_the_requests_and_then_moves_them(tmp_path: Path) -> None:
    first, second = FakeSGLang(token_latency_s=0.05), FakeSGLang()
    async with served(tmp_path, first) as (manager, _, run), second:
        sampling = SamplingParams(max_new_tokens=400)
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(manager.generate([1], sampling, trajectory_id="t", group_id="g", deadline=120))
            async with asyncio.timeout(60):
                while first.num_tokens < 5:
                    await asyncio.sleep(0.005)
            manager.add_server(second.url)
            answer = await asyncio.to_thread(call_servers, run, "POST", "/drain", url=first.url, wait_s=0.1)
            assert answer["idle"] is False
        assert (asked.result().server, asked.result().ids) == (second.url, pseudo_tokens([1], 400))
        assert (await asyncio.to_thread(call_servers, run, "POST", "/drain", url=first.url, wait_s=60))["idle"] is True


@pytest.mark.asyncio
async def test_every_call_needs_the_token_and_sense(tmp_path: Path) -> None:
    server = FakeSGLang()
    async with served(tmp_path, server) as (manager, url, run), httpx.AsyncClient(base_url=url, trust_env=False) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ""}):
            for method, path in (("GET", "/servers"), ("POST", "/servers"), ("DELETE", "/servers"), ("POST", "/servers/drain")):
                assert (await client.request(method, path, headers=headers, json={"url": server.url})).status_code == 401
        client.headers["Authorization"] = f"Bearer {run_secret(RunDir(run), SERVERS_TOKEN)}"
        wrong = [
            "ftp://a:1",
            "a:1",
            "http://a:1/path",
            "http://user@a:1",
            "http://",
            "http://a:99999",
            "http://a:x",
            "http://a b:1",
        ]
        assert {(await client.post("/servers", json={"url": bad})).status_code for bad in wrong} == {422}
        assert (await client.post("/servers", json={"url": "http://a:1", "capacity": 0})).status_code == 422
        for key in ("key\n", "k\r\nX-Other: 1", "kéy"):
            for name in ("api_key", "admin_key"):
                assert (await client.post("/servers", json={"url": "http://a:1", name: key})).status_code == 422
        assert (await client.post("/servers", json={"url": server.url})).status_code == 409
        assert (await client.post("/servers/drain", json={"url": "http://nobody:1"})).status_code == 404
        assert manager.urls == [server.url]
        with pytest.raises(ServersApiError, match="404"):
            await asyncio.to_thread(call_servers, run, "DELETE", url="http://nobody:1")


def test_without_a_running_serve_the_command_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.resolved.yaml").write_text("run: {name: r}\n")
    with pytest.raises(ConfigError, match="no running serve"):
        call_servers(tmp_path, "GET")
