"""SGLang's native routes over the embedded engine: the subset that a rollout client and a weight reconciler use.

Shapes, defaults, status codes and error bodies follow SGLang 0.5.23, so that one client serves both. Where the real
server has a trap, this one is strict instead: ids outside the vocabulary are refused, an abort reaches a request that a
pause holds, and a checkpoint that does not fit leaves the old weights serving.
"""

import asyncio
import hashlib
import hmac
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agentrl.errors import WeightSyncError
from agentrl.rate_limit import RateLimit
from agentrl.serving.embedded.continuous_batching import Sampling
from agentrl.serving.embedded.engine import Engine, EngineFailed, Job, PauseMode

DISCONNECT_POLL_S = 0.5
"""How often a waiting request looks whether its client is still there."""
MAX_BODY_BYTES = 32 << 20
"""Largest request body: some millions of token ids, far above any context."""
HEALTH_TIMEOUT_S = 20.0
"""What `/health_generate` gives its one token, as SGLang does."""

RATE_LIMIT = 2000.0
"""Requests per second and client address: above what an engine can answer, so that only a flood meets it."""

FLUSH_LIMIT_S = 600.0
"""Longest a flush may wait for the engine to be idle."""

_FLUSH_POLL_S = 0.02
_OPEN_PREFIXES = ("/health", "/ready", "/metrics")  # reachable without the api key, as in SGLang
_Body = TypeVar("_Body", bound=msgspec.Struct)


class SamplingBody(msgspec.Struct, forbid_unknown_fields=True):
    """``sampling_params``: SGLang's names; null means its default. What this engine cannot do is refused when asked for."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    sampling_seed: int | None = None  # ignored, as SGLang does without --enable-deterministic-inference
    skip_special_tokens: bool | None = None  # about text, of which there is none
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    stream_interval: int | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_new_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_regex: str | list[str] | None = None
    beam_width: int | None = None
    logit_bias: dict[str, float] | None = None
    json_schema: Any = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: Any = None
    choice: list[str] | None = None
    custom_params: dict[str, Any] | None = None
    watermark: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_new_tokens": (0,),
    "stop": ([], ""),
    "stop_regex": ([], ""),
    "beam_width": (1,),
    "logit_bias": ({},),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "choice": (),
    "custom_params": ({},),
    "watermark": (False,),
}
"""Parameters this engine does not implement, and the values that ask for nothing."""


class GenerateBody(msgspec.Struct):
    """``POST /generate``. Unknown top-level keys are ignored, as in SGLang."""

    input_ids: list[int] | None = None
    rid: str | None = None
    sampling_params: SamplingBody | None = None
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int | None = None
    return_prompt_token_ids: bool = False
    top_logprobs_num: int | None = None
    token_ids_logprob: list[int] | None = None
    text: Any = None
    input_embeds: Any = None
    lora_path: str | None = None
    session_params: Any = None


class AbortBody(msgspec.Struct):
    rid: str = ""
    abort_all: bool = False


class PauseBody(msgspec.Struct):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class UpdateFromDiskBody(msgspec.Struct):
    """SGLang's fields, plus ``expected_digest``: refuse without loading when the files are others."""

    model_path: str
    weight_version: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    expected_digest: str | None = None


class WeightVersionBody(msgspec.Struct):
    new_version: str
    abort_all_requests: bool = True


class CheckerBody(msgspec.Struct):
    action: str


class _Refused(Exception):
    """A request that is answered with an error: a status and a body in SGLang's shape."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(body)
        self.status = status
        self.body = body


def create_app(
    engine: Engine,
    *,
    vocab_size: int,
    max_context_tokens: int,
    eos_ids: tuple[int, ...],
    max_running_requests: int,
    model_facts: dict[str, Any],
    server_args: dict[str, Any],
    api_key: str | None = None,
    incremental_streaming: bool = False,
    rate_limit: float | None = RATE_LIMIT,
    weights_roots: Sequence[Path] = (),
) -> FastAPI:
    """The application.

    Args:
        engine: started.
        vocab_size: ids from 0 to ``vocab_size - 1`` are accepted.
        max_context_tokens: prompt plus ``max_new_tokens`` may not exceed it.
        eos_ids: end a generation unless ``ignore_eos``.
        max_running_requests: reported by `/v1/loads`.
        model_facts: further keys of `/model_info`.
        server_args: keys of `/server_info`.
        api_key: when given, every route but health, readiness and metrics wants ``Authorization: Bearer``.
        incremental_streaming: stream chunks carry only what is new, instead of everything so far.
        rate_limit: requests per second and client address; more get HTTP 429. None is no limit.
        weights_roots: folders below which an update's ``model_path`` must lie, links followed; empty allows any.
    """
    app = FastAPI(title="agentrl embedded engine", openapi_url=None)
    if rate_limit is not None:
        app.add_middleware(RateLimit, per_s=rate_limit)
    updates = asyncio.Lock()  # of two updates at once, which one won would be the disk's choice
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_EngineMetrics(engine))

    def guarded(route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def handler(request: Request) -> Response:
            path = request.url.path
            if api_key and not path.startswith(_OPEN_PREFIXES) and not _is_authorized(request, api_key):
                return _json({"error": "Unauthorized"}, 401)
            try:
                return await route(request)
            except _Refused as refused:
                return _json(refused.body, refused.status)
            except EngineFailed as failed:
                return _json({"error": {"message": str(failed)}}, 500)

        return handler

    def route(path: str, *methods: str) -> Callable[[Callable[[Request], Awaitable[Response]]], None]:
        def register(function: Callable[[Request], Awaitable[Response]]) -> None:
            app.router.add_route(path, guarded(function), methods=list(methods))

        return register

    def make_job(body: GenerateBody) -> Job:
        _refuse_unsupported(body)
        params = body.sampling_params or SamplingBody()
        prompt = body.input_ids or []
        max_new_tokens = 128 if params.max_new_tokens is None else params.max_new_tokens
        _check_prompt(prompt, vocab_size)
        if max_new_tokens < 0:
            raise _invalid(f"max_new_tokens must be at least 0, got {max_new_tokens}.")
        if len(prompt) + max_new_tokens > max_context_tokens:
            raise _invalid(
                f"Requested token count exceeds the model's maximum context length of {max_context_tokens} tokens. You requested "
                f"a total of {len(prompt) + max_new_tokens} tokens: {len(prompt)} tokens from the input messages and "
                f"{max_new_tokens} tokens for the completion."
            )
        score_from = -1 if body.logprob_start_len is None or not body.return_logprob else body.logprob_start_len
        if not -1 <= score_from < len(prompt):
            raise _invalid(f"logprob_start_len={score_from} must be -1 or lie within the prompt of {len(prompt)} tokens.")
        rid = body.rid or uuid.uuid4().hex
        if engine.is_live(rid):
            raise _invalid(f"Duplicate request ID detected: {rid}")
        return Job(
            rid=rid,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            stop_ids=() if params.ignore_eos else (*(params.stop_token_ids or ()), *eos_ids),  # SGLang's: it overrules both
            sampling=_sampling(params),
            score_from=score_from,
            is_streamed=body.stream,
            loop=asyncio.get_running_loop(),
        )

    @route("/generate", "POST", "PUT")
    async def _generate(request: Request) -> Response:
        body = await _decode(request, GenerateBody)
        job = make_job(body)
        engine.submit(job)
        if body.stream:
            chunks = _stream(engine, job, body, request, is_incremental=incremental_streaming)
            return StreamingResponse(chunks, media_type="text/event-stream")
        try:
            while not await _changed(job):
                if await request.is_disconnected():
                    return Response(status_code=499)
        finally:
            if job.finish is None:
                engine.abort(job.rid)
        status = (job.finish or {}).get("status_code") or 200
        return _json(_result(job, body, 0, is_final=True), status)

    @route("/health", "GET")
    async def _health(_: Request) -> Response:
        return Response(status_code=200 if engine.failure is None else 503)

    @route("/health_generate", "GET")
    async def _health_generate(_: Request) -> Response:
        if engine.is_paused or engine.failure is not None:
            return Response(status_code=503)
        probe = make_job(GenerateBody(input_ids=[0], sampling_params=SamplingBody(max_new_tokens=1)))
        engine.submit(probe)
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await probe.changed.wait()
        except TimeoutError:
            engine.abort(probe.rid)
            return Response(status_code=503)
        return Response(status_code=200 if engine.failure is None else 503)

    @route("/ready", "GET")
    async def _ready(_: Request) -> Response:
        return Response(status_code=503 if engine.is_paused or engine.failure is not None else 200)

    def model_info() -> dict[str, Any]:
        return {
            **model_facts,
            "model_path": engine.model_path,
            "served_model_name": engine.model_path,
            "weight_version": engine.weight_version,
            "weights_digest": engine.weights_digest,
        }

    @route("/model_info", "GET")
    async def _model_info(_: Request) -> Response:
        return _json(model_info())

    @route("/get_model_info", "GET")
    async def _get_model_info(_: Request) -> Response:
        return _json(model_info())

    @route("/server_info", "GET")
    async def _server_info(_: Request) -> Response:
        load = engine.load()
        state = {"weight_version": engine.weight_version, "is_paused": engine.is_paused}
        return _json(
            {
                **server_args,
                "frontend": "agentrl-embedded",
                "status": "UnHealthy" if engine.failure is not None else "Up",
                "max_total_num_tokens": load.capacity_tokens,
                "max_req_input_len": max_context_tokens,
                "internal_states": [state],
                **model_info(),
            }
        )

    @route("/v1/loads", "GET")
    async def _loads(_: Request) -> Response:
        load, now = engine.load(), time.time()
        usage = load.used_tokens / load.capacity_tokens
        entry = {
            "timestamp": now,
            "dp_rank": 0,
            "num_running_reqs": load.num_running,
            "num_waiting_reqs": load.num_waiting,
            "num_used_tokens": load.used_tokens,
            "num_total_tokens": load.used_tokens,
            "num_active_tokens": load.used_tokens,
            "max_total_num_tokens": load.capacity_tokens,
            "max_running_requests": max_running_requests,
            "token_usage": usage,
            "gen_throughput": load.generation_throughput,
            "cache_hit_rate": load.cached_prompt_tokens / max(1, load.prompt_tokens),
            "utilization": load.num_running / max_running_requests,
            # What was retracted is back in the waiting queue.
            "queues": {"waiting": load.num_waiting, "grammar": 0, "paused": load.num_paused, "retracted": 0},
        }
        return _json({"timestamp": now, "version": "agentrl-embedded", "num_accelerators": 1, "loads": [entry]})

    @route("/abort_request", "POST")
    async def _abort_request(request: Request) -> Response:
        body = await _decode(request, AbortBody)
        if body.abort_all:
            await engine.abort_all()
        else:
            engine.abort(body.rid)
        return Response(status_code=200)

    @route("/pause_generation", "POST")
    async def _pause(request: Request) -> Response:
        body = await _decode(request, PauseBody)
        mode: PauseMode = body.mode
        await engine.pause(mode)
        return _json({"message": "Generation paused successfully.", "status": "ok"})

    @route("/continue_generation", "POST")
    async def _continue(_: Request) -> Response:
        await engine.resume()
        return _json({"message": "Generation continued successfully.", "status": "ok"})

    @route("/flush_cache", "GET", "POST")
    async def _flush_cache(request: Request) -> Response:
        try:
            timeout_s = float(request.query_params.get("timeout", "0"))
        except ValueError:
            raise _invalid("timeout must be a number of seconds.") from None
        if not 0 <= timeout_s <= FLUSH_LIMIT_S:  # also what is not a number, or without end
            raise _invalid(f"timeout={timeout_s} must lie between 0 and {FLUSH_LIMIT_S:g} seconds.")
        give_up = time.monotonic() + timeout_s
        while not (flushed := await engine.flush_cache()) and time.monotonic() < give_up:  # noqa: ASYNC110 (its thread knows)
            await asyncio.sleep(_FLUSH_POLL_S)
        if flushed:
            return PlainTextResponse("Cache flushed.\n")
        load = engine.load()
        busy = load.num_running + load.num_paused
        return PlainTextResponse(f"Cache not flushed: {busy} requests in flight, {load.num_waiting} queued.\n", 400)

    @route("/update_weights_from_disk", "POST")
    async def _update_from_disk(request: Request) -> Response:
        body = await _decode(request, UpdateFromDiskBody)
        if not await asyncio.to_thread(_is_below, body.model_path, weights_roots):
            message = (
                f"model_path={body.model_path!r} lies outside the folders that this engine loads weights from (--weights-root)."
            )
            return _json({"success": False, "message": message, "num_paused_requests": 0}, 400)
        async with updates:
            try:
                carried_on = await engine.update(
                    body.model_path,
                    version=body.weight_version,
                    flush_cache=body.flush_cache,
                    abort_all=body.abort_all_requests,
                    expected_digest=body.expected_digest,
                )
            except WeightSyncError as error:
                return _json({"success": False, "message": str(error), "num_paused_requests": 0}, 400)
        message = "Succeeded to update model weights."
        return _json({"success": True, "message": message, "num_paused_requests": carried_on})

    @route("/update_weight_version", "POST")
    async def _update_weight_version(request: Request) -> Response:
        body = await _decode(request, WeightVersionBody)
        await engine.set_weight_version(body.new_version, abort_all=body.abort_all_requests)
        message = f"Weight version updated to {body.new_version}"
        return _json({"success": True, "message": message, "new_version": body.new_version})

    @route("/weights_checker", "POST")
    async def _weights_checker(request: Request) -> Response:
        body = await _decode(request, CheckerBody)
        if body.action != "checksum":
            message = f"action={body.action!r} is not supported by the embedded engine; it knows 'checksum'."
            return _json({"success": False, "message": message}, 400)
        checksums = await engine.checksums()
        lines = "\n".join(f"{name} {value}" for name, value in sorted(checksums.items()))
        total = hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()
        ranks = [{"checksums": checksums, "per_gpu_checksum": total}]
        return _json({"success": True, "message": "Success.", "ranks": ranks, "per_engine_checksum": total})

    @route("/metrics", "GET")
    async def _metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _is_below(path: str, roots: Sequence[Path]) -> bool:
    try:
        target = Path(path).resolve()
    except (OSError, ValueError, RuntimeError):  # a null byte, a circle of links
        return False
    return not roots or any(target.is_relative_to(root.resolve()) for root in roots)


def _is_authorized(request: Request, api_key: str) -> bool:
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode())


async def _decode(request: Request, kind: type[_Body]) -> _Body:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY_BYTES:
            raise _Refused(413, {"error": {"message": f"the request body is larger than {MAX_BODY_BYTES} bytes"}})
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _Refused(400, {"error": str(error)}) from None
    except msgspec.DecodeError as error:
        body = {"object": "error", "message": str(error), "type": "BadRequestError", "param": None, "code": 400}
        raise _Refused(400, body) from None


def _invalid(message: str) -> _Refused:
    return _Refused(400, {"error": {"message": message}})


def _refuse_unsupported(body: GenerateBody) -> None:
    for name in ("text", "input_embeds", "lora_path", "session_params"):
        if getattr(body, name) is not None:
            raise _invalid(f"{name} is not supported by the embedded engine: send input_ids, or serve with SGLang.")
    if body.top_logprobs_num or body.token_ids_logprob:
        raise _invalid("top_logprobs_num and token_ids_logprob are not supported by the embedded engine.")
    for name, neutral in _NEUTRAL.items():
        value = getattr(body.sampling_params, name, None)
        if value is not None and value not in neutral:
            raise _invalid(
                f"sampling parameter {name}={value!r} is not supported by the embedded engine. Drop it, or use SGLang."
            )


def _check_prompt(prompt: list[int], vocab_size: int) -> None:
    if not prompt:
        raise _invalid("input_ids must hold at least one token id.")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next((i, token) for i, token in enumerate(prompt) if not 0 <= token < vocab_size)
        raise _invalid(f"input_ids[{wrong[0]}]={wrong[1]} is outside the vocabulary of {vocab_size} tokens.")


def _sampling(params: SamplingBody) -> Sampling:
    sampling = Sampling(
        temperature=1.0 if params.temperature is None else params.temperature,
        top_p=1.0 if params.top_p is None else params.top_p,
        top_k=-1 if params.top_k is None else params.top_k,
        min_p=0.0 if params.min_p is None else params.min_p,
    )
    if not 0.0 <= sampling.temperature < float("inf"):
        raise _invalid(f"temperature must be non-negative, got {sampling.temperature}.")
    if not 0.0 < sampling.top_p <= 1.0:
        raise _invalid(f"top_p must be in (0, 1], got {sampling.top_p}.")
    if sampling.top_k != -1 and sampling.top_k < 1:
        raise _invalid(f"top_k must be -1 (disable), or at least 1, got {sampling.top_k}.")
    if not 0.0 <= sampling.min_p <= 1.0:
        raise _invalid(f"min_p must be in [0, 1], got {sampling.min_p}.")
    return sampling


async def _changed(job: Job) -> bool:
    """Wait a little; True when the job has ended."""
    if job.finish is None:
        try:
            async with asyncio.timeout(DISCONNECT_POLL_S):
                await job.changed.wait()
        except TimeoutError:
            return job.finish is not None
    return job.finish is not None


async def _stream(
    engine: Engine, job: Job, body: GenerateBody, request: Request, *, is_incremental: bool
) -> AsyncGenerator[bytes, None]:
    sent = 0
    looked = time.monotonic()
    try:
        while True:
            is_final = await _changed(job)
            job.changed.clear()
            is_final = is_final or job.finish is not None
            num_tokens = len(job.logprobs)
            if is_final or num_tokens > sent:
                start = sent if is_incremental else 0
                yield b"data: " + orjson.dumps(_result(job, body, start, is_final=is_final)) + b"\n\n"
                sent = num_tokens
            if is_final:
                yield b"data: [DONE]\n\n"
                return
            if time.monotonic() - looked > DISCONNECT_POLL_S:
                looked = time.monotonic()
                if await request.is_disconnected():
                    return
    finally:
        if job.finish is None:
            engine.abort(job.rid)


def _result(job: Job, body: GenerateBody, start: int, *, is_final: bool) -> dict[str, Any]:
    """SGLang's response from output token ``start`` on."""
    end = len(job.logprobs)
    ids, logprobs = job.ids[start:end], job.logprobs[start:end]
    meta: dict[str, Any] = {
        "id": job.rid,
        "finish_reason": job.finish if is_final else None,
        "prompt_tokens": len(job.prompt),
        "weight_version": job.version,
        "num_retractions": job.num_retractions,
        "completion_tokens": end,
        "cached_tokens": job.cached_tokens,
    }
    if body.return_logprob:
        meta["input_token_logprobs"] = _prompt_entries(job)
        meta["output_token_logprobs"] = [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)]
        meta["output_token_logprobs_length"] = end
    if is_final:
        meta["weight_versions"] = job.weight_versions()
        meta["e2e_latency"] = time.perf_counter() - job.created
    result: dict[str, Any] = {"output_ids": ids, "meta_info": meta}
    if body.return_prompt_token_ids:
        result["prompt_token_ids"] = job.prompt
    return result


def _prompt_entries(job: Job) -> list[list[Any]]:
    if job.prompt_logprobs is None:
        return []
    return [[logprob, token, None] for logprob, token in zip(job.prompt_logprobs, job.prompt[job.score_from :], strict=True)]


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


class _EngineMetrics(Collector):
    """SGLang's metric names, read from the engine when scraped."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> list[Metric]:
        load = self._engine.load()
        gauges = {
            "num_running_reqs": (load.num_running, "Requests that generate."),
            "num_queue_reqs": (load.num_waiting, "Requests that wait for room."),
            "num_paused_reqs": (load.num_paused, "Requests that a pause holds."),
            "num_used_tokens": (load.used_tokens, "Tokens of cache in use."),
            "token_usage": (load.used_tokens / load.capacity_tokens, "Share of the cache in use."),
            "cache_hit_rate": (load.cached_prompt_tokens / max(1, load.prompt_tokens), "Share of prompts found in the cache."),
            "gen_throughput": (load.generation_throughput, "Output tokens per second."),
        }
        counters = {
            "prompt_tokens": (load.prompt_tokens, "Prompt tokens taken."),
            "generation_tokens": (load.generated_tokens, "Tokens generated."),
            "cached_tokens": (load.cached_prompt_tokens, "Prompt tokens found in the cache."),
            "num_retractions": (load.num_retracted, "Times a request was put back into the queue."),
        }
        families: list[Metric] = [
            GaugeMetricFamily(f"sglang:{name}", text, value=value) for name, (value, text) in gauges.items()
        ]
        families += [CounterMetricFamily(f"sglang:{name}", text, value=value) for name, (value, text) in counters.items()]
        return families
