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

from agentrl.errors import StreamError, WeightSyncError
from agentrl.serving.digest import weights_digest
from agentrl.serving.server_manager import NO_POLICY, AsyncLLMServerManager
from agentrl.serving.sglang_client import ModelInfo, PauseMode, SGLangClient
from agentrl.types import PolicyRecord

log = logging.getLogger(__name__)

UpdateMode: TypeAlias = Literal["in_place", "retract", "abort", "rolling"]

_UPDATES_KEPT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """One attempt to bring one server to one version."""

    url: str
    label: str
    version: int
    mode: UpdateMode
    is_first: bool
    """The server was out of rotation (new, restarted or quarantined), so no request waited for it."""
    error: str
    """Empty when it succeeded."""
    paused_s: float
    """Seconds during which the server sampled nothing."""
    total_s: float


@dataclass(slots=True)
class _Backoff:
    incarnation: int
    record: PolicyRecord
    failures: int
    not_before: float


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
        check_files: compare the weight files with the record's digest, once per record.
        on_update: called after every attempt.
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
        check_files: bool = True,
        on_update: Callable[[WeightUpdate], None] | None = None,
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
        self._check_files = check_files
        self._on_update = on_update
        self._target: PolicyRecord | None = None
        self._refused: PolicyRecord | None = None
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
                if record is not None and self._is_newer(record) and await self._is_usable(record):
                    self._adopt(record)
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
        """Servers never go back: not to an older epoch, nor to an older version of the same epoch."""
        if self._target is None:
            return True
        return (record.run_epoch, record.version) > (self._target.run_epoch, self._target.version)

    async def _is_usable(self, record: PolicyRecord) -> bool:
        """Whether the files are there and are what was announced. A refused record is looked at again on the next poll."""
        try:
            if record.kind != "full":
                raise WeightSyncError(f"policy {record.label} has kind {record.kind!r}: not supported yet. Publish full weights.")
            if self._check_files:
                found = await asyncio.to_thread(weights_digest, record.path)
                if found != record.digest:
                    raise WeightSyncError(
                        f"the weight files in {record.path} have digest {found}, but {record.label} was announced with "
                        f"{record.digest}: they were overwritten or damaged. Publish into a new directory per version."
                    )
        except (OSError, WeightSyncError, ValueError) as error:
            if record != self._refused:
                log.warning("policy not adopted label=%s error=%s", record.label, error)
            self._refused = record
            return False
        return True

    def _adopt(self, record: PolicyRecord) -> None:
        """Switch the required label and mark every server as updating, without an await between: nothing is unroutable."""
        log.info("policy adopted label=%s path=%s", record.label, record.path)
        self._target, self._refused = record, None
        if self._mode == "rolling":
            self._admit_old_labels_while_rolling(record)
            return
        self._manager.require_version(record.label)
        for url in self._manager.urls:
            if self._manager.verified_label(url) is not None and url not in self._updating:
                self._manager.begin_update(url, record.label)

    def _admit_old_labels_while_rolling(self, target: PolicyRecord) -> None:
        verified = {self._manager.verified_label(url) for url in self._manager.urls}
        self._manager.require_version(target.label, also={label for label in verified if label not in (None, target.label)})

    # ---- the servers

    def _due(self) -> list[str]:
        """Servers that are not at the target, not being updated and not backing off."""
        target = self._target
        if target is None:
            return []
        now = asyncio.get_running_loop().time()
        due: list[str] = []
        for url in self._manager.urls:
            if url in self._updating or self._manager.verified_label(url) == target.label:
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
        record = self._target
        if record is None or url not in self._manager.urls:
            return
        loop = asyncio.get_running_loop()
        started = loop.time()
        client, incarnation = self._manager.client(url), self._manager.incarnation(url)
        is_first = self._manager.verified_label(url) is None
        paused_s = 0.0
        problem = ""
        try:
            if is_first and await self._already_serves(client, record):
                log.info("server already serves the policy url=%s label=%s", url, record.label)
            elif not await self._has_files(record):
                self._manager.cancel_update(url)
                return
            elif is_first or self._mode != "rolling":
                paused_s = await self._update_paused(client, record, is_first=is_first)
            else:
                paused_s = await self._update_drained(client, record)
        except WeightSyncError as error:
            problem = str(error)
        if url not in self._manager.urls or self._manager.incarnation(url) != incarnation:
            return  # removed or restarted meanwhile: what was verified is not what is there now
        if problem:
            self._failed(url, record, problem)
        else:
            self._backoffs.pop(url, None)
            self._manager.set_verified(url, record.label)
            if self._mode == "rolling" and self._target is not None:
                self._admit_old_labels_while_rolling(self._target)
        self._report(
            WeightUpdate(
                url=url,
                label=record.label,
                version=record.version,
                mode=self._mode,
                is_first=is_first,
                error=problem,
                paused_s=paused_s,
                total_s=loop.time() - started,
            )
        )

    async def _has_files(self, record: PolicyRecord) -> bool:
        """False when the directory was removed: a newer version is out, and the next poll reads it."""
        if not self._check_files or await asyncio.to_thread(os.path.isdir, record.path):
            return True
        log.info("policy files are gone, reading the record again label=%s path=%s", record.label, record.path)
        return False

    async def _already_serves(self, client: SGLangClient, record: PolicyRecord) -> bool:
        """A server that outlived its ``serve`` process may be right as it is; it may also have been left paused."""
        info = await client.describe(timeout_s=self._control_timeout_s)
        if info.label != record.label or info.digest not in (None, record.digest):
            return False
        await client.continue_generation(timeout_s=self._control_timeout_s)
        return True

    async def _update_paused(self, client: SGLangClient, record: PolicyRecord, *, is_first: bool) -> float:
        """Pause, load, verify, continue. Returns the seconds paused."""
        loop = asyncio.get_running_loop()
        mode: PauseMode = "retract" if is_first or self._mode == "rolling" else self._mode
        if client.url in self._manager.urls:
            self._manager.begin_update(client.url, record.label)
        paused_at = loop.time()
        try:
            await client.pause(mode, timeout_s=self._control_timeout_s)
            await self._load(client, record, flush_cache=mode != "in_place")
        except WeightSyncError as error:
            # Out of rotation before it samples again: what it serves now is not known.
            self._quarantine(client.url, f"update to {record.label} failed: {error}")
            raise
        finally:
            await self._resume(client)
        return loop.time() - paused_at

    async def _update_drained(self, client: SGLangClient, record: PolicyRecord) -> float:
        """Take the server out of rotation, load, verify, put it back: nothing is ever held."""
        loop = asyncio.get_running_loop()
        self._manager.drain(client.url)
        try:
            if not await self._manager.wait_drained(client.url, timeout_s=self._drain_timeout_s):
                log.info("server did not drain, its requests move url=%s after_s=%g", client.url, self._drain_timeout_s)
            drained_at = loop.time()
            await self._update_paused(client, record, is_first=False)
        finally:
            if client.url in self._manager.urls:
                self._manager.undrain(client.url)
        return loop.time() - drained_at

    async def _load(self, client: SGLangClient, record: PolicyRecord, *, flush_cache: bool) -> None:
        await client.update_weights_from_disk(
            record.path,
            label=record.label,
            flush_cache=flush_cache,
            expected_digest=record.digest,
            timeout_s=self._update_timeout_s,
        )
        _verify(client.url, await client.model_info(timeout_s=self._control_timeout_s), record)

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

    def _failed(self, url: str, record: PolicyRecord, problem: str) -> None:
        backoff = self._backoffs.get(url)
        failures = backoff.failures + 1 if backoff else 1
        wait_s = min(self._backoff_s * 2 ** (failures - 1), self._max_backoff_s)
        now = asyncio.get_running_loop().time()
        self._backoffs[url] = _Backoff(self._manager.incarnation(url), record, failures, now + wait_s)
        self._manager.quarantine(url, problem)
        log.warning("weight update failed url=%s label=%s try=%d again_in_s=%g: %s", url, record.label, failures, wait_s, problem)

    def _report(self, update: WeightUpdate) -> None:
        self.updates.append(update)
        if self._on_update is not None:
            self._on_update(update)


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
