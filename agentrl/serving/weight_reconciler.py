"""Bring every server to the announced policy: pause, load, verify, continue.

A loop that compares what each server was verified at with the policy record and repairs the difference; new servers
and restarted engines need no other path. It waits for the record's store (``read_policy``), for the weight files and
for each server's update; every one of these has a limit, and a server that fails is quarantined and tried again with
backoff while the others go on.

The transition in ``in_place``, ``retract`` and ``abort``: when a new record is adopted, the required label switches and
all servers begin their update in the same step of the event loop. A server being updated still takes requests (its
engine holds them), so nothing is parked here and no server is flooded for being the first to finish. A response may
carry the old and the new label (see ``server_manager``). ``rolling`` updates one drained server after another; until
the last is done, the label that the others still serve stays admitted.

When a record cannot be served: a server whose update fails is quarantined and tried again while the others go on. When every
server failed at it several times and none holds it, the newest record of the same epoch that a server was verified at is
installed again (``_roll_back``), so that generation goes on under a truthful label; the failed one is then tried on one server
at a time, with backoff, until it holds or a newer one is announced. ``problem`` says so for as long as it lasts.

LoRA policies (kind ``lora``, a peft directory) need no pause on SGLang: the adapter is loaded beside the one in use under the
policy's label, new requests ask for it by name, requests in flight end with the one they began with. The server's
``weight_version`` is set to the same label, so that a restarted engine shows. The embedded engine merges the adapter into its
starting weights when it loads the directory, like any other update.

With a ``WeightBroadcaster`` SGLang servers receive the files' bytes instead of reading the files; everything else is the same. After a
broadcast that failed, a server's next try is by disk.

Cache: in ``in_place`` requests that are held keep their keys and values of the old weights; the manager's per-version
cache namespaces keep later requests away from them. Every other update flushes the cache. ``in_place`` applies to
servers in rotation; one that is out of it (new, restarted, quarantined) is paused with ``retract`` and flushed.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from agentrl.errors import ServerUnreachable, StreamError, WeightSyncError
from agentrl.serving.load_policy import parse_loads
from agentrl.serving.server_manager import NO_POLICY, AsyncLLMServerManager
from agentrl.serving.sglang_client import ModelInfo, PauseMode, SGLangClient
from agentrl.serving.weight_broadcast import WeightBroadcaster
from agentrl.types import PolicyRecord
from agentrl.weights.digest import weights_digest

log = logging.getLogger(__name__)

Transport: TypeAlias = Literal["disk", "broadcast"]
UpdateMode: TypeAlias = Literal["in_place", "retract", "abort", "rolling"]

_UPDATES_KEPT = 1000
_GOOD_KEPT = 2
"""Records that servers were verified at: the one that is served, and the one to go back to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """One attempt to bring one server to one version."""

    url: str
    label: str
    version: int
    mode: UpdateMode
    transport: Transport = "disk"
    """How the weights were to get there."""
    is_first: bool
    """The server was out of rotation (new, restarted or quarantined), so no request waited for it."""
    error: str
    """Empty when it succeeded."""
    paused_s: float
    """Seconds during which the server sampled nothing."""
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyProblem:
    """An announced policy that cannot be served."""

    label: str
    error: str
    """What the last server, or the check of the files, said."""
    serving: str
    """Label that is served instead; empty when nothing is."""
    behind: int
    """Versions between the two."""
    tries: int
    """Times that it was given up."""


@dataclass(slots=True)
class _Failed:
    """A record that was given up, and when it is tried again."""

    record: PolicyRecord
    error: str
    tries: int
    not_before: float


@dataclass(slots=True)
class _Backoff:
    incarnation: int
    record: PolicyRecord
    failures: int
    not_before: float
    was_reached: bool
    """One of the failures was the server's own: it refused, or went down with the policy."""


class WeightReconciler:
    """Keeps the servers of a manager at the announced policy.

    Args:
        manager: the servers.
        read_policy: the current record, or None before the first; may raise ``StreamError`` or ``OSError`` for a while.
        mode: what happens to generations in flight (DESIGN, AsyncLLMServerManager).
        poll_s: period of reading the record and looking at the servers.
        read_timeout_s: limit of one ``read_policy``.
        update_timeout_s: limit of loading the weights on one server.
        control_timeout_s: limit of each other call (pause, continue, ``/model_info``).
        drain_timeout_s: ``rolling`` waits this long for a server's requests, then moves them elsewhere.
        backoff_s: pause after a server's first failed update, doubled up to ``max_backoff_s``.
        prepare: turns a record into one with full weights that the engines can read; may block, runs in a thread.
        check_files: compare the weight files with the record's digest, once per record.
        broadcast: sends weights to SGLang servers instead of letting them read the files; what it failed at is tried from disk.
        rollback_after: failed updates of every server after which a record is given up for the previous one.
        retry_s: pause before a record that was given up is tried on one server, doubled each time up to ``max_retry_s``.
        on_update: called after every attempt.
        before_update: awaited before a new record is adopted; must end soon.
        after_drain: awaited when ``rolling`` took a server out of rotation, until others that use it know; must end soon.
        on_problem: called when a record is refused or given up (again), and with None when that is over.
    """

    def __init__(
        self,
        manager: AsyncLLMServerManager,
        *,
        read_policy: Callable[[], Awaitable[PolicyRecord | None]],
        mode: UpdateMode = "in_place",
        poll_s: float = 0.1,
        read_timeout_s: float = 10.0,
        update_timeout_s: float = 300.0,
        control_timeout_s: float = 30.0,
        drain_timeout_s: float = 60.0,
        backoff_s: float = 0.25,
        max_backoff_s: float = 10.0,
        prepare: Callable[[PolicyRecord], PolicyRecord] | None = None,
        check_files: bool = True,
        broadcast: WeightBroadcaster | None = None,
        rollback_after: int = 2,
        retry_s: float = 5.0,
        max_retry_s: float = 300.0,
        on_update: Callable[[WeightUpdate], None] | None = None,
        on_problem: Callable[[PolicyProblem | None], None] | None = None,
        before_update: Callable[[PolicyRecord], Awaitable[None]] | None = None,
        after_drain: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._manager = manager
        self._read_policy = read_policy
        self._mode: UpdateMode = mode
        self._poll_s = poll_s
        self._read_timeout_s = read_timeout_s
        self._update_timeout_s = update_timeout_s
        self._control_timeout_s = control_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._backoff_s = backoff_s
        self._max_backoff_s = max_backoff_s
        self._prepare, self._check_files = prepare, check_files
        self._broadcast = broadcast
        self._rollback_after = rollback_after
        self._retry_s, self._max_retry_s = retry_s, max_retry_s
        self._on_update, self._on_problem = on_update, on_problem
        self._before_update, self._after_drain = before_update, after_drain
        self._target: PolicyRecord | None = None
        self._newest: PolicyRecord | None = None
        """The newest that was adopted, given up or not."""
        self._good: deque[PolicyRecord] = deque(maxlen=_GOOD_KEPT)
        self._refused: _Failed | None = None
        """Announced, but its files are not what was announced."""
        self._given_up: _Failed | None = None
        self._trial: str = ""
        """The server that tries what was given up."""
        self._doubtful: dict[str, int] = {}
        """Url -> incarnation whose last update failed: its label says nothing of its weights."""
        self._adapters: dict[str, list[str]] = {}
        """Url -> adapters that were loaded there, oldest first."""
        self._problem: PolicyProblem | None = None
        self.num_rollbacks = 0
        self._updating: set[str] = set()
        self._backoffs: dict[str, _Backoff] = {}
        self._one_at_a_time = asyncio.Lock()
        self._last_read_error = ""
        self.updates: deque[WeightUpdate] = deque(maxlen=_UPDATES_KEPT)
        """The newest attempts, oldest first."""

    @property
    def target(self) -> PolicyRecord | None:
        """The record that the servers are being brought to."""
        return self._target

    @property
    def announced(self) -> PolicyRecord | None:
        """The newest record that was looked at, whether it could be served or not."""
        refused = self._refused.record if self._refused else None
        if self._newest is None or (refused is not None and _order(refused) > _order(self._newest)):
            return refused
        return self._newest

    @property
    def problem(self) -> PolicyProblem | None:
        """The announced policy that cannot be served, while there is one."""
        return self._problem

    @property
    def is_settled(self) -> bool:
        """Every server is verified at the target."""
        target, urls = self._target, self._manager.urls
        return target is not None and bool(urls) and all(self._manager.verified_label(url) == target.label for url in urls)

    async def run(self) -> None:
        """Reconcile until cancelled. Until the first record, requests are parked with the reason ``weights``."""
        if self._target is None and self._manager.required is None:
            self._manager.require_version(NO_POLICY)
        async with asyncio.TaskGroup() as group:
            while True:
                record = await self._read()
                usable = await self._usable(record) if record is not None and self._is_newer(record) else None
                if usable is not None:
                    if self._before_update is not None:
                        await self._before_update(usable)
                    self._adopt(usable)
                self._try_again_what_was_given_up()
                for url in self._due():
                    self._updating.add(url)
                    group.create_task(self._bring(url), name=f"update {url}")
                await asyncio.sleep(self._poll_s)

    # ---- the record

    async def _read(self) -> PolicyRecord | None:
        try:
            async with asyncio.timeout(self._read_timeout_s):
                record = await self._read_policy()
        except (StreamError, OSError, TimeoutError) as error:
            if repr(error) != self._last_read_error:
                log.warning("policy record unreadable, keeping %s error=%r", self._target and self._target.label, error)
            self._last_read_error = repr(error)
            return None
        self._last_read_error = ""
        return record

    def _is_newer(self, record: PolicyRecord) -> bool:
        """Servers never go back: not to an older epoch, nor by themselves to an older version of the same epoch."""
        return self._newest is None or _order(record) > _order(self._newest)

    async def _usable(self, record: PolicyRecord) -> PolicyRecord | None:
        """The record with full weights, if the files are there and are what was announced. A refused one is looked at again
        after a while."""
        now, refused = asyncio.get_running_loop().time(), self._refused
        if refused is not None and refused.record == record and now < refused.not_before:
            return None
        usable = record
        try:
            if self._prepare is not None:
                usable = await asyncio.to_thread(self._prepare, record)
            if usable.kind == "delta":
                raise WeightSyncError(f"policy {record.label} is a delta, and nothing here puts full weights together.")
            if self._check_files and usable is record:  # what was prepared was checked
                found = await asyncio.to_thread(weights_digest, record.path)
                if found != record.digest:
                    raise WeightSyncError(
                        f"the weight files in {record.path} have digest {found}, but {record.label} was announced with "
                        f"{record.digest}: they were overwritten or damaged. Publish into a new directory per version."
                    )
        except (OSError, WeightSyncError, ValueError) as error:
            tries = refused.tries + 1 if refused is not None and refused.record == record else 1
            if tries == 1:
                log.warning("policy not adopted label=%s error=%s", record.label, error)
            wait_s = min(self._backoff_s * 2 ** (tries - 1), self._max_backoff_s)
            self._refused = _Failed(record, str(error), tries, now + wait_s)
            self._say(self._refused)
            return None
        return usable

    def _adopt(self, record: PolicyRecord) -> None:
        """Switch the required label and mark every server as updating, without an await between: nothing is unroutable."""
        log.info("policy adopted label=%s path=%s", record.label, record.path)
        self._target = self._newest = record
        self._refused = self._given_up = None
        self._trial = ""
        if any(self._manager.verified_label(url) == record.label for url in self._manager.urls):
            self._is_good(record)
        self._switch_to(record)

    def _switch_to(self, record: PolicyRecord) -> None:
        if self._mode == "rolling":
            self._admit_old_labels_while_rolling(record)
            return
        self._manager.require_version(record.label)
        for url in self._manager.urls:
            if self._manager.verified_label(url) not in (None, record.label) and url not in self._updating:
                self._manager.begin_update(url, record.label)

    # ---- what cannot be served

    def _roll_back(self, record: PolicyRecord, error: str) -> None:
        """Every server failed at the record and none holds it: serve the newest good one of its epoch again."""
        good = next((r for r in reversed(self._good) if r.run_epoch == record.run_epoch and r != record), None)
        if good is None:
            return
        self.num_rollbacks += 1
        self._give_up(record, error)
        log.error("policy rolled back from=%s to=%s: every server failed to load it: %s", record.label, good.label, error)
        self._target = good
        self._manager.require_version(good.label)
        if self._given_up is not None:
            self._say(self._given_up)

    def _give_up(self, record: PolicyRecord, error: str) -> None:
        tries = self._given_up.tries + 1 if self._given_up is not None and self._given_up.record == record else 1
        wait_s = min(self._retry_s * 2 ** (tries - 1), self._max_retry_s)
        self._given_up = _Failed(record, error, tries, asyncio.get_running_loop().time() + wait_s)
        self._trial = ""

    def _try_again_what_was_given_up(self) -> None:
        """Let one server try it beside the others, which go on with the record that is served."""
        failed, target = self._given_up, self._target
        if self._trial not in self._manager.urls:
            self._trial = ""
        if failed is None or target is None or self._trial or asyncio.get_running_loop().time() < failed.not_before:
            return
        servers = self._manager.stats()
        if self._updating or not servers:  # the last one that tried may still be on its way back: two would be out
            return
        # One that is out of rotation costs nothing, then the least busy one.
        self._trial = min(servers, key=lambda stats: (stats.version == target.label, stats.tokens_in_flight)).url
        self._backoffs.pop(self._trial, None)
        log.info("policy tried again label=%s url=%s try=%d", failed.record.label, self._trial, failed.tries + 1)
        self._manager.require_version(target.label, also=(failed.record.label,))

    def _say(self, failed: _Failed | None) -> None:
        problem = None
        if failed is not None:
            serving = self._target
            problem = PolicyProblem(
                label=failed.record.label,
                error=failed.error,
                serving=serving.label if serving else "",
                behind=failed.record.version - serving.version if serving and serving.run_epoch == failed.record.run_epoch else 0,
                tries=failed.tries,
            )
        changed = problem != self._problem
        self._problem = problem
        if changed and self._on_problem is not None:
            self._on_problem(problem)

    def _record_for(self, url: str) -> PolicyRecord | None:
        """What this server is to be brought to."""
        return self._given_up.record if self._given_up is not None and url == self._trial else self._target

    def _admit_old_labels_while_rolling(self, target: PolicyRecord) -> None:
        verified = {self._manager.verified_label(url) for url in self._manager.urls}
        self._manager.require_version(target.label, also={label for label in verified if label not in (None, target.label)})

    # ---- the servers

    def _due(self) -> list[str]:
        """Servers that are not at the target, not being updated and not backing off."""
        if self._target is None:
            return []
        now = asyncio.get_running_loop().time()
        due: list[str] = []
        for url in self._manager.urls:
            target = self._record_for(url)
            if url in self._updating or target is None or self._manager.verified_label(url) == target.label:
                continue
            backoff = self._backoffs.get(url)
            if backoff is not None and (backoff.incarnation != self._manager.incarnation(url) or backoff.record != target):
                del self._backoffs[url]
            elif backoff is not None and now < backoff.not_before:
                continue
            due.append(url)
        return due

    async def _bring(self, url: str) -> None:
        try:
            if self._mode == "rolling" and self._manager.verified_label(url) is not None:
                async with self._one_at_a_time:
                    await self._attempt(url)
            else:
                await self._attempt(url)
        finally:
            self._updating.discard(url)

    async def _attempt(self, url: str) -> None:
        """One update of one server, to what is the target when it starts. Its failure is this server's only."""
        record = self._record_for(url)
        if record is None or url not in self._manager.urls:
            return
        loop = asyncio.get_running_loop()
        started = loop.time()
        client, incarnation = self._manager.client(url), self._manager.incarnation(url)
        is_first = self._manager.verified_label(url) is None
        paused_s = 0.0
        problem, was_reached = "", True
        transport: Transport = "disk"
        try:
            if is_first and await self._already_serves(client, record, is_doubtful=self._doubtful.get(url) == incarnation):
                log.info("server already serves the policy url=%s label=%s", url, record.label)
            elif not await self._has_files(record):
                if self._is_current(client):
                    self._manager.cancel_update(url)
                return
            elif record.kind == "lora" and not client.is_embedded:
                await self._load_adapter(client, record)
            else:
                transport = await self._connected(client, record, incarnation)
                update = self._update_paused if is_first or self._mode != "rolling" else self._update_drained
                paused_s = await update(client, record, transport=transport, is_first=is_first)
        except WeightSyncError as error:
            problem, was_reached = str(error), not isinstance(error, ServerUnreachable)
        if not self._is_current(client):
            return  # removed or restarted meanwhile: what was verified is not what is there now
        if problem:
            self._failed(url, record, problem, was_reached=was_reached)
        else:
            is_adapter = record.kind == "lora" and not client.is_embedded
            self._succeeded(url, record, adapter=record.label if is_adapter else None)
            if is_adapter:
                names = self._adapters.setdefault(url, [])
                self._adapters[url] = [*(name for name in names if name != record.label), record.label]
                await self._forget_old_adapters(client)
        self._report(
            WeightUpdate(
                url=url,
                label=record.label,
                version=record.version,
                mode=self._mode,
                transport=transport,
                is_first=is_first,
                error=problem,
                paused_s=paused_s,
                total_s=loop.time() - started,
            )
        )

    def _is_current(self, client: SGLangClient) -> bool:
        """False once its server was removed or stands for a new process."""
        return client.url in self._manager.urls and self._manager.client(client.url) is client

    async def _has_files(self, record: PolicyRecord) -> bool:
        """False when the directory was removed: a newer version is out, and the next poll reads it."""
        if not self._check_files or await asyncio.to_thread(os.path.isdir, record.path):
            return True
        log.info("policy files are gone, reading the record again label=%s path=%s", record.label, record.path)
        return False

    async def _already_serves(self, client: SGLangClient, record: PolicyRecord, *, is_doubtful: bool) -> bool:
        """A server that outlived its ``serve`` process may be right as it is; it may also have been left paused.

        After a failed update only a digest is believed: SGLang can report the old label over new weights.
        """
        info = await client.describe(timeout_s=self._control_timeout_s)
        if record.kind == "lora" and info.digest is None:
            return False  # its label says nothing of its adapters, and loading one twice is harmless
        if info.label != record.label or info.digest not in (None, record.digest) or (is_doubtful and info.digest is None):
            return False
        await client.continue_generation(timeout_s=self._control_timeout_s)
        return True

    async def _connected(self, client: SGLangClient, record: PolicyRecord, incarnation: int) -> Transport:
        """How the weights get there. A sender is started before anything is paused."""
        if self._broadcast is None or client.is_embedded:
            return "disk"
        backoff = self._backoffs.get(client.url)
        if backoff is not None and backoff.record == record and backoff.failures % 2 == 1:
            return "disk"
        await self._broadcast.keep_only(self._manager.urls)
        is_connected = await self._broadcast.connect(client, incarnation=incarnation, send_timeout_s=self._update_timeout_s)
        return "broadcast" if is_connected else "disk"

    async def _update_paused(self, client: SGLangClient, record: PolicyRecord, *, transport: Transport, is_first: bool) -> float:
        """Pause, load, verify, continue. Returns the seconds paused."""
        loop = asyncio.get_running_loop()
        mode: PauseMode = "retract" if is_first or self._mode == "rolling" else self._mode
        if not self._is_current(client):
            return 0.0  # no longer ours to change
        self._manager.begin_update(client.url, record.label)
        paused_at = loop.time()
        try:
            await client.pause(mode, timeout_s=self._control_timeout_s)
            await self._load(client, record, transport=transport, flush_cache=mode != "in_place")
        except WeightSyncError as error:
            # Out of rotation before it samples again: what it serves now is not known.
            self._quarantine(client.url, f"update to {record.label} failed: {error}")
            raise
        finally:
            await self._resume(client)
        return loop.time() - paused_at

    async def _update_drained(self, client: SGLangClient, record: PolicyRecord, *, transport: Transport, is_first: bool) -> float:
        """Take the server out of rotation, load, verify, put it back: nothing is ever held."""
        loop = asyncio.get_running_loop()
        if not self._is_current(client):
            return 0.0
        self._manager.drain(client.url, by="update")
        self._manager.begin_update(client.url, record.label)  # for those who are told after the drain: it may take long
        give_up_at = loop.time() + self._drain_timeout_s
        try:
            if self._after_drain is not None:
                await self._after_drain()
            if not self._is_current(client):
                return 0.0
            if not await self._manager.wait_drained(client.url, timeout_s=give_up_at - loop.time()):
                log.info("server did not drain, its requests move url=%s after_s=%g", client.url, self._drain_timeout_s)
            await self._wait_for_others(client, give_up_at)
            drained_at = loop.time()
            await self._update_paused(client, record, transport=transport, is_first=is_first)
        finally:
            if client.url in self._manager.urls:
                self._manager.undrain(client.url, by="update")
        return loop.time() - drained_at

    async def _wait_for_others(self, client: SGLangClient, give_up_at: float) -> None:
        """Other processes send requests there, too: the server's own report counts all."""
        loop = asyncio.get_running_loop()
        while (left_s := give_up_at - loop.time()) > 0 and self._is_current(client):
            try:
                report = parse_loads(await client.loads(timeout_s=min(left_s, self._control_timeout_s)))
            except (WeightSyncError, ValueError) as error:
                log.info("server does not say what it runs url=%s error=%s", client.url, error)
                return
            if not report.total:
                return
            await asyncio.sleep(self._poll_s)

    async def _load(self, client: SGLangClient, record: PolicyRecord, *, transport: Transport, flush_cache: bool) -> None:
        if transport == "broadcast" and self._broadcast is not None:
            await self._broadcast.send(client, record, flush_cache=flush_cache, timeout_s=self._update_timeout_s)
        else:
            await client.update_weights_from_disk(
                record.path,
                label=record.label,
                flush_cache=flush_cache,
                expected_digest=record.digest,
                timeout_s=self._update_timeout_s,
            )
        _verify(client.url, await client.model_info(timeout_s=self._control_timeout_s), record)

    async def _load_adapter(self, client: SGLangClient, record: PolicyRecord) -> None:
        """Load it beside the one in use: nothing is paused, and nothing in flight changes."""
        await client.load_lora_adapter(record.label, record.path, timeout_s=self._update_timeout_s)
        await client.update_weight_version(record.label, timeout_s=self._control_timeout_s)
        _verify(client.url, await client.model_info(timeout_s=self._control_timeout_s), record)

    async def _forget_old_adapters(self, client: SGLangClient) -> None:
        """All but the one in use and the one before, which requests in flight and a rollback may need."""
        loaded = self._adapters.setdefault(client.url, [])
        while len(loaded) > _GOOD_KEPT:
            name = loaded.pop(0)
            try:
                await client.unload_lora_adapter(name, timeout_s=self._control_timeout_s)
            except WeightSyncError as error:
                log.warning("adapter not unloaded url=%s name=%s error=%s", client.url, name, error)

    async def _resume(self, client: SGLangClient) -> None:
        """Never leave a server paused, whatever happened: runs in ``finally``, also during cancellation."""
        try:
            await client.continue_generation(timeout_s=self._control_timeout_s)
        except WeightSyncError as error:
            self._quarantine(client.url, f"could not be continued after a pause: {error}")
            raise

    def _quarantine(self, url: str, reason: str) -> None:
        if url in self._manager.urls:
            self._manager.quarantine(url, reason)

    def _succeeded(self, url: str, record: PolicyRecord, *, adapter: str | None) -> None:
        self._backoffs.pop(url, None)
        self._doubtful.pop(url, None)
        self._manager.set_verified(url, record.label, adapter=adapter)
        self._is_good(record)
        if self._given_up is not None and record == self._given_up.record:
            self._adopt(record)  # it holds after all
        elif self._mode == "rolling" and self._target is not None and self._given_up is None:
            self._admit_old_labels_while_rolling(self._target)
        if self._given_up is None and self._refused is None:
            self._say(None)

    def _is_good(self, record: PolicyRecord) -> None:
        """A server holds it: it can be gone back to."""
        if record not in self._good:
            self._good.append(record)

    def _failed(self, url: str, record: PolicyRecord, problem: str, *, was_reached: bool) -> None:
        backoff = self._backoffs.get(url)
        failures = backoff.failures + 1 if backoff else 1
        was_reached = was_reached or (backoff is not None and backoff.was_reached)
        wait_s = min(self._backoff_s * 2 ** (failures - 1), self._max_backoff_s)
        now = asyncio.get_running_loop().time()
        self._backoffs[url] = _Backoff(self._manager.incarnation(url), record, failures, now + wait_s, was_reached)
        self._manager.quarantine(url, problem)
        self._doubtful[url] = self._manager.incarnation(url)
        log.warning("weight update failed url=%s label=%s try=%d again_in_s=%g: %s", url, record.label, failures, wait_s, problem)
        if url == self._trial and self._given_up is not None and record == self._given_up.record:
            self._give_up(record, problem)
            self._say(self._given_up)
        elif record == self._target and all(self._has_failed_at(other, record) for other in self._manager.urls):
            self._roll_back(record, problem)

    def _has_failed_at(self, url: str, record: PolicyRecord) -> bool:
        backoff = self._backoffs.get(url)
        return (
            self._manager.verified_label(url) != record.label
            and backoff is not None
            and backoff.record == record
            and backoff.failures >= self._rollback_after
            and backoff.was_reached
        )

    def _report(self, update: WeightUpdate) -> None:
        self.updates.append(update)
        if self._on_update is not None:
            self._on_update(update)


def _order(record: PolicyRecord) -> tuple[int, int]:
    return record.run_epoch, record.version


def _verify(url: str, info: ModelInfo, record: PolicyRecord) -> None:
    if info.label != record.label:
        raise WeightSyncError(
            f"{url} reports {info.label!r} after it was asked to load {record.label!r}: it is kept out of rotation. "
            "Check that no other run updates this server."
        )
    if info.digest is not None and info.digest != record.digest:
        raise WeightSyncError(
            f"{url} loaded files with digest {info.digest}, announced was {record.digest}: its view of {record.path} differs. "
            "Check the shared file system."
        )
