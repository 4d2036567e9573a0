"""A thin client that shows everything: status codes, bodies, chunks. Not the product's client, on purpose."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from agentrl.serving.load_policy import parse_loads

SETTLE_TIMEOUT_S = 120.0
"""Of waits that take a moment on a quiet machine."""


@dataclass(frozen=True)
class Output:
    """A finished generation."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    meta: dict[str, Any]

    @property
    def finish(self) -> str:
        return self.meta["finish_reason"]["type"]

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        return [(span["version"], span["start"], span["end"]) for span in self.meta["weight_versions"]]

    @classmethod
    def of(cls, prompt: Sequence[int], body: dict[str, Any]) -> "Output":
        meta = body["meta_info"]
        entries = meta.get("output_token_logprobs") or []
        assert [entry[1] for entry in entries] == body["output_ids"]
        return cls(list(prompt), body["output_ids"], [entry[0] for entry in entries], meta)


@dataclass
class Running:
    """A streamed request: `began` once some tokens have come; await `output` for the end."""

    rid: str
    began: asyncio.Event = field(default_factory=asyncio.Event)
    num_tokens: int = 0
    output: "asyncio.Task[Output] | None" = None

    @property
    def is_done(self) -> bool:
        return self.output is not None and self.output.done()

    async def finished(self) -> Output:
        assert self.output is not None
        return await asyncio.wait_for(self.output, 250)


def params(max_new_tokens: int, **more: Any) -> dict[str, Any]:
    return {"max_new_tokens": max_new_tokens, "temperature": 1.0, "ignore_eos": True, **more}


class Api:
    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str) -> AsyncIterator["Api"]:
        timeout = aiohttp.ClientTimeout(total=250)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
            yield cls(session)

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        async with self.session.post(path, json=body) as answer:
            return answer.status, _parse(await answer.text())

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(path) as answer:
            return answer.status, _parse(await answer.text())

    async def ok(self, path: str, **body: Any) -> Any:
        status, answer = await self.post(path, **body)
        assert status == 200, (path, status, answer)
        return answer

    async def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        rid: str | None = None,
        extra_key: str | None = None,
        **sampling: Any,
    ) -> Output:
        body: dict[str, Any] = {"input_ids": list(prompt), "sampling_params": params(max_new_tokens, **sampling)}
        body |= {} if rid is None else {"rid": rid}
        body |= {} if extra_key is None else {"extra_key": extra_key}
        return Output.of(prompt, await self.ok("/generate", return_logprob=True, **body))

    async def chunks(self, prompt: Sequence[int], max_new_tokens: int, **more: Any) -> AsyncIterator[dict[str, Any]]:
        """Stream; yields each chunk's body, and checks that [DONE] ends it."""
        sampling = params(max_new_tokens, **more.pop("sampling", {}))
        body = {"input_ids": list(prompt), "sampling_params": sampling, "stream": True, "return_logprob": True, **more}
        async with self.session.post("/generate", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        raise AssertionError("the stream ended without [DONE]")

    def begin(
        self, prompt: Sequence[int], max_new_tokens: int, *, rid: str, after: int = 4, extra_key: str | None = None
    ) -> Running:
        """Start a streamed request; ``began`` is set when ``after`` tokens have come."""
        running = Running(rid)
        namespace = {} if extra_key is None else {"extra_key": extra_key}

        async def consume() -> Output:
            last: dict[str, Any] = {}
            try:
                async for last in self.chunks(prompt, max_new_tokens, rid=rid, **namespace):
                    running.num_tokens = len(last["output_ids"])
                    if running.num_tokens >= after:
                        running.began.set()
            finally:
                running.began.set()
            return Output.of(prompt, last)

        running.output = asyncio.create_task(consume())
        return running

    async def begin_and_wait(self, prompt: Sequence[int], max_new_tokens: int, **how: Any) -> Running:
        running = self.begin(prompt, max_new_tokens, **how)
        await asyncio.wait_for(running.began.wait(), SETTLE_TIMEOUT_S)
        assert not running.is_done, "the request ended before the test could act on it"
        return running

    async def load(self) -> dict[str, Any]:
        _, body = await self.get("/v1/loads?include=all")
        return body["loads"][0]

    async def until_running(self, count: int) -> None:
        """Wait until ``count`` requests generate."""
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            while (await self.load())["num_running_reqs"] != count:
                await asyncio.sleep(0.02)

    async def num_held(self) -> int:
        """Requests that the server has, running or not."""
        return parse_loads((await self.get("/v1/loads"))[1]).total

    async def until_held(self, count: int) -> None:
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            while await self.num_held() != count:
                await asyncio.sleep(0.02)

    async def version(self) -> str:
        return (await self.get("/model_info"))[1]["weight_version"]

    async def settle(self, model: Path) -> None:
        """Nothing in flight, not paused, ``model`` serving as v0, nothing cached."""
        await self.ok("/continue_generation")
        await self.ok("/abort_request", abort_all=True)
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            while (await self.post("/flush_cache"))[0] != 200:
                await asyncio.sleep(0.05)
                await self.ok("/abort_request", abort_all=True)
        await self.ok("/update_weights_from_disk", model_path=str(model), weight_version="v0")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
