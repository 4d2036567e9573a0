"""``AsyncLLMServerManager``: the one object rollouts ask for tokens.

It chooses a server per request (``routing``), keeps what a dying server had already sent and continues elsewhere, and
admits only servers whose last *verified* policy label is the required one.

What it waits for, and who unblocks it: when no server may take a request, the caller is parked (``wait_reason()`` says
``weights`` or ``server``) until the reconciler verifies a server, the health loop or a breaker's timer readmits one, a
server is added, or the caller's deadline passes.

Which labels a response may carry (I5). A request legally carries the labels that were verified on its server between
the request's start and its end, plus the one being installed there at its end: an in-place update moves requests from
v to v+1 in mid-flight. Any other label (an engine that restarted with its base weights reports ``base`` or
``default``) ends the generation at the first such token: the tokens from there on are discarded and counted, the
server is quarantined, and the rest is generated elsewhere. Servers that nobody ever verified are not checked, which
only happens when no version is required (evaluating a fixed model).
"""

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Collection, Sequence
from collections.abc import Generator as Yields
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from uuid import uuid4

import aiohttp

from agentrl.errors import DeadlineExceeded, GenerationError
from agentrl.protocols import Generator, TokenListener
from agentrl.serving.load_policy import ConcurrencyPolicy
from agentrl.serving.retry_budget import RetryBudget
from agentrl.serving.routing import Candidate, Homes, Overload, choose_server
from agentrl.serving.server_fleet import COUNTERS, ServerFleet, WaitReason
from agentrl.serving.server_health import ServerHealth
from agentrl.serving.server_state import CircuitBreaker, DrainedBy, Server, ServerStats, ServerView, Visit
from agentrl.serving.sglang_client import EngineBusy, EngineRejected, EngineUnavailable, PartialGeneration, SGLangClient
from agentrl.serving.token_relay import TokenRelay
from agentrl.serving.waiting_room import Place, Priority, WaitingRoom
from agentrl.supervise import waiting
from agentrl.types import Generation, SamplingParams

log = logging.getLogger(__name__)

NO_POLICY = "(no policy announced yet)"
"""A label that no server reports: requiring it parks every request until a policy is announced."""

_RETRY_BACKOFF_S = 0.05
_RETRY_BACKOFF_MAX_S = 2.0
_EXPECTED_NEW_TOKENS = 256.0
_EXPECTED_NEW_TOKENS_DECAY = 0.02
_LOOK_AGAIN_S = 1.0
"""A parked request looks again after this long even when nobody woke it: breakers recover by time alone."""


@dataclass(slots=True)
class _Call:
    """One ``generate`` call of a rollout, over all the servers it visits."""

    ids: Sequence[int]
    sampling: SamplingParams
    trajectory_id: str
    group_id: str
    priority: Priority = Priority.TRAINING
    relay: TokenRelay | None = None
    so_far: PartialGeneration = field(default_factory=PartialGeneration)
    waits_for: str = "server"
    failures: int = 0
    refusals: int = 0
    """Answers that a server had no room."""
    avoid: set[str] = field(default_factory=set[str])
    heard_at: float = 0.0
    """Event-loop time of the newest token of earlier visits, or of the call."""
    piece: PartialGeneration | None = None
    """What the newest visit gave."""

    def hear(self, piece: PartialGeneration) -> None:
        """Another visit begins."""
        self.heard_at, self.piece = self.last_heard_at, piece

    @property
    def last_heard_at(self) -> float:
        """Event-loop time of the newest token, or of the call."""
        return self.heard_at if self.piece is None else max(self.heard_at, self.piece.last_arrival)

    @property
    def tokens_left(self) -> int:
        return self.sampling.max_new_tokens - len(self.so_far)

    @property
    def context(self) -> Sequence[int]:
        return [*self.ids, *self.so_far.ids] if self.so_far.ids else self.ids

    @property
    def is_complete(self) -> bool:
        """Nothing is left to sample, although no server said so."""
        return self.tokens_left <= 0 or self.ends_with_stop

    @property
    def ends_with_stop(self) -> bool:
        return bool(self.so_far.ids) and self.so_far.ids[-1] in self.sampling.stop_token_ids


class AsyncLLMServerManager(Generator):
    """Balance generation over servers that come, go, die and change weights.

    Use it as an async context manager, and keep ``run()`` (the health loop) going beside the rollouts. All methods
    belong to one event loop. Only ``generate``, ``run``, ``wait_drained`` and ``aclose`` wait.

    Args:
        session: shared HTTP session for control calls; None opens one that ``aclose`` closes.
        seed: of the random tie-breaks.
        max_attempts: failed attempts per ``generate`` before ``GenerationError``; resumed aborts are not failures, and neither is
            a server without room (HTTP 429 or 503): that is waited for.
        breaker_failures: consecutive failures that open a server's circuit breaker.
        breaker_reset_s: seconds until a half-open probe; doubled after each failed one up to ``breaker_max_reset_s``.
        max_requests_per_server: requests in flight per unit of capacity; None leaves queueing to the engine.
        concurrency: set each server's limit from its own load reports (``load_policy``); None sets none.
        retry_budget: bounds repeated failures over all requests together.
        overload: when a request leaves the server that has its prefix.
        vocab_size: ids outside are refused before they reach a server.
        probe_every_s: period of the health probes (``/model_info``: instant and live during a pause).
        probe_timeout_s: limit of one probe.
        unhealthy_after: consecutive failed probes after which a server takes nothing and its requests move on.
        lost_after_s: silence after which a request on a server that reports to be idle is generated elsewhere.
        stall_timeout_s: longest silence of a stream before the request moves on; None leaves it to the caller's
            deadline. It must exceed the longest queueing time and weight update.
        connect_timeout_s: limit for opening a connection.
        stream_interval: tokens per streamed chunk asked of SGLang; None is the server's own.
        salt_cache_by_version: give each policy version a prefix-cache namespace of its own (``extra_key``), so that no
            request reuses keys and values of older weights after an in-place update.
    """

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession | None = None,
        seed: int = 0,
        max_attempts: int = 8,
        breaker_failures: int = 3,
        breaker_reset_s: float = 1.0,
        breaker_max_reset_s: float = 30.0,
        max_requests_per_server: int | None = None,
        concurrency: ConcurrencyPolicy | None = None,
        retry_budget: RetryBudget | None = None,
        overload: Overload | None = None,
        vocab_size: int | None = None,
        probe_every_s: float = 1.0,
        probe_timeout_s: float = 5.0,
        unhealthy_after: int = 3,
        lost_after_s: float = 30.0,
        stall_timeout_s: float | None = None,
        connect_timeout_s: float = 10.0,
        stream_interval: int | None = None,
        salt_cache_by_version: bool = True,
    ) -> None:
        self._given_session = session
        self._session: aiohttp.ClientSession | None = session
        self._rng = random.Random(seed)
        self._max_attempts = max_attempts
        self._retry_budget = retry_budget or RetryBudget()
        self._overload = overload or Overload()
        self._probe_timeout_s = probe_timeout_s
        self._salt_cache = salt_cache_by_version
        self._room = WaitingRoom()

        def open_client(url: str, api_key: str | None, admin_key: str | None) -> SGLangClient:
            return SGLangClient(
                url,
                api_key=api_key,
                admin_key=admin_key,
                session=self._open_session(),
                vocab_size=vocab_size,
                stream_interval=stream_interval,
                connect_timeout_s=connect_timeout_s,
                stall_timeout_s=stall_timeout_s,
            )

        def new_breaker() -> CircuitBreaker:
            return CircuitBreaker(failures=breaker_failures, reset_s=breaker_reset_s, max_reset_s=breaker_max_reset_s)

        self._fleet = ServerFleet(
            make_client=open_client,
            make_breaker=new_breaker,
            max_requests=max_requests_per_server,
            start_limit=None if concurrency is None else concurrency.start,
            on_change=self._room.wake,
        )
        self._health = ServerHealth(
            self._fleet,
            every_s=probe_every_s,
            timeout_s=probe_timeout_s,
            unhealthy_after=unhealthy_after,
            lost_after_s=lost_after_s,
            concurrency=concurrency,
        )
        self._counters = self._fleet.counters
        self._homes = Homes()
        self._parked: Counter[WaitReason] = Counter()
        self._expected_new_tokens = _EXPECTED_NEW_TOKENS
        # All of one length, since SGLang aborts by prefix.
        self._rid_prefix, self._rid_numbers = uuid4().hex[:16], itertools.count()

    async def __aenter__(self) -> "AsyncLLMServerManager":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections, and the session if it is ours. Requests in flight break off."""
        for server in self._fleet.servers():
            server.client.close()
            self._fleet.evict(server)
        if self._given_session is None and self._session is not None:
            await self._session.close()
            self._session = None

    # ---- the fleet

    @property
    def urls(self) -> list[str]:
        return self._fleet.urls

    @property
    def required(self) -> str | None:
        """The label that servers must be verified at; None admits any."""
        return self._fleet.required

    def add_server(self, url: str, *, capacity: float = 1.0, api_key: str | None = None, admin_key: str | None = None) -> None:
        """Add a server, or say that the engine behind a known url is a new process: it starts unverified.

        Requests in flight on the previous incarnation continue elsewhere with what they have.
        """
        self._fleet.add(url, capacity=capacity, api_key=api_key, admin_key=admin_key)

    def remove_server(self, url: str) -> None:
        """Forget a server; its requests continue elsewhere with what they have. Unknown urls are ignored."""
        self._fleet.remove(url)

    def drain(self, url: str, *, by: DrainedBy = "request") -> None:
        """Send nothing new there, also after a restart; what runs may finish. ``wait_drained`` waits for that."""
        self._fleet.drain(url, by)

    def undrain(self, url: str, *, by: DrainedBy = "request") -> None:
        """Take a drained server back into rotation, unless it is drained by another, too."""
        self._fleet.undrain(url, by)

    async def wait_drained(self, url: str, *, timeout_s: float) -> bool:
        """Wait until nothing runs on a draining server; after ``timeout_s`` move the rest elsewhere and return False."""
        return await self._fleet.wait_drained(url, timeout_s=timeout_s)

    def client(self, url: str) -> SGLangClient:
        """The client of a server, for control calls."""
        return self._fleet.get(url).client

    def incarnation(self, url: str) -> int:
        """Grows whenever ``add_server`` names the url again: the same number means the same engine process."""
        return self._fleet.get(url).incarnation

    # ---- policy versions

    @property
    def also(self) -> frozenset[str]:
        """Further labels that are admitted, during a rolling update."""
        return self._fleet.also

    def view(self) -> list[ServerView]:
        """What another process must know to use the servers."""
        return self._fleet.view()

    def require_version(self, label: str | None, *, also: Collection[str] = ()) -> None:
        """From now on only servers verified at ``label`` take new requests.

        A server that is *installing* ``label`` counts too while it is verified at the label it had: requests sent there
        are held by the engine until the update is done. ``also`` admits further labels during a rolling update. None
        admits every server that is not quarantined.
        """
        self._fleet.require(label, also=also)

    def begin_update(self, url: str, label: str) -> None:
        """An update to ``label`` begins on this server: responses may carry that label from now on."""
        self._fleet.get(url).installing = label

    def follow_updates(self, url: str, *, installing: str | None, announced: Collection[str]) -> None:
        """Another process updates this server: it is at ``installing``, if at any, and may begin with those that it ``announced``
        before we hear of that."""
        server = self._fleet.get(url)
        server.installing, server.announced = installing, frozenset(announced)

    def cancel_update(self, url: str) -> None:
        """The update did not begin after all: the server serves what it served."""
        self._fleet.get(url).installing = None

    def set_verified(self, url: str, label: str, *, adapter: str | None = None) -> None:
        """The server was asked and reports exactly ``label``: it may take traffic if that is what is required.

        ``adapter`` names the LoRA adapter that its requests must ask for.
        """
        self._fleet.set_verified(url, label, adapter=adapter)

    def quarantine(self, url: str, reason: str) -> None:
        """Keep a server out until ``set_verified``; its requests continue elsewhere with the tokens that are legal."""
        self._fleet.quarantine(url, reason)

    def verified_label(self, url: str) -> str | None:
        return self._fleet.get(url).verified

    # ---- generation

    async def generate(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        *,
        trajectory_id: str,
        group_id: str,
        deadline: float,
        on_tokens: TokenListener | None = None,
        priority: Priority = Priority.TRAINING,
    ) -> Generation:
        """Continue ``ids``; see ``agentrl.protocols.Generator``.

        ``priority`` decides who goes first when requests have to wait for a server. Cancelling the call closes its connection, at which the engine aborts the request.

        Raises:
            GenerationError: a server refused the request for good, or ``max_attempts`` attempts failed.
            DeadlineExceeded: ``deadline`` seconds passed; the message says what was awaited.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        relay = None if on_tokens is None else TokenRelay(on_tokens)
        call = _Call(ids, sampling, trajectory_id, group_id, priority, relay, heard_at=started)
        scope = asyncio.timeout(deadline)
        try:
            async with scope:
                server, first_cached = await self._complete(call)
        except TimeoutError as error:
            if not scope.expired():
                raise
            self._counters["deadlines"] += 1
            silent_s = loop.time() - call.last_heard_at
            raise DeadlineExceeded(f"generation (waiting for {call.waits_for})", deadline, silent_s=silent_s) from error
        self._retry_budget.succeeded()
        new_tokens = len(call.so_far)
        self._expected_new_tokens += _EXPECTED_NEW_TOKENS_DECAY * (new_tokens - self._expected_new_tokens)
        finish = call.so_far.finish
        assert finish is not None
        return Generation(
            ids=call.so_far.ids,
            logprobs=call.so_far.logprobs,
            versions=call.so_far.versions,
            finish=finish,
            server=server,
            cached_tokens=first_cached,
            ms=(loop.time() - started) * 1e3,
        )

    async def _complete(self, call: _Call) -> tuple[str, int]:
        """Visit servers until the generation is whole. Returns the last url and the first visit's cached tokens."""
        first_cached: int | None = None
        while True:
            server = await self._acquire(call)
            failure = await self._visit(server, call)
            if first_cached is None:
                first_cached = call.so_far.cached_tokens
            if failure is None and call.so_far.finish != "abort":
                return server.url, first_cached
            if call.is_complete:
                call.so_far.finish = "stop" if call.ends_with_stop else "length"
                return server.url, first_cached
            self._counters["continuations" if len(call.so_far) else "retries"] += 1
            if failure is not None:
                await self._after_failure(server, call, failure)

    async def _after_failure(self, server: Server, call: _Call, failure: GenerationError) -> None:
        if isinstance(failure, EngineBusy):
            await self._wait_for_room(server, call)
            return
        call.failures += 1
        if call.failures >= self._max_attempts:
            raise GenerationError(
                f"{call.failures} attempts failed over {len(self.urls)} servers with {len(call.so_far)} of "
                f"{call.sampling.max_new_tokens} tokens sampled; the last: {failure}"
            ) from failure
        if self._was_the_last_choice(server, call):
            await asyncio.sleep(_backoff_s(call.failures))
        if call.failures > 1:
            await self._wait_for_budget(call)

    async def _wait_for_room(self, server: Server, call: _Call) -> None:
        """No room says nothing against the request: it waits as it would for a place here, until its deadline."""
        call.refusals += 1
        if self._was_the_last_choice(server, call):
            call.waits_for = "server"
            with self._counted_as_parked("server"), waiting("server"):
                await asyncio.sleep(_backoff_s(call.refusals))

    def _was_the_last_choice(self, server: Server, call: _Call) -> bool:
        """Avoid the server from now on; True, and all are tried again, where no other is left."""
        call.avoid.add(server.url)
        if not all(candidate.url in call.avoid for candidate in self._fleet.routable()):
            return False
        call.avoid.clear()
        return True

    async def _wait_for_budget(self, call: _Call) -> None:
        loop = asyncio.get_running_loop()
        wait_s = self._retry_budget.try_take(loop.time())
        if not wait_s:
            return
        self._counters["delayed_retries"] += 1
        call.waits_for = "server"
        with self._counted_as_parked("server"), waiting("server"):
            while wait_s:
                await asyncio.sleep(wait_s)
                wait_s = self._retry_budget.try_take(loop.time())

    async def _visit(self, server: Server, call: _Call) -> GenerationError | None:
        """One request on one server; appends what may be kept to ``call.so_far``. Returns what went wrong, if anything."""
        loop = asyncio.get_running_loop()
        failure: GenerationError | None = None
        # Only a server that was verified at the start has labels to hold it to.
        is_checked = server.verified is not None
        now = loop.time()
        visit = Visit(
            cost=self._cost(call),
            started=now,
            label_mark=server.label_mark(),
            is_probe=server.breaker.state(now) != "closed",
            scope=asyncio.timeout(None),
        )
        call.waits_for = "server"
        call.hear(visit.piece)
        try:
            if call.relay is not None:
                visit.piece.on_arrival = partial(self._relay, call.relay, server, visit, len(call.so_far), is_checked)
            await self._ask(server, call, visit)
        except EngineRejected:
            server.totals.errors += 1
            server.breaker.cancelled()
            raise
        except EngineBusy as error:
            failure = error
            server.busy_until = loop.time() + _RETRY_BACKOFF_S
            server.breaker.cancelled()
        except EngineUnavailable as error:
            failure = error
            server.totals.errors += 1
            server.breaker.failed(loop.time())
            log.debug("generation broke off url=%s error=%s", server.url, error)
        except TimeoutError as error:
            if not visit.is_evicted:
                raise
            # A move is not a failure of this request: its server left the rotation. Still bounded, like every retry.
            failure = EngineUnavailable(f"{server.url} left the rotation: {server.quarantine_reason or 'removed'}")
            failure.__cause__ = error
            server.breaker.cancelled()
        else:
            if visit.is_probe:
                log.info("server recovered url=%s", server.url)
            server.breaker.succeeded()
            if visit.is_probe:
                self._room.wake()
        mismatch = self._keep_legal(server, visit, is_checked)
        self._count(server, visit, loop.time())
        is_empty_abort = visit.piece.finish == "abort" and not visit.piece.ids and server.installing is None
        if is_empty_abort and failure is None and mismatch is None:
            failure = EngineUnavailable(f"{server.url} aborted without a token: {visit.piece.finish_message}")
        cached = call.so_far.cached_tokens or visit.piece.cached_tokens
        call.so_far.extend(visit.piece)
        call.so_far.cached_tokens = cached
        if call.relay is not None:
            call.relay.settled(call.so_far, server=server.url)
        if visit.piece.finish in ("stop", "length"):
            return mismatch  # it was whole before its connection ended: more would follow its end
        return mismatch or failure

    @staticmethod
    def _relay(relay: TokenRelay, server: Server, visit: Visit, num_before: int, is_checked: bool) -> None:
        certain = server.verified_labels(visit) if is_checked else None
        relay.arrived(visit.piece, num_before=num_before, server=server.url, certain=certain)

    def _keep_legal(self, server: Server, visit: Visit, is_checked: bool) -> GenerationError | None:
        """Cut the piece before its first illegal label; quarantine the server if it served unknown weights."""
        if not is_checked:
            return None
        legal = server.legal_labels(visit)
        piece = visit.piece
        if legal >= piece.distinct_labels():
            return None
        cut = next(index for index, label in enumerate(piece.labels) if label not in legal)
        wrong = piece.labels[cut]
        self._counters["tokens_discarded"] += len(piece) - cut
        piece.truncate(cut)
        piece.finish = None
        if visit.is_evicted:
            return None  # an update that failed half-way: already quarantined
        server.totals.mismatches += 1
        self._counters["version_mismatches"] += 1
        message = f"{server.url} reported weights {wrong!r}, legal were {sorted(legal)}: it restarted or was updated by others"
        if self._fleet.is_current(server) and not server.quarantine_reason:
            self.quarantine(server.url, message)
        return EngineUnavailable(message)

    def _count(self, server: Server, visit: Visit, now: float) -> None:
        totals = server.totals
        totals.tokens += len(visit.piece)
        if visit.piece.finish is not None:
            totals.requests += 1
            totals.prompt_tokens += visit.piece.prompt_tokens
            totals.cached_tokens += visit.piece.cached_tokens
            totals.ms.append((now - visit.started) * 1e3)

    async def _ask(self, server: Server, call: _Call, visit: Visit) -> None:
        """The request itself: accounted for as long as it runs, and ended by the manager where it must (``Visit.evict``)."""
        sampling = replace(call.sampling, max_new_tokens=call.tokens_left) if call.so_far.ids else call.sampling
        namespace = server.verified if self._salt_cache else None
        server.begin(visit)
        try:
            with waiting("server"):
                async with visit.scope:
                    await server.client.generate(
                        call.context,
                        sampling,
                        rid=f"{self._rid_prefix}{next(self._rid_numbers):016x}",
                        into=visit.piece,
                        cache_namespace=namespace,
                        adapter=server.adapter,
                    )
        except asyncio.CancelledError:
            now = asyncio.get_running_loop().time()
            if self._made_no_progress(server, visit, now):
                server.breaker.failed(now)
            elif visit.is_probe:
                server.breaker.cancelled()
            raise
        finally:
            server.end(visit)
            if self._fleet.has_limits():
                self._room.wake()

    def _made_no_progress(self, server: Server, visit: Visit, now: float) -> bool:
        """A request was given up after a good while in which the server delivered no token to anyone."""
        if server.installing is not None or now - visit.started < self._probe_timeout_s:
            return False
        return all(other.piece.last_arrival < visit.started for other in server.visits)

    def _cost(self, call: _Call) -> int:
        expected = min(call.tokens_left, int(self._expected_new_tokens))
        return len(call.ids) + len(call.so_far) + max(expected, 1)

    # ---- routing

    async def _acquire(self, call: _Call) -> Server:
        """Wait until a server may take the call and nobody goes before it; choose one and remember it as its home."""
        place: Place | None = None
        is_new = not call.so_far.ids and call.trajectory_id not in self._homes
        try:
            while True:
                routable = self._fleet.routable()
                if routable and self._room.is_first(place, call.priority, is_new=is_new):
                    preferred = [server for server in routable if server.url not in call.avoid] or routable
                    return self._choose(preferred, call)
                if place is None:
                    place = self._room.enter(call.priority, is_new=is_new)
                if routable:
                    self._room.wake()
                reason = self._fleet.why_none()
                call.waits_for = reason
                limit_s = min(self._fleet.next_retry_in_s() or _LOOK_AGAIN_S, _LOOK_AGAIN_S)
                with self._counted_as_parked(reason), waiting(reason):
                    await self._room.sleep(place, limit_s=limit_s)
        finally:
            if place is not None:
                self._room.leave(place)

    def _choose(self, servers: Sequence[Server], call: _Call) -> Server:
        group_key = f"group:{call.group_id}"
        home = self._homes.get(call.trajectory_id)
        prefix_tokens = len(call.ids) + len(call.so_far)
        by_url = {server.url: server for server in servers}
        url = choose_server(
            [Candidate(server.url, self._load_of(server), server.capacity) for server in servers],
            home=home or self._homes.get(group_key),
            prefix_tokens=prefix_tokens,
            overload=self._overload,
            rng=self._rng,
        )
        if home is not None and url != home:
            self._counters["moves"] += 1
        self._homes.remember(call.trajectory_id, url)
        # The group's home stays where its first member went, unless that server left the rotation.
        if self._homes.get(group_key) not in by_url:
            self._homes.remember(group_key, url)
        return by_url[url]

    def _load_of(self, server: Server) -> int:
        """Tokens in flight; a request that is not ours counts as one of ours does."""
        if not server.foreign_requests:
            return server.tokens_in_flight
        each = server.tokens_in_flight / len(server.visits) if server.visits else self._expected_new_tokens
        return server.tokens_in_flight + int(server.foreign_requests * each)

    @contextmanager
    def _counted_as_parked(self, reason: WaitReason) -> Yields[None, None, None]:
        self._parked[reason] += 1
        try:
            yield
        finally:
            self._parked[reason] -= 1

    # ---- health

    async def run(self) -> None:
        """Look after the servers until cancelled (``server_health``): reachable, at their label, our counts true, room left."""
        await self._health.run()

    # ---- what others see

    def stats(self) -> list[ServerStats]:
        """One entry per server, in the order they were added."""
        return self._fleet.stats()

    def counters(self) -> dict[str, int]:
        """Totals since the start: ``retries`` (from scratch), ``continuations`` (with tokens kept), ``moves`` (off a
        cache), ``deadlines``, ``quarantines``, ``version_mismatches``, ``tokens_discarded``, ``unhealthy``,
        ``delayed_retries`` (the retry budget was spent), ``drifts`` (an engine's count of requests differed from ours)."""
        return {name: self._counters[name] for name in COUNTERS}

    def wait_reason(self) -> WaitReason | None:
        """What rollouts wait for here: parked ones first, then requests in flight; None when nobody waits."""
        for reason in ("weights", "server"):
            if self._parked[reason]:
                return reason
        busy = [server for server in self._fleet.servers() if server.visits]
        if not busy:
            return None
        return "weights" if all(server.installing is not None for server in busy) else "server"

    def num_parked(self) -> int:
        """Requests that no server may take at the moment."""
        return sum(self._parked.values())

    def at(self, priority: Priority) -> Generator:
        """The same servers for callers of another priority, such as an evaluation beside training."""
        return _AtPriority(self, priority)

    # ---- small things

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._session


def _backoff_s(times: int) -> float:
    return min(_RETRY_BACKOFF_S * 2 ** min(times, 16), _RETRY_BACKOFF_MAX_S)


@dataclass(frozen=True, slots=True)
class _AtPriority(Generator):
    """A manager whose requests have one priority."""

    manager: AsyncLLMServerManager
    priority: Priority

    async def generate(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        *,
        trajectory_id: str,
        group_id: str,
        deadline: float,
        on_tokens: TokenListener | None = None,
    ) -> Generation:
        return await self.manager.generate(
            ids,
            sampling,
            trajectory_id=trajectory_id,
            group_id=group_id,
            deadline=deadline,
            on_tokens=on_tokens,
            priority=self.priority,
        )
