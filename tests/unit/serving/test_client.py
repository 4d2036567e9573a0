"""SGLangClient against the fake server and against hand-written streams."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from agentrl.errors import WeightSyncError
from agentrl.serving.sglang_client import (
    EngineBusy,
    EngineRejected,
    EngineUnavailable,
    PartialGeneration,
    SGLangClient,
    expand_spans,
)
from agentrl.testing.fake_sglang import FakeSGLang, pseudo_logprob, pseudo_tokens
from agentrl.types import SamplingParams

PROMPT = [5, 6, 7]
TEN = SamplingParams(max_new_tokens=10)


@asynccontextmanager
async def client_of(url: str, **options: Any) -> AsyncGenerator[SGLangClient, None]:
    async with aiohttp.ClientSession() as session:
        client = SGLangClient(url, session=session, **options)
        try:
            yield client
        finally:
            client.close()


@asynccontextmanager
async def serving(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncGenerator[str, None]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def chunk(ids: list[int], total: int, *, label: str = "e1-v3", finish: str | None = None, **meta: Any) -> dict[str, Any]:
    return {
        "output_ids": ids,
        "meta_info": {
            "completion_tokens": total,
            "weight_version": label,
            "output_token_logprobs": [[-token / 10, token, None] for token in ids],
            "finish_reason": None if finish is None else {"type": finish},
            **meta,
        },
    }


def streaming(*chunks: Any) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        # One write, split at odd places by nobody: the parser must not depend on chunk borders.
        data = b"".join(b"data: " + orjson.dumps(item) + b"\n\n" for item in chunks) + b"data: [DONE]\n\n"
        for start in range(0, len(data), 7):
            await response.write(data[start : start + 7])
        return response

    return handler


@pytest.mark.asyncio
@pytest.mark.parametrize("incremental", [True, False])
async def test_incremental_and_cumulative_streams_give_the_same_tokens(incremental: bool) -> None:
    async with (
        FakeSGLang(label="e2-v5", token_latency_s=0.001, incremental=incremental) as server,
        client_of(server.url) as client,
    ):
        partial = await client.generate(PROMPT, TEN, rid="a" * 32)
    expected = pseudo_tokens(PROMPT, 10)
    assert partial.ids == expected
    assert partial.logprobs == [pseudo_logprob(token) for token in expected]
    assert partial.versions == [5] * 10
    assert partial.finish == "length"
    assert partial.prompt_tokens == 3


@pytest.mark.asyncio
async def test_a_stop_token_ends_the_generation_and_stays_in_it() -> None:
    stop = pseudo_tokens(PROMPT, 4)[3]
    sampling = SamplingParams(max_new_tokens=10, stop_token_ids=(stop,), top_p=0.9, top_k=50)
    async with FakeSGLang() as server, client_of(server.url) as client:
        partial = await client.generate(PROMPT, sampling, rid="a" * 32)
    assert partial.ids == pseudo_tokens(PROMPT, 4)
    assert partial.finish == "stop"
    params = server.requests[0]["sampling_params"]
    assert (params["top_p"], params["top_k"], params["stop_token_ids"]) == (0.9, 50, [stop])


@pytest.mark.asyncio
async def test_neutral_sampling_parameters_are_not_sent() -> None:
    async with FakeSGLang() as server, client_of(server.url) as client:
        await client.generate(PROMPT, TEN, rid="a" * 32)
    assert set(server.requests[0]["sampling_params"]) == {"max_new_tokens", "temperature", "skip_special_tokens"}


@pytest.mark.asyncio
async def test_spans_of_the_finished_chunk_replace_the_labels_of_the_chunks() -> None:
    spans = [{"version": "e1-v3", "start": 0, "end": 1}, {"version": "e1-v4", "start": 1, "end": 4}]
    chunks = [chunk([1, 2], 2), chunk([3, 4], 4, label="e1-v4", finish="length", weight_versions=spans)]
    async with serving(streaming(*chunks)) as url, client_of(url) as client:
        partial = await client.generate(PROMPT, TEN, rid="a" * 32)
    assert partial.versions == [3, 4, 4, 4]
    assert partial.logprobs == [-0.1, -0.2, -0.3, -0.4]


@pytest.mark.asyncio
async def test_without_spans_each_token_has_the_label_of_its_chunk() -> None:
    chunks = [chunk([1, 2], 2), chunk([3, 4], 4, label="e1-v4", finish="length")]
    async with serving(streaming(*chunks)) as url, client_of(url) as client:
        assert (await client.generate(PROMPT, TEN, rid="a" * 32)).versions == [3, 3, 4, 4]


@pytest.mark.asyncio
async def test_the_overlap_scheduler_s_early_boundary_is_shifted_unless_the_request_was_retracted() -> None:
    spans = [{"version": "e1-v3", "start": 0, "end": 1}, {"version": "e1-v4", "start": 1, "end": 4}]
    for retractions, expected in ((0, [3, 3, 4, 4]), (1, [3, 4, 4, 4])):
        final = chunk([1, 2, 3, 4], 4, finish="length", weight_versions=spans, num_retractions=retractions)
        async with serving(streaming(final)) as url, client_of(url) as client:
            client.span_shift = 1
            assert (await client.generate(PROMPT, TEN, rid="a" * 32)).versions == expected


def test_spans_expand_and_shift() -> None:
    spans = [
        {"version": "a", "start": 0, "end": 2},
        {"version": "b", "start": 2, "end": 3},
        {"version": "c", "start": 3, "end": 5},
    ]
    assert expand_spans(spans, 5, shift=0) == ["a", "a", "b", "c", "c"]
    assert expand_spans(spans, 5, shift=1) == ["a", "a", "a", "b", "c"]
    assert expand_spans(spans[:1], 4, shift=0) == ["a", "a", None, None]


@pytest.mark.asyncio
async def test_the_repeated_last_id_of_a_queue_abort_is_not_taken_twice() -> None:
    chunks = [chunk([1, 2], 2), chunk([2], 2, finish="abort")]
    async with serving(streaming(*chunks)) as url, client_of(url) as client:
        partial = await client.generate(PROMPT, TEN, rid="a" * 32)
    assert partial.ids == [1, 2]
    assert partial.finish == "abort"


@pytest.mark.asyncio
async def test_a_reset_keeps_the_tokens_that_arrived() -> None:
    async with FakeSGLang(label="e1-v0", token_latency_s=0.001) as server, client_of(server.url) as client:
        server.crash_after(tokens=4)
        partial = PartialGeneration()
        with pytest.raises(EngineUnavailable, match="after 4 tokens"):
            await client.generate(PROMPT, TEN, rid="a" * 32, into=partial)
    assert partial.ids == pseudo_tokens(PROMPT, 4)
    assert partial.versions == [0] * 4
    assert partial.finish is None


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, EngineRejected),
        (413, EngineRejected),
        (429, EngineBusy),
        (503, EngineBusy),
        (500, EngineUnavailable),
        (404, EngineUnavailable),
    ],
)
async def test_http_errors_say_whether_another_server_may_help(status: int, error: type[Exception]) -> None:
    async with FakeSGLang() as server, client_of(server.url) as client:
        server.fail_next(status)
        with pytest.raises(error, match=f"answered {status}"):
            await client.generate(PROMPT, TEN, rid="a" * 32)


@pytest.mark.asyncio
@pytest.mark.parametrize(("code", "error"), [(400, EngineRejected), (503, EngineBusy), (500, EngineUnavailable)])
async def test_errors_inside_a_stream_are_classified_alike(code: int, error: type[Exception]) -> None:
    async with serving(streaming({"error": {"message": "no", "code": code}})) as url, client_of(url) as client:
        with pytest.raises(error, match="no"):
            await client.generate(PROMPT, TEN, rid="a" * 32)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (chunk([1, 2], 2, finish="stop", output_token_logprobs=[[-0.1, 1, None]]), "1 logprobs"),
        (chunk([1], 1, finish="stop", output_token_logprobs=[[-0.1, 9, None]]), "other tokens"),
        (chunk([1], 1, finish="stop", output_token_logprobs=[[None, 1, None]]), "not SGLang's"),
        (chunk([1], 1, finish="stop", output_token_logprobs=[[-0.1, 1]]), "not SGLang's"),
        (chunk([1], 3, finish="stop"), "for 3 new tokens"),
        ({"hello": 1}, "not SGLang's"),
        (chunk([1], 1), "without a finish reason"),
    ],
)
async def test_a_malformed_chunk_is_refused(bad: dict[str, Any], message: str) -> None:
    async with serving(streaming(bad)) as url, client_of(url) as client:
        with pytest.raises(EngineUnavailable, match=message):
            await client.generate(PROMPT, TEN, rid="a" * 32)


@pytest.mark.asyncio
async def test_ids_outside_the_vocabulary_never_reach_the_server() -> None:
    async with FakeSGLang() as server, client_of(server.url, vocab_size=8) as client:
        for ids in ([1, 8], [-1, 2], []):
            with pytest.raises(EngineRejected):
                await client.generate(ids, TEN, rid="a" * 32)
    assert server.requests == []


@pytest.mark.asyncio
async def test_a_cancelled_generation_ends_at_the_engine() -> None:
    async with FakeSGLang(token_latency_s=0.005) as server, client_of(server.url) as client:
        asked = asyncio.ensure_future(client.generate(PROMPT, SamplingParams(max_new_tokens=10_000), rid="a" * 32))
        async with asyncio.timeout(120):
            while server.num_tokens < 10:
                await asyncio.sleep(0.005)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            while server.num_live:
                await asyncio.sleep(0.005)
        assert server.num_disconnects == 1


@pytest.mark.asyncio
async def test_control_calls_do_what_they_say(tmp_path: Path) -> None:
    async with FakeSGLang(api_key="data", admin_key="admin") as server:
        async with client_of(server.url, api_key="data", admin_key="admin") as client:
            info = await client.describe(timeout_s=60)
            assert (info.label, info.digest, info.is_embedded) == ("default", None, False)
            await client.pause("retract", timeout_s=60)
            assert not await client.is_ready(timeout_s=60)
            await client.update_weights_from_disk(
                str(tmp_path), label="e1-v1", flush_cache=True, expected_digest="x", timeout_s=60
            )
            await client.continue_generation(timeout_s=60)
            assert await client.is_ready(timeout_s=60)
            assert await client.is_healthy(timeout_s=60)
            assert (await client.model_info(timeout_s=60)).label == "e1-v1"
            assert (await client.loads(timeout_s=60))["loads"][0]["num_running_reqs"] == 0
            assert await client.weights_checksum(timeout_s=60) is not None
            await client.flush_cache(timeout_s=60)
            await client.abort("b" * 32, timeout_s=60)
            assert "expected_digest" not in server.updates[0]
            with pytest.raises(WeightSyncError, match="does not exist"):
                await client.update_weights_from_disk("/nowhere", label="e1-v2", flush_cache=True, timeout_s=60)
        async with client_of(server.url, api_key="wrong") as client:
            with pytest.raises(WeightSyncError, match="401"):
                await client.pause("abort", timeout_s=60)
            with pytest.raises(EngineUnavailable, match="401"):
                await client.generate(PROMPT, TEN, rid="a" * 32)


@pytest.mark.asyncio
async def test_a_control_call_never_meets_a_connection_that_the_server_is_closing() -> None:
    used: set[asyncio.Transport] = set()

    async def answer_once_per_connection(request: web.Request) -> web.StreamResponse:
        assert isinstance(request.transport, asyncio.Transport)
        if request.transport in used:  # as when its time was up while the request was on its way
            request.transport.abort()
        used.add(request.transport)
        return web.json_response({})

    async with serving(answer_once_per_connection) as url, client_of(url) as client:
        for _ in range(2):
            await client.pause("in_place", timeout_s=60)
            await client.continue_generation(timeout_s=60)


@pytest.mark.asyncio
@pytest.mark.parametrize("body", [b"\xff\xfe", b'{"vocab_size": "many"}', b'{"vocab_size": [1]}'], ids=repr)
async def test_facts_that_no_engine_would_give_are_this_servers_failure(body: bytes) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    async with serving(answer) as url, client_of(url) as client:
        with pytest.raises(WeightSyncError, match="not JSON|no number"):
            await client.describe(timeout_s=60)


@pytest.mark.asyncio
async def test_a_label_that_is_not_unicode_is_another_label() -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=b'{"weight_version": "e1-v\xff"}', content_type="application/json")

    async with serving(answer) as url, client_of(url) as client:
        assert (await client.model_info(timeout_s=60)).label == "e1-v\N{REPLACEMENT CHARACTER}"


@pytest.mark.asyncio
async def test_a_control_call_ends_at_its_timeout() -> None:
    async with FakeSGLang(update_s=60, check_path=False) as server, client_of(server.url) as client:
        with pytest.raises(WeightSyncError, match="no answer within 0.1 s"):
            await client.update_weights_from_disk("x", label="e1-v1", flush_cache=True, timeout_s=0.1)
