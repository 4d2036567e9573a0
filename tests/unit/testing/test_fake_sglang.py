"""The fake server's distributions, queue, cache and scripted misfortunes, over real HTTP."""

import asyncio
import socket
import statistics
import subprocess
import sys
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agentrl.serving.sglang_client import EngineUnavailable, PartialGeneration, SGLangClient
from agentrl.testing.clock import pass_time
from agentrl.testing.fake_sglang import FakeSGLang, lognormal, pseudo_tokens
from agentrl.types import SamplingParams

PROMPT = list(range(40))
SAMPLING = SamplingParams(max_new_tokens=64, stop_token_ids=(999,))
HALF_REQUEST = b'POST /generate HTTP/1.1\r\nHost: fake\r\nContent-Length: 17\r\n\r\n{"input_ids":[1]'


async def generate(server: FakeSGLang, session: aiohttp.ClientSession, number: int, **options: Any) -> PartialGeneration:
    with closing(SGLangClient(server.url, session=session, **options)) as client:
        return await client.generate(PROMPT, SAMPLING, rid=f"{number:032d}")


def ending(connection: socket.socket) -> bytes:
    """What is read until the end, or the reset, of a connection that has to be over already."""
    try:
        return connection.recv(1000)
    except ConnectionResetError:
        return b""


@pytest.mark.asyncio
async def test_lengths_are_drawn_per_request_and_end_with_the_stop_token() -> None:
    lengths: list[list[int]] = []
    for _ in range(2):
        async with FakeSGLang(length=lognormal(10, 0.8, limit=40), seed=3) as server, aiohttp.ClientSession() as session:
            made = [await generate(server, session, number) for number in range(40)]
        assert all(piece.ids[-1] == 999 and piece.finish == "stop" for piece in made)
        assert all(piece.ids[:-1] == pseudo_tokens(PROMPT, len(piece) - 1) for piece in made)
        lengths.append([len(piece) for piece in made])
    assert lengths[0] == lengths[1], "the same seed, the same lengths"
    assert 6 <= statistics.median(lengths[0]) <= 16
    assert max(lengths[0]) > 2 * statistics.median(lengths[0])


@pytest.mark.asyncio
async def test_what_exceeds_the_running_requests_waits_and_the_load_says_so() -> None:
    async with FakeSGLang(token_latency_s=30, max_running=2, max_total_tokens=1000) as server, aiohttp.ClientSession() as session:
        tasks = [asyncio.create_task(generate(server, session, number)) for number in range(5)]
        client = SGLangClient(server.url, session=session)
        async with asyncio.timeout(120):
            while (load := (await client.loads(timeout_s=60))["loads"][0])["num_waiting_reqs"] < 3:
                await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert (load["num_running_reqs"], load["num_waiting_reqs"], load["max_running_requests"]) == (2, 3, 2)
    assert load["token_usage"] == load["num_used_tokens"] / 1000 == pytest.approx(0.08, abs=0.01)
    assert load["cache_hit_rate"] == pytest.approx(4 * 32 / 200)


@pytest.mark.asyncio
async def test_blocks_seen_before_are_cached_within_their_namespace() -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(FakeSGLang())
        session = await stack.enter_async_context(aiohttp.ClientSession())
        client = stack.enter_context(closing(SGLangClient(server.url, session=session)))

        async def cached(ids: list[int], namespace: str | None = None) -> int:
            number = len(server.requests)
            return (await client.generate(ids, SAMPLING, rid=f"{number:032d}", cache_namespace=namespace)).cached_tokens

        assert [await cached(PROMPT), await cached(PROMPT), await cached([*PROMPT, *range(60)])] == [0, 32, 32]
        assert await cached([5, *PROMPT[1:]]) == 0
        assert await cached(PROMPT, "v2") == 0


@pytest.mark.asyncio
async def test_a_scripted_stall_sends_its_tokens_and_then_nothing() -> None:
    async with FakeSGLang() as server, aiohttp.ClientSession() as session:
        server.stall_after(tokens=5)
        piece = PartialGeneration()
        with closing(SGLangClient(server.url, session=session, stall_timeout_s=200)) as client:
            asked = asyncio.ensure_future(client.generate(PROMPT, SAMPLING, rid="0" * 32, into=piece))
            async with asyncio.timeout(100):
                while len(piece) < 5:
                    await asyncio.sleep(0.005)
            pass_time(200)
            with pytest.raises(EngineUnavailable):
                await asked
        assert piece.ids == pseudo_tokens(PROMPT, 5)
        assert (await generate(server, session, 1)).ids == pseudo_tokens(PROMPT, 64), "only the next request stalls"


@pytest.mark.parametrize("said", [b"", HALF_REQUEST, HALF_REQUEST + b"}"], ids=["nothing", "half a request", "a request"])
@pytest.mark.asyncio
async def test_a_kill_leaves_no_connection_open_however_far_it_was_accepted(said: bytes) -> None:
    server = FakeSGLang()
    for turns in range(12):
        await server.start()
        server.stall()
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=30) as accepted, socket.create_connection(address, timeout=30) as silent:
            accepted.sendall(said)
            for _ in range(turns):
                await asyncio.sleep(0)
            async with asyncio.timeout(60):
                await server.kill()
            assert (turns, ending(accepted), ending(silent)) == (turns, b"", b"")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, timeout=30)


@pytest.mark.asyncio
async def test_a_process_can_be_scripted_to_die(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agentrl.testing.fake_sglang", "--port", "0", "--exit-after-tokens", "100", stdout=subprocess.PIPE
    )
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(250):
            assert process.stdout is not None
            said, url = (await process.stdout.readline()).decode().split()
            assert said == "LISTENING"
            with closing(SGLangClient(url, session=session)) as client:
                first = await client.generate(PROMPT, SAMPLING, rid="0" * 32)
                assert len(first) == 64
                with pytest.raises(EngineUnavailable):
                    await client.generate(PROMPT, SAMPLING, rid="1" * 32)
            assert await process.wait() == 1
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
