"""Connections to an engine against servers that say exactly what a test wants said."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from agentrl.serving.engine_http import (
    BrokenAnswer,
    EngineConnections,
    Head,
    _Answer,  # pyright: ignore[reportPrivateUsage]
)

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE_CHUNKED = CHUNKED + b"3\r\nabc\r\nA;x=1\r\ndefghijklm\r\n0\r\nDigest: none\r\n\r\n"
LENGTH = OK + b"Content-Length: 5\r\n\r\nhello"


@dataclass
class Script:
    """What a server says to each request, in pieces, and what it saw."""

    answers: Sequence[Sequence[bytes]]
    hang_up: bool = False
    heads: list[bytes] = field(default_factory=list[bytes])
    bodies: list[bytes] = field(default_factory=list[bytes])
    num_connections: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while len(self.heads) < len(self.answers):
                head = await reader.readuntil(b"\r\n\r\n")
                self.bodies.append(await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])))
                self.heads.append(head)
                for piece in self.answers[len(self.heads) - 1]:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if self.hang_up:
                    return
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.gone.set()
            writer.close()


@asynccontextmanager
async def connected(script: Script, *, stall_s: float | None = None) -> AsyncGenerator[EngineConnections, None]:
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connections = EngineConnections(
        URL(f"http://127.0.0.1:{port}/base/generate?x=1"), headers={"X-Key": "k"}, connect_timeout_s=120, stall_timeout_s=stall_s
    )
    try:
        async with server:
            yield connections
            connections.close()
    finally:
        connections.close()


async def ask(connections: EngineConnections, body: bytes = b"{}") -> tuple[Head, bytes]:
    pieces: list[bytes] = []
    async with asyncio.timeout(120):
        head = await connections.post(body, lambda _: pieces.append)
    return head, b"".join(pieces)


@pytest.mark.asyncio
async def test_requests_one_after_the_other_share_a_connection() -> None:
    script = Script([[WHOLE_CHUNKED], [LENGTH], [b"HTTP/1.1 100 Continue\r\n\r\n", LENGTH], [OK, b"Content-Length: 0\r\n\r\n"]])
    async with connected(script) as connections:
        answers = [await ask(connections, b"x" * n) for n in (1, 2, 200_000, 4)]
    assert [body for _, body in answers] == [b"abcdefghijklm", b"hello", b"hello", b""]
    assert {head for head, _ in answers} == {Head(200, "text/event-stream")}
    assert script.num_connections == 1
    assert [len(body) for body in script.bodies] == [1, 2, 200_000, 4]
    assert script.heads[0].startswith(b"POST /base/generate?x=1 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"X-Key: k\r\n" in script.heads[0]


@pytest.mark.asyncio
async def test_requests_at_once_have_connections_of_their_own() -> None:
    script = Script([[LENGTH]] * 3)
    async with connected(script) as connections, asyncio.TaskGroup() as group:
        asked = [group.create_task(ask(connections)) for _ in range(3)]
    assert [task.result()[1] for task in asked] == [b"hello"] * 3
    assert script.num_connections == 3


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
        LENGTH.replace(b"HTTP/1.1", b"HTTP/1.0"),
        LENGTH + b"HTTP/1.1 200 OK\r\n",
        WHOLE_CHUNKED + b"more",
    ],
)
async def test_a_connection_that_cannot_carry_another_request_is_not_kept(answer: bytes) -> None:
    script = Script([[answer], [LENGTH]])
    async with connected(script) as connections:
        assert (await ask(connections))[1] in (b"hello", b"abcdefghijklm")
        assert (await ask(connections))[1] == b"hello"
    assert script.num_connections == 2


@pytest.mark.asyncio
async def test_an_answer_without_length_ends_with_the_connection() -> None:
    script = Script([[b"HTTP/1.1 500 Oh\r\n\r\n", b"it ", b"broke"]], hang_up=True)
    async with connected(script) as connections:
        assert await ask(connections) == (Head(500, ""), b"it broke")


@pytest.mark.asyncio
async def test_a_connection_that_the_server_closed_meanwhile_is_not_used_again() -> None:
    script = Script([[LENGTH], [LENGTH]], hang_up=True)
    async with connected(script) as connections:
        await ask(connections)
        await script.gone.wait()
        async with asyncio.timeout(120):
            while connections._idle[0].can_be_kept:  # pyright: ignore[reportPrivateUsage]
                await asyncio.sleep(0)
        assert (await ask(connections))[1] == b"hello"
    assert script.num_connections == 2


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "pieces",
    [
        [b""],
        [b"HTTP/1.1 200 OK\r\nContent-Le"],
        [LENGTH[:-1]],
        [WHOLE_CHUNKED[:-2]],
        [b"SSH-2.0-OpenSSH_9.2\r\n\r\n"],
        [b"HTTP/2 200\r\n\r\n"],
        [b"HTTP/1.1 2x0 OK\r\n\r\n"],
        [OK + b"Content-Length: -5\r\n\r\nhello"],
        [OK + b"Content-Length: 5, 5\r\n\r\nhello"],
        [OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + WHOLE_CHUNKED[len(CHUNKED) :]],
        [CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n"],
        [CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n"],
        [CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n"],
        [CHUNKED + b"f" * 9 + b"\r\n"],
        [b"HTTP/1.1 200 " + b"x" * 100_000],
        [CHUNKED + b"1" * 10_000],
    ],
)
async def test_what_is_no_whole_answer_is_refused(pieces: list[bytes]) -> None:
    script = Script([pieces], hang_up=True)
    async with connected(script) as connections:
        with pytest.raises(ConnectionError):
            await ask(connections)
        assert connections._idle == []  # pyright: ignore[reportPrivateUsage]


@given(st.lists(st.integers(1, len(WHOLE_CHUNKED) - 1), max_size=8))
def test_where_an_answer_is_cut_on_its_way_makes_no_difference(cuts: list[int]) -> None:
    text = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + WHOLE_CHUNKED
    pieces: list[bytes] = []
    answer = _Answer(lambda _: pieces.append)
    edges = sorted({0, *cuts, len(text)})
    ends = [answer.feed(text[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    assert ends == [False] * (len(ends) - 1) + [True]
    assert (b"".join(pieces), answer.leaves_connection) == (b"abcdefghijklm", True)


@given(st.binary(max_size=200), st.sampled_from([b"", OK, CHUNKED, LENGTH]))
def test_arbitrary_bytes_are_an_answer_or_a_broken_one(data: bytes, start: bytes) -> None:
    answer = _Answer(lambda _: lambda _: None)
    with suppress(BrokenAnswer):
        answer.feed(start + data)


@pytest.mark.asyncio
async def test_a_cancelled_request_closes_its_connection() -> None:
    script = Script([[CHUNKED, b"3\r\nabc\r\n"]])
    arrived = asyncio.Event()

    def read(_: Head) -> Callable[[bytes], None]:
        return lambda _: arrived.set()

    async with connected(script) as connections:
        request = asyncio.create_task(connections.post(b"{}", read))
        async with asyncio.timeout(120):
            await arrived.wait()
            request.cancel()
            await asyncio.wait([request])
            await script.gone.wait()
    assert request.cancelled()


@pytest.mark.asyncio
async def test_a_server_that_falls_silent_is_left_after_the_longest_silence() -> None:
    script = Script([[CHUNKED, b"3\r\nabc\r\n"]])
    async with connected(script, stall_s=0.05) as connections:
        with pytest.raises(TimeoutError, match="nothing came for 0.05 s"):
            await ask(connections)


@pytest.mark.asyncio
async def test_what_the_reader_raises_ends_the_request() -> None:
    def read(head: Head) -> Callable[[bytes], None]:
        raise KeyError(head.status)

    script = Script([[LENGTH]])
    async with connected(script) as connections:
        with pytest.raises(KeyError, match="200"):
            await connections.post(b"{}", read)


@pytest.mark.asyncio
async def test_nothing_is_sent_once_closed_and_headers_hold_one_line() -> None:
    script = Script([[LENGTH]])
    async with connected(script) as connections:
        connections.close()
        with pytest.raises(BrokenAnswer, match="closed"):
            await ask(connections)
    with pytest.raises(ValueError, match="line break"):
        EngineConnections(URL("http://h:1"), headers={"A": "b\r\nc"}, connect_timeout_s=1, stall_timeout_s=None)
