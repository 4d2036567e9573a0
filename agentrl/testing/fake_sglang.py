"""A real HTTP server that speaks the part of SGLang's API that agentrl uses, with scripted misfortunes.

The sampled tokens are a pure function of the whole context (``next_token``), so a generation that is broken off and
continued on another server must come out equal to ``pseudo_tokens``. Logprobs are a function of the token. With a
``FakeModel`` tokens are really sampled instead, by temperature and cuts, and logprobs are that model's under the server's label.
Without ``token_latency_s`` a generation is one chunk and no sleep: that is the mode for benches. ``first_token_s`` and
``length`` draw from distributions (`lognormal`), seeded and by request, so that two runs see the same misfortunes.

    async with FakeSGLang(token_latency_s=0.001) as server:
        manager.add_server(server.url)
        server.crash_after(tokens=5)
        server.stall_after(tokens=5)

As a process of its own: ``python -m agentrl.testing.fake_sglang --port P --weight-version base``, which says ``LISTENING <url>`` as
the embedded engine does (port 0 is a free one); ``--help`` lists what can be scripted there.
"""

import argparse
import asyncio
import hashlib
import hmac
import math
import os
import random
import sys
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson
from aiohttp import web

from agentrl.testing.fake_model import FakeModel, Sampling, sampling_fault
from agentrl.testing.killable_port import KillablePort

Distribution: TypeAlias = Callable[[random.Random], float]
"""Draws one value."""

VOCAB_SIZE = 1000
BASE_LABEL = "default"
"""What SGLang reports when nobody named its weights."""


def next_token(context: Sequence[int], vocab_size: int = VOCAB_SIZE) -> int:
    """The token that every fake server samples after ``context``."""
    tail = context[-3:]
    return (7 * len(context) + sum((index + 3) * token for index, token in enumerate(tail)) + 11) % vocab_size


def pseudo_tokens(context: Sequence[int], num_tokens: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """What an undisturbed generation of ``num_tokens`` after ``context`` gives."""
    ids = list(context)
    for _ in range(num_tokens):
        ids.append(next_token(ids, vocab_size))
    return ids[len(context) :]


def pseudo_logprob(token: int) -> float:
    """The logprob that goes with a sampled token."""
    return -0.01 - (token % 97) / 50


def lognormal(median: float, sigma: float, *, limit: float = math.inf) -> Distribution:
    """Heavy-tailed values around ``median``, none above ``limit``; ``sigma`` 0 is always the median."""
    return lambda rng: min(limit, rng.lognormvariate(math.log(median), sigma)) if sigma else min(limit, median)


@dataclass(slots=True, eq=False)
class _Live:
    """One request in the engine."""

    rid: str
    context: list[int]
    prompt_tokens: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    incremental: bool
    cached_tokens: int
    sampling: Sampling
    rng: random.Random
    labels: list[str] = field(default_factory=list[str])
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    num_sent: int = 0
    num_retractions: int = 0
    is_aborted: bool = False
    is_lost: bool = False
    stall_at: int | None = None
    hold_at: int | None = None
    ends_at: int | None = None
    is_running: bool = False

    @property
    def finish(self) -> dict[str, Any] | None:
        if self.ids and self.ids[-1] in self.stop_token_ids:
            return {"type": "stop", "matched": self.ids[-1]}
        if len(self.ids) >= self.max_new_tokens:
            return {"type": "length", "length": len(self.ids)}
        return {"type": "abort", "message": "Aborted", "status_code": None} if self.is_aborted else None


@dataclass(slots=True)
class _Failure:
    status: int
    body: str


class FakeSGLang:
    """One fake server on a port of 127.0.0.1, kept over ``kill`` and ``start``.

    Args:
        label: ``weight_version`` at every start.
        token_latency_s: seconds per sampled token; 0 answers in one chunk.
        incremental: stream deltas (``--incremental-streaming-output``) rather than cumulative chunks.
        api_key, admin_key: as SGLang's; the admin key is then the only one for control calls.
        update_s: seconds that a weight update takes.
        reports_spans: whether the finished chunk has ``weight_versions``.
        port: 0 takes a free one at the first start.
        check_path: refuse updates from a directory that does not exist, as SGLang does.
        sampler: the token after a context; must be a pure function of it.
        model: sample from this instead of ``sampler``; its vocabulary is the server's then.
        context_length: tokens of a prompt and its generation, at most; None for no bound.
        first_token_s: seconds before a request's first token.
        length: tokens after which a request ends by itself, with its first stop token; None leaves the end to the sampler.
        max_running: requests that sample at once; the others wait, as in SGLang's queue.
        max_total_tokens: size of the pretended cache, for ``token_usage``.
        seed: of the distributions.
    """

    def __init__(
        self,
        *,
        label: str = BASE_LABEL,
        token_latency_s: float = 0.0,
        incremental: bool = True,
        api_key: str | None = None,
        admin_key: str | None = None,
        update_s: float = 0.0,
        reports_spans: bool = True,
        check_path: bool = True,
        port: int = 0,
        sampler: Callable[[Sequence[int]], int] = next_token,
        model: FakeModel | None = None,
        context_length: int | None = None,
        first_token_s: Distribution | None = None,
        length: Distribution | None = None,
        max_running: int | None = None,
        max_total_tokens: int = 100_000,
        seed: int = 0,
    ) -> None:
        self._first_token_s, self._length, self._seed = first_token_s, length, seed
        self.max_running, self._max_total_tokens = max_running, max_total_tokens
        self._prompt_tokens = self._cached_tokens = 0
        self.exit_after_tokens: int | None = None
        """The whole process exits, like a crash, once it sampled so many tokens."""
        self.refused_paths: set[str] = set()
        """Directories whose weights it cannot load."""
        self.adapters: dict[str, str] = {}
        """Loaded LoRA adapters: name -> path."""
        self.received: dict[str, tuple[str, list[int], bytes]] = {}
        """Tensors that were broadcast to it since it started: name -> dtype, shape, bytes."""
        self.broadcasts: list[dict[str, Any]] = []
        """Bodies of the calls that received them."""
        self.broadcast_delay_s = 0.0
        """Before it takes part in a broadcast."""
        self.layout = {"tp_size": 1, "pp_size": 1, "dp_size": 1}
        """Of ``/server_info``."""
        self._groups: dict[str, Any] = {}
        self._in_session = False
        self.num_foreign = 0
        """Requests of somebody else that the load report counts."""
        self._sampler, self._model = sampler, model
        self._vocab_size = VOCAB_SIZE if model is None else model.vocab_size
        self._context_length = context_length
        self._load_mark = (0.0, 0)
        """When the load was last asked for, and the tokens sampled by then."""
        self.base_label = label
        self.label = label
        self.token_latency_s = token_latency_s
        self.incremental = incremental
        self.update_s = update_s
        self.reports_spans = reports_spans
        self.check_path = check_path
        self.lying_label: str | None = None
        """Reported by ``/model_info`` instead of the truth."""
        self.requests: list[dict[str, Any]] = []
        """Bodies of all ``/generate`` calls, in order."""
        self.calls: Counter[str] = Counter()
        """Control calls by path."""
        self.updates: list[dict[str, Any]] = []
        self.num_disconnects = 0
        """Requests whose client went away."""
        self.num_tokens = 0
        self.max_live = 0
        self._api_key, self._admin_key = api_key, admin_key
        self._pause_mode: str | None = None
        self._update_hangs = False
        self._resumed = asyncio.Event()
        self._departed = asyncio.Event()
        self._live: dict[str, _Live] = {}
        self._stalled = False
        self._crashes: deque[int] = deque()
        self._stalls: deque[int] = deque()
        self._holds: deque[int] = deque()
        self._let_go = asyncio.Event()
        self._failures: deque[_Failure] = deque()
        self._failed_updates: deque[_Failure] = deque()
        self._prefixes: set[int] = set()
        self._serving: tuple[KillablePort, web.AppRunner] | None = None
        self._port = port

    async def __aenter__(self) -> "FakeSGLang":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    # ---- scripting

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def num_live(self) -> int:
        """Requests in the engine, running or held."""
        return len(self._live)

    @property
    def is_paused(self) -> bool:
        return self._pause_mode is not None

    async def start(self) -> None:
        """Serve, with the base weights, on the port of the previous start."""
        self.label, self._pause_mode, self._stalled = self.base_label, None, False
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._live.clear()
        self._prefixes.clear()
        self.adapters.clear()
        self.received.clear()
        self._groups.clear()
        self._in_session = False
        runner = web.AppRunner(self._app(), access_log=None, handler_cancellation=True)
        await runner.setup()
        assert runner.server is not None
        port = KillablePort(runner.server, self._port)
        self._port = port.number
        self._serving = port, runner

    async def kill(self) -> None:
        """Like SIGKILL: every connection closed, also those just being made, and the port. Waits for no handler and no peer."""
        if self._serving is None:
            return
        (port, runner), self._serving = self._serving, None
        await port.kill()
        await runner.cleanup()  # has no connection left that it could wait for

    async def restart_with_base_weights(self) -> None:
        """Die and come back at once, as a supervisor would have it."""
        await self.kill()
        await self.start()

    def crash_after(self, *, tokens: int) -> None:
        """The next request's connection is reset when ``tokens`` tokens were sent; the server lives on."""
        self._crashes.append(tokens)

    def stall_after(self, *, tokens: int) -> None:
        """The next request falls silent when ``tokens`` tokens were sent; its connection stays open."""
        self._stalls.append(tokens)

    def hold_after(self, *, tokens: int) -> None:
        """The next request sends ``tokens`` tokens and samples no further one until ``let_go``."""
        self._holds.append(tokens)
        self._let_go.clear()

    def let_go(self) -> None:
        """Sample on where ``hold_after`` stopped."""
        self._let_go.set()

    def fail_next(self, status: int, *, times: int = 1, message: str = "scripted") -> None:
        """Answer the next ``/generate`` calls with an error."""
        body = orjson.dumps({"object": "error", "message": message, "code": status}).decode()
        self._failures.extend(_Failure(status, body) for _ in range(times))

    def fail_next_updates(self, status: int = 400, *, times: int = 1) -> None:
        """Refuse the next weight updates."""
        body = orjson.dumps({"success": False, "message": "scripted"}).decode()
        self._failed_updates.extend(_Failure(status, body) for _ in range(times))

    def heal_updates(self) -> None:
        """Forget the scripted refusals that are left."""
        self._failed_updates.clear()

    def lose_requests(self) -> None:
        """Forget what runs without telling its clients, as after a half-open connection."""
        for live in self._live.values():
            live.is_lost = True

    def hang_updates(self, *, hangs: bool = True) -> None:
        """Take weight updates and answer none of them until told otherwise."""
        self._update_hangs = hangs

    def stall(self, *, stalled: bool = True) -> None:
        """Accept generations and never answer; other calls work."""
        self._stalled = stalled

    # ---- the protocol

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._gate], client_max_size=1 << 30)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/pause_generation", self._pause)
        app.router.add_post("/continue_generation", self._continue)
        app.router.add_post("/update_weights_from_disk", self._update)
        app.router.add_post("/init_weights_update_group", self._join_group)
        app.router.add_post("/destroy_weights_update_group", self._leave_group)
        app.router.add_post("/begin_weight_update", self._begin_session)
        app.router.add_post("/end_weight_update", self._end_session)
        app.router.add_post("/update_weights_from_distributed", self._receive)
        app.router.add_post("/update_weight_version", self._rename)
        app.router.add_post("/load_lora_adapter", self._load_adapter)
        app.router.add_post("/unload_lora_adapter", self._unload_adapter)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/flush_cache", self._flush)
        app.router.add_post("/weights_checker", self._checksum)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/health", self._health)
        return app

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.calls[request.path] += 1
        if not self._is_authorized(request):
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    def _is_authorized(self, request: web.Request) -> bool:
        if request.path.startswith(("/health", "/ready")):
            return True
        is_data = request.path in ("/generate", "/model_info", "/server_info", "/v1/loads")
        key = self._api_key if is_data else self._admin_key or self._api_key
        return key is None or hmac.compare_digest(request.headers.get("Authorization", "").encode(), f"Bearer {key}".encode())

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = orjson.loads(await request.read())
        self.requests.append(body)
        if self._failures:
            failure = self._failures.popleft()
            return web.Response(status=failure.status, text=failure.body, content_type="application/json")
        rid = str(body.get("rid") or uuid.uuid4().hex)
        if rid in self._live:
            return _bad_request(f"Duplicate request ID detected: {rid}")
        fault = self._fault(body)
        if fault is not None:
            return _bad_request(fault)
        adapter = body.get("lora_path")
        if adapter is not None and adapter not in self.adapters:
            return _bad_request(f"The following requested LoRA adapters are not loaded: {{'{adapter}'}}")
        sampling: dict[str, Any] = body.get("sampling_params") or {}
        ids: list[int] = body["input_ids"]
        rng = random.Random(f"{self._seed} {len(self.requests)}")
        live = _Live(
            rid=rid,
            context=list(ids),
            prompt_tokens=len(ids),
            max_new_tokens=int(sampling.get("max_new_tokens", 128)),
            stop_token_ids=frozenset(() if sampling.get("ignore_eos") else sampling.get("stop_token_ids") or ()),
            incremental=self.incremental,
            cached_tokens=self._cached(str(body.get("extra_key")), ids),
            sampling=Sampling.of(sampling),
            rng=rng,
            stall_at=self._stalls.popleft() if self._stalls else None,
            hold_at=self._holds.popleft() if self._holds else None,
        )
        if self._length is not None:
            live.ends_at = max(1, round(self._length(rng)))
        self._live[rid] = live
        self.max_live = max(self.max_live, len(self._live))
        crash_at = self._crashes.popleft() if self._crashes else None
        try:
            while self._stalled or (self._is_queued(live) and not live.is_aborted):
                await self._next_departure()
            live.is_running = True
            if self._first_token_s is not None:
                await asyncio.sleep(self._first_token_s(rng))
            return await (self._stream(request, live, crash_at) if body.get("stream") else self._answer(live, body))
        except asyncio.CancelledError:
            self.num_disconnects += 1
            raise
        finally:
            self._live.pop(rid, None)
            self._departed.set()

    def _fault(self, body: dict[str, Any]) -> str | None:
        """Why SGLang would refuse the request, or die of it."""
        ids, sampling = body.get("input_ids"), body.get("sampling_params") or {}
        if not isinstance(ids, list) or not ids:
            return "input_ids must be a list of at least one token id"
        try:
            if min(ids) < 0 or max(ids) >= self._vocab_size:
                return f"ids outside a vocabulary of {self._vocab_size}: a real SGLang would be dead now"
            fault = sampling_fault(sampling)
        except TypeError as error:
            return f"the request holds a value of the wrong type: {error}"
        wanted = len(ids) + int(sampling.get("max_new_tokens", 128))
        if fault is None and self._context_length is not None and wanted > self._context_length:
            return f"Requested token count {wanted} exceeds the model's maximum context length of {self._context_length} tokens."
        return fault

    def _is_queued(self, live: _Live) -> bool:
        return self.max_running is not None and live not in list(self._live.values())[: self.max_running]

    async def _next_departure(self) -> None:
        self._departed.clear()
        await self._departed.wait()

    def _cached(self, namespace: str, ids: Sequence[int]) -> int:
        """Prompt tokens whose whole 16-token blocks were seen before in this namespace."""
        hits, prefix = 0, hash(namespace)
        for end in range(16, len(ids) + 1, 16):
            prefix = hash((prefix, *ids[end - 16 : end]))
            if prefix in self._prefixes:
                hits = end
            self._prefixes.add(prefix)
        hits = min(hits, len(ids) - 1)
        self._prompt_tokens += len(ids)
        self._cached_tokens += hits
        return hits

    async def _answer(self, live: _Live, body: dict[str, Any]) -> web.Response:
        while live.finish is None:
            await self._sample(live)
        chunk = self._chunk(live)
        start = int(body.get("logprob_start_len", -1))
        if self._model is not None and body.get("return_logprob") and start >= 0:
            chunk["meta_info"]["input_token_logprobs"] = self._prompt_logprobs(self._model, live, start)
        return web.Response(body=orjson.dumps(chunk), content_type="application/json")

    def _prompt_logprobs(self, model: FakeModel, live: _Live, start: int) -> list[list[Any]]:
        """Of the prompt's tokens from ``start`` on; the first has none."""
        prompt = live.context[: live.prompt_tokens]
        values = [None, *model.logprobs(self.label, prompt[: start + 1], prompt[start + 1 :])]
        return [[value, token, None] for value, token in zip(values, prompt[start:], strict=True)]

    async def _stream(self, request: web.Request, live: _Live, crash_at: int | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await self._write_chunks(request, response, live, crash_at)
        except ConnectionError:
            self.num_disconnects += 1
        return response

    async def _write_chunks(self, request: web.Request, response: web.StreamResponse, live: _Live, crash_at: int | None) -> None:
        await response.prepare(request)
        while live.finish is None:
            await self._sample(live)
            if crash_at is not None and len(live.ids) >= crash_at:
                del live.ids[crash_at:], live.logprobs[crash_at:], live.labels[crash_at:]
                await response.write(b"data: " + orjson.dumps(self._chunk(live)) + b"\n\n")
                await asyncio.sleep(0.01)  # lets the written tokens leave before the reset
                assert request.transport is not None
                request.transport.abort()
                return
            is_silent = live.stall_at is not None and len(live.ids) >= live.stall_at
            if live.finish is None or is_silent:
                if is_silent:
                    del live.ids[live.stall_at :], live.logprobs[live.stall_at :], live.labels[live.stall_at :]
                await response.write(b"data: " + orjson.dumps(self._chunk(live)) + b"\n\n")
            if is_silent:
                await asyncio.Event().wait()
        await response.write(b"data: " + orjson.dumps(self._chunk(live)) + b"\n\ndata: [DONE]\n\n")
        await response.write_eof()

    async def _sample(self, live: _Live) -> None:
        """One token, or all of them when tokens take no time; held while paused."""
        if live.is_lost:
            await asyncio.Event().wait()
        while not self._resumed.is_set() and not live.is_aborted:
            await self._resumed.wait()
        if live.hold_at == len(live.ids):
            await self._let_go.wait()
        while live.finish is None:
            is_last = live.ends_at is not None and len(live.ids) + 1 >= live.ends_at
            token, logprob = self._draw(live, is_last=is_last)
            live.context.append(token)
            live.ids.append(token)
            live.logprobs.append(logprob)
            live.labels.append(self.label)
            self.num_tokens += 1
            if self.exit_after_tokens is not None and self.num_tokens >= self.exit_after_tokens:
                os._exit(1)
            if self.token_latency_s:
                await asyncio.sleep(self.token_latency_s)
                return
            if len(live.ids) == live.hold_at:
                return

    def _draw(self, live: _Live, *, is_last: bool) -> tuple[int, float]:
        ends = is_last and live.stop_token_ids
        if self._model is not None and not ends:
            return self._model.draw(self.label, live.context, live.sampling, live.rng)
        token = min(live.stop_token_ids) if ends else self._sampler(live.context)
        return token, pseudo_logprob(token)

    def _chunk(self, live: _Live) -> dict[str, Any]:
        start = live.num_sent if live.incremental else 0
        live.num_sent = len(live.ids)
        ids = live.ids[start:]
        meta: dict[str, Any] = {
            "id": live.rid,
            "finish_reason": live.finish,
            "prompt_tokens": live.prompt_tokens,
            "cached_tokens": live.cached_tokens,
            "completion_tokens": len(live.ids),
            "num_retractions": live.num_retractions,
            "weight_version": live.labels[-1] if live.labels else self.label,
            "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(live.logprobs[start:], ids, strict=True)],
            "output_token_logprobs_length": len(live.ids),
        }
        if live.finish is not None and self.reports_spans:
            meta["weight_versions"] = _spans(live.labels)
        return {"text": "", "output_ids": ids, "meta_info": meta}

    async def _pause(self, request: web.Request) -> web.Response:
        mode = (await request.json()).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            return _bad_request(f"unknown mode {mode}")
        self._pause_mode = mode
        self._resumed.clear()
        if mode == "retract":
            for live in self._live.values():
                live.num_retractions += bool(live.ids)
        if mode == "abort":
            for live in self._live.values():
                live.is_aborted = True
            self._departed.set()
            while any(live.is_aborted for live in self._live.values()):
                await self._next_departure()
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        await request.read()
        self._pause_mode = None
        self._resumed.set()
        return web.json_response({"status": "ok"})

    async def _update(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        self.updates.append(body)
        if not isinstance(body.get("model_path"), str):
            return _bad_request("Object missing required field `model_path`")
        if self._failed_updates:
            failure = self._failed_updates.popleft()
            return web.Response(status=failure.status, text=failure.body, content_type="application/json")
        if body["model_path"] in self.refused_paths:
            return web.json_response({"success": False, "message": f"{body['model_path']} does not load"}, status=400)
        is_missing = self.check_path and not os.path.isdir(body["model_path"])  # noqa: ASYNC240  # a stat in a test double
        if is_missing:
            return web.json_response({"success": False, "message": f"{body['model_path']} does not exist"}, status=400)
        while self._update_hangs:  # noqa: ASYNC110 (released from another thread)
            await asyncio.sleep(0.02)
        while self._pause_mode is None and self._live:  # SGLang's writer lock waits for what runs
            await self._next_departure()
        await asyncio.sleep(self.update_s)
        is_held = bool(self._live) and self._pause_mode == "in_place"
        self.label = str(body.get("weight_version") or self.label)
        if body.get("flush_cache", True) and is_held:
            message = "Weights were updated, but the cache was not flushed: requests are running"
            return web.json_response({"success": False, "message": message}, status=400)
        if body.get("flush_cache", True):
            self._prefixes.clear()
        return web.json_response({"success": True, "message": "Succeeded to update model weights."})

    async def _join_group(self, request: web.Request) -> web.Response:
        """A real process group of torch, as rank 1; gloo only."""
        body: dict[str, Any] = await request.json()
        try:
            self._groups[body["group_name"]] = await asyncio.to_thread(_join_group, body)
        except (RuntimeError, OSError) as error:
            return _result(f"Failed to initialize custom process group: {error}.")
        return _result()

    async def _leave_group(self, request: web.Request) -> web.Response:
        name = (await request.json())["group_name"]
        if self._groups.pop(name, None) is None:
            return _result("The group to be destroyed does not exist.")
        return _result()

    async def _begin_session(self, request: web.Request) -> web.Response:
        await request.read()
        if self._in_session:
            return _result("a weight-update session is already open; call end_weight_update() first")
        self._in_session = True
        return _result()

    async def _end_session(self, request: web.Request) -> web.Response:
        await request.read()
        if not self._in_session:
            return _result("no weight-update session is open; call begin_weight_update() first")
        self._in_session = False
        return _result()

    async def _receive(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        self.broadcasts.append(body)
        if self._failed_updates:
            failure = self._failed_updates.popleft()
            return web.Response(status=failure.status, text=failure.body, content_type="application/json")
        if not self._in_session:
            return _result("update_weights_from_distributed must run between begin_weight_update() and end_weight_update()")
        if body.get("load_format") != "flattened_bucket" or body["group_name"] not in self._groups:
            return _result(f"group {body['group_name']} is not joined, or the format is another")
        await asyncio.sleep(self.broadcast_delay_s)
        try:
            tensors = await asyncio.to_thread(_receive_bucket, self._groups[body["group_name"]], body)
        except RuntimeError as error:
            return _result(f"Failed to receive weights: {error}")
        self.received |= tensors
        self.label = str(body.get("weight_version") or self.label)
        if body.get("flush_cache", True):
            self._prefixes.clear()
        return _result()

    async def _load_adapter(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        name, path = str(body["lora_name"]), str(body["lora_path"])
        if name in self.adapters or path in self.refused_paths:
            message = f"{name} is loaded already" if name in self.adapters else f"{path} does not load"
            answer = {"success": False, "error_message": message, "loaded_adapters": self.adapters}
            return web.json_response(answer, status=400)
        self.adapters[name] = path
        return web.json_response({"success": True, "error_message": "", "loaded_adapters": self.adapters})

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        name = str((await request.json())["lora_name"])
        is_known = self.adapters.pop(name, None) is not None
        answer = {
            "success": is_known,
            "error_message": "" if is_known else f"{name} is not loaded",
            "loaded_adapters": self.adapters,
        }
        return web.json_response(answer, status=200 if is_known else 400)

    async def _rename(self, request: web.Request) -> web.Response:
        self.label = str((await request.json())["new_version"])
        return web.json_response({"success": True, "new_version": self.label})

    async def _abort(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        if body.get("abort_all"):
            meant = list(self._live.values())
        else:
            meant = [live for live in (self._live.get(str(body.get("rid", ""))),) if live is not None]
        for live in meant:
            live.is_aborted = live.is_aborted or not self.is_paused  # a held request never hears of it
        self._departed.set()
        return web.Response()

    async def _flush(self, request: web.Request) -> web.Response:
        await request.read()
        if self._live:
            return web.Response(status=400, text="requests are running")
        self._prefixes.clear()
        return web.Response(text="Cache flushed.")

    async def _checksum(self, request: web.Request) -> web.Response:
        await request.read()
        checksum = hashlib.sha256(self.label.encode()).hexdigest()[:16]
        return web.json_response({"success": True, "message": "", "per_engine_checksum": checksum})

    async def _model_info(self, request: web.Request) -> web.Response:
        label = self.lying_label or self.label
        return web.json_response({"model_path": "fake", "weight_version": label, "is_generation": True})

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"disable_overlap_schedule": True, "weight_version": self.base_label, **self.layout})

    async def _loads(self, request: web.Request) -> web.Response:
        known = self.num_foreign + sum(not live.is_lost for live in self._live.values())
        running = known if self.max_running is None else min(known, self.max_running)
        held = running if self.is_paused else 0
        used = sum(len(live.context) for live in self._live.values() if live.is_running)
        load = {
            "dp_rank": 0,
            "num_running_reqs": running - held,
            "num_waiting_reqs": known - running,
            "num_used_tokens": used,
            "num_total_tokens": sum(len(live.context) for live in self._live.values()),
            "max_total_num_tokens": self._max_total_tokens,
            "max_running_requests": self.max_running,
            "token_usage": min(1.0, used / self._max_total_tokens),
            "gen_throughput": self._tokens_per_s(),
            "cache_hit_rate": self._cached_tokens / self._prompt_tokens if self._prompt_tokens else 0.0,
            "queues": {"paused": held},
        }
        return web.json_response({"version": "fake", "loads": [load]})

    def _tokens_per_s(self) -> float:
        """Since the last time somebody asked."""
        (then, tokens), now = self._load_mark, asyncio.get_running_loop().time()
        self._load_mark = (now, self.num_tokens)
        return (self.num_tokens - tokens) / max(1e-3, now - then)

    async def _ready(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.is_paused else 200)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.is_paused or self._stalled else 200)


def _spans(labels: Sequence[str]) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    for token, label in enumerate(labels):
        if spans and spans[-1]["version"] == label:
            spans[-1]["end"] = token + 1
        else:
            spans.append({"version": label, "start": token, "end": token + 1})
    return spans


def _join_group(body: dict[str, Any]) -> Any:
    from datetime import timedelta

    from torch.distributed import TCPStore

    from agentrl.serving.weight_sender import join_group

    timeout = timedelta(seconds=60)
    store = TCPStore(body["master_address"], body["master_port"], timeout=timeout, wait_for_workers=False)
    group, rank, world_size = body["group_name"], body["rank_offset"], body["world_size"]
    return join_group(store, group=group, rank=rank, world_size=world_size, backend=body["backend"], timeout=timeout)


def _receive_bucket(group: Any, body: dict[str, Any]) -> dict[str, tuple[str, list[int], bytes]]:
    import torch
    import torch.distributed as dist

    sizes = [
        math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in zip(body["dtypes"], body["shapes"], strict=True)
    ]
    data = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(data, src=0, group=group)
    pieces = (bytes(piece.numpy()) for piece in data.split(sizes))
    return {
        name: (dtype, shape, piece)
        for name, dtype, shape, piece in zip(body["names"], body["dtypes"], body["shapes"], pieces, strict=True)
    }


def _result(problem: str = "") -> web.Response:
    return web.json_response({"success": not problem, "message": problem or "Success"}, status=400 if problem else 200)


def _bad_request(message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=400)


async def _serve(args: argparse.Namespace) -> None:
    server = FakeSGLang(
        port=args.port,
        label=args.weight_version,
        token_latency_s=args.token_latency_s,
        first_token_s=lognormal(args.first_token_s, args.first_token_sigma) if args.first_token_s else None,
        length=lognormal(args.length, args.length_sigma) if args.length else None,
        max_running=args.max_running_requests,
        incremental=args.incremental_streaming_output,
        model=FakeModel(args.sample_vocab_size) if args.sample_vocab_size else None,
        context_length=args.context_length,
        seed=args.random_seed,
    )
    server.exit_after_tokens = args.exit_after_tokens
    async with server:
        sys.stdout.write(f"LISTENING {server.url}\n")
        sys.stdout.flush()
        await asyncio.get_running_loop().create_future()


def main() -> None:
    """Serve until killed. SGLang's other flags are accepted and ignored."""
    parser = argparse.ArgumentParser(prog="python -m agentrl.testing.fake_sglang")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--weight-version", default=BASE_LABEL)
    parser.add_argument("--token-latency-s", type=float, default=0.0, help="per sampled token")
    parser.add_argument("--first-token-s", type=float, default=0.0, help="median seconds before the first token")
    parser.add_argument("--first-token-sigma", type=float, default=0.0, help="of its logarithm")
    parser.add_argument("--length", type=float, default=0.0, help="median tokens of a generation; 0 leaves it to the sampler")
    parser.add_argument("--length-sigma", type=float, default=0.0, help="of its logarithm")
    parser.add_argument("--max-running-requests", type=int, default=None)
    parser.add_argument("--exit-after-tokens", type=int, default=None, help="die after so many sampled tokens")
    parser.add_argument("--incremental-streaming-output", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--context-length", type=int, default=None, help="refuse longer requests")
    parser.add_argument("--sample-vocab-size", type=int, default=0, help="sample from a FakeModel of so many tokens")
    parser.add_argument("--random-seed", type=int, default=0)
    args, _ = parser.parse_known_args()
    asyncio.run(_serve(args))


if __name__ == "__main__":
    main()
