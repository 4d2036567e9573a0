"""One server, spoken to in SGLang's native HTTP API: token ids in; token ids, logprobs and policy labels out.

Owns the wire format and the classification of what goes wrong. It decides nothing: which server, whether to retry and
how long to wait belong to ``server_manager`` and ``weight_reconciler``. Every call ends when its caller's deadline
says so; ``generate`` has none of its own, control calls take ``timeout_s``.

How precise the labels are. The finished chunk carries ``weight_versions`` spans, which are exact for the embedded
engine. SGLang with the overlap scheduler reports a span one token early after an in-place update (the first token of
the new span was sampled by the old weights); ``describe`` detects that scheduler and spans are shifted by one, unless
the request was retracted (then they are exact). When a stream breaks before its finished chunk, a token has the label
of the chunk it arrived in: at a version boundary up to one chunk of tokens may be labelled one version too new.
"""

import asyncio
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import aiohttp
import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray
from yarl import URL

from agentrl.errors import GenerationError, ServerUnreachable, WeightSyncError
from agentrl.serving.engine_http import EngineConnections, Head
from agentrl.types import FinishReason, SamplingParams, version_of_label
from agentrl.weights.buckets import Bucket

PauseMode: TypeAlias = Literal["in_place", "retract", "abort"]

_REFUSED_FOR_GOOD = frozenset({400, 413, 422})
_BUSY = frozenset({429, 503})
_ERROR_TEXT_LIMIT = 400


class EngineRejected(GenerationError):
    """The request itself is wrong (HTTP 400, 413, 422 or an id outside the vocabulary): no server would take it."""


class EngineBusy(GenerationError):
    """The server has no room now (HTTP 429 or 503): another one may."""


class EngineUnavailable(GenerationError):
    """The server died, answered 5xx, refused our key, or broke the protocol: go elsewhere."""


@dataclass(slots=True)
class PartialGeneration:
    """What arrived so far of one request; it survives the exception that ended the stream."""

    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    labels: list[str] = field(default_factory=list[str])
    """Per token, the server's ``weight_version``."""
    finish: FinishReason | None = None
    """None until the server said that it finished."""
    finish_message: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    last_arrival: float = -math.inf
    """Event-loop time of the newest token."""
    on_arrival: Callable[[], None] | None = None
    """Called when tokens were added."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def versions(self) -> list[int]:
        """Per token, the policy version; -1 where the label is not one of ours."""
        return _versions(self.labels)

    def versions_of(self, start: int, end: int) -> list[int]:
        """The same for the tokens ``[start, end)``."""
        return _versions(self.labels[start:end])

    def distinct_labels(self) -> set[str]:
        """The labels there are: nearly always one, which is seen without hashing each entry."""
        return _distinct(self.labels)

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        del self.ids[length:], self.logprobs[length:], self.labels[length:]

    def extend(self, other: "PartialGeneration") -> None:
        """Append another request's tokens, which are not to be changed any more; the last piece decides how the whole finished."""
        if self.ids:
            self.ids += other.ids
            self.logprobs += other.logprobs
            self.labels += other.labels
        else:  # nearly always: one server gave it all
            self.ids, self.logprobs, self.labels = other.ids, other.logprobs, other.labels
        self.finish, self.finish_message = other.finish, other.finish_message


class _TokenLogprob(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One entry of ``output_token_logprobs``: there is one per token, and this takes half the room of a list."""

    logprob: float
    token: int
    text: Any


class _Meta(msgspec.Struct):
    """What is read of a chunk's ``meta_info``."""

    output_token_logprobs: list[_TokenLogprob] | None = None
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    num_retractions: int | None = None
    weight_version: Any = ""
    weight_versions: list[dict[str, Any]] | None = None
    finish_reason: dict[str, Any] | None = None


class _Chunk(msgspec.Struct):
    """One chunk of a generation, or a whole one that was not streamed."""

    meta_info: _Meta | None = None
    output_ids: list[int] | None = None
    error: Any = msgspec.UNSET


_CHUNKS = msgspec.json.Decoder(_Chunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What ``/model_info`` says of a server."""

    model_path: str
    label: str
    """``weight_version`` as the server reports it now."""
    digest: str | None
    """``sha256:<hex>`` of the loaded weight files, where the server reports one."""
    is_embedded: bool
    """It reports a digest of its weight files, which only our embedded engine does."""
    vocab_size: int | None


class ParallelLayout(NamedTuple):
    """Processes that one server splits its model over."""

    tensor: int
    pipeline: int
    data: int


class SGLangClient:
    """Calls to one server: generations over connections of its own (``close`` them), control calls over a shared session.

    Args:
        url: ``http://host:port``, without a path.
        api_key: for ``/generate`` and other data endpoints.
        admin_key: for control endpoints; SGLang takes only this one there when it has one. Defaults to ``api_key``.
        session: for control calls; owned by the caller.
        vocab_size: ids outside ``[0, vocab_size)`` are refused here, since SGLang would crash on them. Unknown sizes
            are filled in by ``describe`` where the server tells.
        stream_interval: tokens per streamed chunk to ask for; None leaves it to the server. A crash loses at most
            one chunk.
        connect_timeout_s: limit for opening a connection.
        stall_timeout_s: longest silence within a generation; None leaves it to the caller.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        session: aiohttp.ClientSession,
        vocab_size: int | None = None,
        stream_interval: int | None = None,
        connect_timeout_s: float = 10.0,
        stall_timeout_s: float | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.vocab_size = vocab_size
        self.span_shift = 0
        self.is_embedded = False
        self._session = session
        self._stream_interval = stream_interval
        self._control_timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._headers = {"Content-Type": "application/json"} | _bearer(api_key)
        self._admin_headers = {"Content-Type": "application/json"} | _bearer(admin_key or api_key)
        self._connections = EngineConnections(
            URL(f"{self.url}/generate"),
            headers=self._headers,
            connect_timeout_s=connect_timeout_s,
            stall_timeout_s=stall_timeout_s,
        )

    def close(self) -> None:
        """Close the connections that generations used; those in use are closed at their end."""
        self._connections.close()

    # ---- the hot path

    async def generate(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        *,
        rid: str,
        into: PartialGeneration | None = None,
        cache_namespace: str | None = None,
        adapter: str | None = None,
    ) -> PartialGeneration:
        """Stream one generation; cancelling it closes the connection, at which the server aborts the request.

        Args:
            ids: the whole context.
            sampling: how to sample; top-p and top-k are sent only where they restrict anything.
            rid: request id, of fixed length: SGLang aborts by prefix.
            into: receives tokens as they arrive, so that they outlive an exception.
            cache_namespace: requests of different namespaces share no prefix cache.
            adapter: name of a loaded LoRA adapter. One request uses one adapter to its end, so its name is every token's label.

        Raises:
            EngineRejected: no server would take this request.
            EngineBusy: this server has no room.
            EngineUnavailable: this server failed; ``into`` holds what arrived.
        """
        partial = PartialGeneration() if into is None else into
        body = orjson.dumps(
            self._generate_body(self._checked_ids(ids), sampling, rid, cache_namespace, adapter),
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
        whole: list[bytes] = []

        def read(head: Head) -> Callable[[bytes], None]:
            if head.status == 200 and head.content_type != "application/json":
                return _Events(lambda payload: self._take(payload, partial, adapter)).feed
            return whole.append

        try:
            head = await self._connections.post(body, read)
            if head.status != 200:
                raise _refusal(self.url, head.status, b"".join(whole).decode("utf-8", "replace"), adapter)
            if whole:
                self._take(b"".join(whole), partial, adapter)
        except OSError as error:  # a TimeoutError is one
            raise EngineUnavailable(
                f"{self.url} broke off after {len(partial)} tokens of request {rid}: {error!r}. Look at that engine's log."
            ) from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EngineUnavailable(
                f"{self.url} sent a chunk that is not SGLang's ({error!r}) after {len(partial)} tokens of request {rid}. "
                "Check that the url is an SGLang or embedded engine."
            ) from error
        if partial.finish is None:
            raise EngineUnavailable(
                f"{self.url} ended the stream of request {rid} after {len(partial)} tokens without a finish reason."
            )
        return partial

    def _checked_ids(self, ids: Sequence[int]) -> NDArray[np.uint32]:
        """The ids as the request carries them. The whole context passes here at every turn, hence no loop in Python.

        Raises:
            EngineRejected: there is none, one is no token id, or one lies outside the vocabulary.
        """
        if len(ids) == 0:
            raise EngineRejected("an empty prompt was about to be sent. Every generation needs at least one token.")
        try:
            # Always a copy: while its memory is lent out, the caller's array cannot grow.
            checked = np.array(array("I", ids), np.uint32)
        except (TypeError, OverflowError) as error:
            raise EngineRejected(
                f"one of {len(ids)} values is no token id: {error}. The tokenizer or the loop is broken."
            ) from error
        if self.vocab_size is not None and (highest := int(np.maximum.reduce(checked))) >= self.vocab_size:
            raise EngineRejected(
                f"token id {highest} does not fit a vocabulary of {self.vocab_size}: an unchecked id kills SGLang. "
                "The tokenizer and the served model differ."
            )
        return checked

    def _generate_body(
        self, ids: NDArray[np.uint32], sampling: SamplingParams, rid: str, cache_namespace: str | None, adapter: str | None
    ) -> dict[str, Any]:
        params: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "skip_special_tokens": False,
        }
        if sampling.top_p < 1.0:
            params["top_p"] = sampling.top_p
        if sampling.top_k > 0:
            params["top_k"] = sampling.top_k
        if sampling.stop_token_ids:
            params["stop_token_ids"] = list(sampling.stop_token_ids)
        if self._stream_interval is not None:
            params["stream_interval"] = self._stream_interval
        body: dict[str, Any] = {
            "rid": rid,
            "input_ids": ids,
            "sampling_params": params,
            "stream": True,
            "return_logprob": True,
            "logprob_start_len": -1,
        }
        if cache_namespace is not None:
            body["extra_key"] = cache_namespace
        if adapter is not None:
            body["lora_path"] = adapter
        return body

    def _take(self, payload: bytes, partial: PartialGeneration, adapter: str | None) -> None:
        """Add one chunk, cumulative or incremental, to what arrived."""
        chunk = _CHUNKS.decode(payload)
        if chunk.error is not msgspec.UNSET:
            raise _stream_error(self.url, chunk.error)
        meta, ids, have = chunk.meta_info, chunk.output_ids or [], len(partial)
        if meta is None:
            raise ValueError("it has no meta_info")
        entries = meta.output_token_logprobs or []
        fresh = _fresh_count(ids, meta.completion_tokens, partial.ids)
        if fresh > 0:
            new_ids, new_entries = (ids, entries) if fresh == len(ids) == len(entries) else (ids[-fresh:], entries[-fresh:])
            if len(new_ids) != fresh or [entry.token for entry in new_entries] != new_ids:
                raise EngineUnavailable(
                    f"{self.url} sent {len(new_ids)} ids and {len(new_entries)} logprobs for {fresh} new tokens, or they name "
                    "other tokens; they must pair up. Start the engine without flags that drop logprobs."
                )
            logprobs = [entry.logprob for entry in new_entries]
            # The sum is the quick test: it is not finite if one of them is not.
            if not math.isfinite(sum(logprobs)) and not all(map(math.isfinite, logprobs)):
                raise EngineUnavailable(
                    f"{self.url} sent a logprob that is not finite among tokens {have}..{have + fresh}: its weights are likely "
                    "broken. Check the last published checkpoint for nan."
                )
            partial.ids += new_ids
            partial.logprobs += logprobs
            partial.labels += [str(meta.weight_version) if adapter is None else adapter] * fresh
            partial.last_arrival = asyncio.get_running_loop().time()
        partial.prompt_tokens = meta.prompt_tokens or partial.prompt_tokens
        partial.cached_tokens = meta.cached_tokens or partial.cached_tokens
        if meta.finish_reason is not None:
            self._finish(meta.finish_reason, meta, partial, adapter)
        if fresh > 0 and partial.on_arrival is not None:
            partial.on_arrival()

    def _finish(self, finish: Mapping[str, Any], meta: "_Meta", partial: PartialGeneration, adapter: str | None) -> None:
        kind = finish["type"]
        message = str(finish.get("message") or "")
        status = finish.get("status_code")
        if kind == "abort" and status:
            raise _refusal(self.url, int(status), message)
        if kind not in ("stop", "length", "abort"):
            raise EngineUnavailable(f"{self.url} finished with the unknown reason {kind!r}; it speaks another protocol.")
        if adapter is None:
            shift = 0 if meta.num_retractions else self.span_shift
            _relabel(partial.labels, meta.weight_versions or (), shift)
        partial.finish, partial.finish_message = kind, message

    # ---- control calls

    async def describe(self, *, timeout_s: float) -> ModelInfo:
        """Read ``/model_info`` and learn what kind of server this is (vocabulary, embedded or not, overlap scheduler)."""
        info = await self.model_info(timeout_s=timeout_s)
        self.is_embedded = info.is_embedded
        self.vocab_size = self.vocab_size or info.vocab_size
        if not info.is_embedded:
            status, text = await self._call("GET", "/server_info", timeout_s=timeout_s)
            settings: dict[str, Any] = _json_object(self.url, text) if status == 200 else {}
            self.span_shift = 1 if settings.get("disable_overlap_schedule") is False else 0
        return info

    async def model_info(self, *, timeout_s: float) -> ModelInfo:
        """What the server serves now. Live also while it is paused."""
        info = await self._control("GET", "/model_info", timeout_s=timeout_s)
        digest = info.get("weights_digest")
        return ModelInfo(
            model_path=str(info.get("model_path", "")),
            label=str(info.get("weight_version", "")),
            digest=str(digest) if digest else None,
            is_embedded="weights_digest" in info,
            vocab_size=_whole_number(self.url, info, "vocab_size"),
        )

    async def pause(self, mode: PauseMode, *, timeout_s: float) -> None:
        """Stop sampling. ``abort`` ends what runs with its partial output; the other modes hold it."""
        await self._control("POST", "/pause_generation", {"mode": mode}, timeout_s=timeout_s)

    async def continue_generation(self, *, timeout_s: float) -> None:
        """Sample again; harmless on a server that is not paused."""
        await self._control("POST", "/continue_generation", {}, timeout_s=timeout_s)

    async def update_weights_from_disk(
        self, path: str, *, label: str, flush_cache: bool, expected_digest: str | None = None, timeout_s: float
    ) -> None:
        """Load the Hugging Face directory ``path`` and report ``label`` from then on.

        Args:
            path: as the server sees it; complete before the call, since SGLang dies on a checkpoint that does not fit.
            label: the new ``weight_version``.
            flush_cache: drop the prefix cache; must be False while requests are held in place.
            expected_digest: sent only to embedded engines, which refuse files that differ.
            timeout_s: limit of the call.

        Raises:
            WeightSyncError: the server refused or could not be reached.
        """
        body: dict[str, Any] = {"model_path": path, "weight_version": label, "flush_cache": flush_cache}
        if expected_digest is not None and self.is_embedded:
            body["expected_digest"] = expected_digest
        answer = await self._control("POST", "/update_weights_from_disk", body, timeout_s=timeout_s)
        if not answer.get("success", False):
            raise WeightSyncError(f"{self.url} did not load {path}: {answer.get('message')}")

    async def parallel_layout(self, *, timeout_s: float) -> ParallelLayout:
        """How the server splits the model over its own processes; all 1 where it does not say."""
        info = await self._control("GET", "/server_info", timeout_s=timeout_s)
        return ParallelLayout(*(_whole_number(self.url, info, name) or 1 for name in ("tp_size", "pp_size", "dp_size")))

    async def join_weights_group(
        self, group: str, *, address: str, port: int, world_size: int, backend: str, timeout_s: float
    ) -> None:
        """Join a process group as ranks 1 and up, whose rank 0 answers on ``address:port``. Ends when all have joined.

        Raises:
            WeightSyncError: the server refused, failed to join, or could not be reached.
        """
        body = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": world_size}
        await self._change("/init_weights_update_group", body | {"group_name": group, "backend": backend}, timeout_s)

    async def leave_weights_group(self, group: str, *, timeout_s: float) -> None:
        """Forget a process group."""
        await self._change("/destroy_weights_update_group", {"group_name": group}, timeout_s)

    async def begin_weight_update(self, *, timeout_s: float) -> None:
        """Open the session that tensors are received in. One that an earlier process left open is closed first."""
        try:
            await self._change("/begin_weight_update", {}, timeout_s)
        except WeightSyncError:
            await self.end_weight_update(timeout_s=timeout_s)
            await self._change("/begin_weight_update", {}, timeout_s)

    async def end_weight_update(self, *, timeout_s: float) -> None:
        """Close the session; refused when there is none."""
        await self._change("/end_weight_update", {}, timeout_s)

    async def receive_weights(
        self, bucket: Bucket, *, group: str, label: str | None, flush_cache: bool, timeout_s: float
    ) -> None:
        """Receive one broadcast of the bucket's bytes from rank 0 and load its tensors.

        Args:
            bucket: what is sent.
            group: a group that was joined.
            label: the new ``weight_version``, with the last bucket; None leaves it.
            flush_cache: drop the prefix cache; must be False while requests are held in place.
            timeout_s: limit of the call.

        Raises:
            WeightSyncError: the server refused, the broadcast broke off, or a tensor does not fit: its weights are then a mixture.
        """
        body = {"names": bucket.names, "dtypes": bucket.dtypes, "shapes": bucket.shapes, "group_name": group}
        body |= {"flush_cache": flush_cache, "weight_version": label, "load_format": "flattened_bucket"}
        await self._change("/update_weights_from_distributed", body, timeout_s)

    async def _change(self, path: str, body: Mapping[str, Any], timeout_s: float) -> None:
        answer = await self._control("POST", path, body, timeout_s=timeout_s)
        if not answer.get("success", False):
            raise WeightSyncError(f"{self.url}{path} did not succeed: {answer.get('message')}")

    async def load_lora_adapter(self, name: str, path: str, *, timeout_s: float) -> None:
        """Load the peft directory ``path`` beside what is served; a name that is loaded already is left as it is.

        Raises:
            WeightSyncError: the server refused, was started without ``--enable-lora``, or could not be reached.
        """
        status, text = await self._call("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": path}, timeout_s=timeout_s)
        answer = _json_object(self.url, text) if text.strip().startswith("{") else {}
        if not answer.get("success", False) and name not in (answer.get("loaded_adapters") or ()):
            raise WeightSyncError(
                f"{self.url} did not load the adapter {name} from {path} (status {status}): {text[:_ERROR_TEXT_LIMIT]}. "
                "SGLang needs --enable-lora, --max-lora-rank and --lora-target-modules that fit."
            )

    async def unload_lora_adapter(self, name: str, *, timeout_s: float) -> None:
        """Forget an adapter; the server waits for the requests that use it."""
        await self._control("POST", "/unload_lora_adapter", {"lora_name": name}, timeout_s=timeout_s)

    async def update_weight_version(self, label: str, *, timeout_s: float) -> None:
        """Report ``label`` from now on; requests go on."""
        body = {"new_version": label, "abort_all_requests": False}
        await self._control("POST", "/update_weight_version", body, timeout_s=timeout_s)

    async def is_ready(self, *, timeout_s: float) -> bool:
        """``/ready``: up and not paused. False when it cannot be reached."""
        return await self._probe("/ready", timeout_s)

    async def is_healthy(self, *, timeout_s: float) -> bool:
        """``/health``: samples one token for real. Never during a pause: it hangs and marks the server unhealthy."""
        return await self._probe("/health", timeout_s)

    async def loads(self, *, timeout_s: float) -> dict[str, Any]:
        """``/v1/loads``: running and waiting requests, used tokens; a cheap snapshot."""
        return await self._control("GET", "/v1/loads", timeout_s=timeout_s)

    async def abort(self, rid: str, *, timeout_s: float) -> None:
        """Abort one live request. Lost when a pause holds the request: close its connection instead."""
        await self._control("POST", "/abort_request", {"rid": rid}, timeout_s=timeout_s)

    async def flush_cache(self, *, timeout_s: float) -> None:
        """Drop the prefix cache; refused while requests run."""
        await self._control("POST", "/flush_cache", {}, timeout_s=timeout_s)

    async def weights_checksum(self, *, timeout_s: float) -> str | None:
        """The engine's own checksum of its loaded tensors, comparable between servers of one kind; None if it has none."""
        answer = await self._control("POST", "/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
        checksum = answer.get("per_engine_checksum")
        return None if checksum is None else str(checksum)

    async def _control(
        self, method: Literal["GET", "POST"], path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> dict[str, Any]:
        status, text = await self._call(method, path, body, timeout_s=timeout_s)
        if status == 404:
            raise WeightSyncError(
                f"{self.url}{path} answered 404: it is not an SGLang server, or it is an SGLang router, which forwards no control "
                "calls. The servers behind a router are used with serve.router_url"
            )
        if status != 200:
            raise WeightSyncError(f"{self.url}{path} answered {status}: {text[:_ERROR_TEXT_LIMIT]}")
        return _json_object(self.url, text) if text.strip().startswith("{") else {}

    async def _probe(self, path: str, timeout_s: float) -> bool:
        try:
            status, _ = await self._call("GET", path, timeout_s=timeout_s)
        except WeightSyncError:
            return False
        return status == 200

    async def _call(
        self, method: Literal["GET", "POST"], path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> tuple[int, str]:
        data = None if body is None else orjson.dumps(body)
        # Generation requests authenticate with the data key; /model_info, /server_info and /v1/loads do too.
        headers = self._headers if method == "GET" else self._admin_headers
        # A connection each: one that idles is closed by the server after seconds (uvicorn: 5), and a POST sent at that moment fails.
        headers = {**headers, "Connection": "close"}
        scope = asyncio.timeout(timeout_s)
        try:
            async with (
                scope,
                self._session.request(
                    method, f"{self.url}{path}", data=data, headers=headers, timeout=self._control_timeout
                ) as response,
            ):
                # Not `text`: an answer in another coding would raise what is no error of HTTP.
                return response.status, (await response.read()).decode("utf-8", "replace")
        except aiohttp.ClientConnectorError as error:
            raise ServerUnreachable(f"{self.url}{path} failed: {error!r}. Is that engine running?") from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            what = f"no answer within {timeout_s:g} s" if scope.expired() else repr(error)
            raise WeightSyncError(f"{self.url}{path} failed: {what}. Look at that engine's log.") from error


def _versions(labels: Sequence[str]) -> list[int]:
    known = {label: version_of_label(label) for label in _distinct(labels)}
    if len(known) == 1:
        return list(known.values()) * len(labels)
    return [known[label] for label in labels]


def _distinct(labels: Sequence[str]) -> set[str]:
    is_one = bool(labels) and labels.count(labels[0]) == len(labels)
    return {labels[0]} if is_one else set(labels)


def expand_spans(spans: Sequence[Mapping[str, Any]], num_tokens: int, *, shift: int) -> list[str | None]:
    """Per-token labels of ``weight_versions`` spans (``end`` exclusive), boundaries moved ``shift`` tokens later.

    None where no span covers the token.
    """
    labels: list[str | None] = [None] * num_tokens
    for start, end, label in _spans(spans, num_tokens, shift):
        labels[start:end] = [label] * (end - start)
    return labels


def _spans(spans: Sequence[Mapping[str, Any]], num_tokens: int, shift: int) -> Iterator[tuple[int, int, str]]:
    """(start, end, label) of each span within ``[0, num_tokens)``, in order, where it is not empty."""
    for index, span in enumerate(sorted(spans, key=lambda span: int(span["start"]))):
        start = max(0, int(span["start"]) + (shift if index else 0))
        end = min(int(span["end"]) + shift, num_tokens)
        if start < end:
            yield start, end, str(span["version"])


def _relabel(labels: list[str], spans: Sequence[Mapping[str, Any]], shift: int) -> None:
    for start, end, label in _spans(spans, len(labels), shift):
        labels[start:end] = [label] * (end - start)


def _fresh_count(ids: list[int], total: int | None, known: list[int]) -> int:
    """How many of the chunk's last ids are new. Both kinds of stream report totals, so the difference decides."""
    if total is None:
        is_cumulative = len(ids) > len(known) and ids[: len(known)] == known
        return len(ids) - len(known) if is_cumulative or not known else len(ids)
    return total - len(known)


class _Events:
    """The payloads of a server-sent event stream, as its bytes arrive."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._rest = b""

    def feed(self, block: bytes) -> None:
        text, start = self._rest + block, 0
        # Not `split`, which looks at each byte in turn: a line may hold hundreds of tokens.
        while (end := text.find(b"\n", start)) >= 0:
            if text.startswith(b"data:", start):
                payload = text[start + 5 : end].strip()
                if payload != b"[DONE]":
                    self._take(payload)
            start = end + 1
        self._rest = text[start:]


def _bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _json_object(url: str, text: str) -> dict[str, Any]:
    try:
        value: object = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise WeightSyncError(f"{url} answered text that is not JSON: {text[:_ERROR_TEXT_LIMIT]!r}") from error
    if not isinstance(value, dict):
        raise WeightSyncError(f"{url} answered JSON that is not an object: {text[:_ERROR_TEXT_LIMIT]!r}")
    return cast("dict[str, Any]", value)


def _whole_number(url: str, answer: Mapping[str, Any], name: str) -> int | None:
    """None where it is missing or 0."""
    try:
        return int(answer.get(name) or 0) or None
    except (TypeError, ValueError) as error:
        raise WeightSyncError(f"{url} says {name}={answer[name]!r}, which is no number: is it an SGLang server?") from error


def _refusal(url: str, status: int, text: str, adapter: str | None = None) -> GenerationError:
    message = f"{url} answered {status}: {text[:_ERROR_TEXT_LIMIT]}"
    if adapter is not None and adapter in text:  # it does not have the adapter (any more): another server may
        return EngineUnavailable(message)
    if status in _REFUSED_FOR_GOOD:
        return EngineRejected(f"{message}. The request itself is wrong; compare the run's limits with the engine's.")
    return EngineBusy(message) if status in _BUSY else EngineUnavailable(message)


def _stream_error(url: str, error: object) -> GenerationError:
    if not isinstance(error, dict):
        return EngineUnavailable(f"{url} reported in its stream: {error}")
    fields = cast("dict[str, Any]", error)
    status = fields.get("code")
    return _refusal(url, status if isinstance(status, int) else 500, str(fields.get("message")))
