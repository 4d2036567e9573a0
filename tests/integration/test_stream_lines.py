"""Connections with many commands in flight, on a real server: every call gets its own reply, or an error."""

import asyncio
import hashlib
import random

import pytest
import redis
import redis.asyncio

from agentrl.stream.lines import Lines
from agentrl.stream.server import connect_async
from agentrl.testing.stream_doubles import LossyProxy

pytestmark = pytest.mark.asyncio
ECHO = "return ARGV[1]"
PATIENCE_S = 60.0
SHA = hashlib.sha1(ECHO.encode(), usedforsecurity=False).hexdigest()


async def echo(lines: Lines, text: str) -> str:
    return (await lines.script(ECHO, SHA, [], [text])).decode()


async def answered(lines: Lines) -> None:
    """Wait until a call is answered within its short timeout, which a slow machine may miss."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert await echo(lines, "here") == "here"
                return
            except redis.TimeoutError:
                continue


def texts(count: int, seed: int) -> list[str]:
    """Of very different sizes, some above what one connection takes at once."""
    rng = random.Random(seed)
    return [f"{i}:" + "x" * rng.choice([0, 10, 5_000, 70_000, 300_000]) for i in range(count)]


async def test_concurrent_calls_get_their_own_replies(aclient: redis.asyncio.Redis) -> None:
    lines, sent = Lines(aclient, timeout_s=60), texts(200, 0)
    assert await asyncio.gather(*(echo(lines, t) for t in sent)) == sent
    names = [c["name"] for c in await aclient.client_list() if "serve" in c["name"]]
    assert 2 < len(names) <= 9, "small ones share a connection, and there are never more than a few"


async def test_cancelled_calls_take_no_others_reply(aclient: redis.asyncio.Redis) -> None:
    lines, rng = Lines(aclient, timeout_s=60), random.Random(1)

    async def ask(text: str, patience_s: float) -> bool:
        """Whether the reply came; a connection whose writer was interrupted fails the calls beside it."""
        for _ in range(50):
            try:
                async with asyncio.timeout(patience_s):
                    assert await echo(lines, text) == text
                return True
            except TimeoutError:
                return False
            except redis.ConnectionError:
                continue
        return False

    asked = [ask(t, rng.choice([0.0, 0.001, 0.01, PATIENCE_S])) for t in texts(300, 1)]
    assert any(await asyncio.gather(*asked))
    sent = texts(20, 2)
    assert await asyncio.gather(*(ask(t, PATIENCE_S) for t in sent)) == [True] * len(sent)


async def test_a_cut_connection_fails_what_is_in_flight_and_the_next_call_connects_again(url: str) -> None:
    with LossyProxy(url) as proxy:
        client = connect_async(proxy.url)
        lines = Lines(client, timeout_s=60)
        assert await echo(lines, "first") == "first"
        proxy.lose_replies(1, marker=b"EVALSHA")
        got = await asyncio.gather(*(echo(lines, str(i)) for i in range(5)), return_exceptions=True)
        assert any(isinstance(g, redis.ConnectionError) for g in got)
        assert all(isinstance(g, redis.ConnectionError) or g == str(i) for i, g in enumerate(got))
        assert await echo(lines, "again") == "again"
        proxy.cut_all()  # while nothing is in flight
        got = [(await asyncio.gather(echo(lines, "x"), return_exceptions=True))[0] for _ in range(3)]
        assert all(isinstance(g, redis.ConnectionError) or g == "x" for g in got)
        assert got[-1] == "x"
        await client.aclose()


async def test_a_silent_connection_is_given_up_with_all_that_wait_for_it(url: str) -> None:
    with LossyProxy(url) as proxy:
        client = connect_async(proxy.url)
        lines = Lines(client, timeout_s=0.5)
        await answered(lines)
        proxy.go_silent()
        got = await asyncio.gather(*(echo(lines, str(i)) for i in range(5)), return_exceptions=True)
        assert all(isinstance(g, redis.ConnectionError | redis.TimeoutError) for g in got)
        proxy.heal()
        await answered(lines)
        await client.aclose()


async def test_an_error_of_the_server_reaches_its_caller_alone(aclient: redis.asyncio.Redis) -> None:
    lines = Lines(aclient, timeout_s=60)
    bad = "return redis.error_reply('BAD luck')"
    sha = hashlib.sha1(bad.encode(), usedforsecurity=False).hexdigest()
    got = await asyncio.gather(echo(lines, "a"), lines.script(bad, sha, [], []), echo(lines, "b"), return_exceptions=True)
    assert (got[0], got[2]) == ("a", "b")
    assert isinstance(got[1], redis.ResponseError)
    assert "BAD luck" in str(got[1])


async def test_it_ends_with_its_client(aclient: redis.asyncio.Redis, client: redis.Redis, url: str) -> None:
    own = connect_async(url, role="lines")
    lines = Lines(own, timeout_s=60)
    assert await echo(lines, "first") == "first"
    await own.aclose()
    while any("lines" in c["name"] for c in client.client_list()):
        await asyncio.sleep(0.01)
