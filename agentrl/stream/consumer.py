"""Read the stream, assemble groups, and let entries go only behind a checkpoint.

Delivery is at least once, the effect on the weights exactly once:

1. ``acquire`` takes the fence (a new run epoch) and everything earlier learners had read but not committed.
2. ``next_group`` hands out whole groups. What the checkpoint already contains (``trained``) is committed, not returned.
3. The caller saves a checkpoint that carries the ids it consumed, then calls ``commit``, which removes the group's
   entries in one script that a newer learner's fence turns away.

A read can fail after Redis delivered: the entries are then pending under our name and never offered again. So after
*any* interrupted read, and whenever Redis counts more pending entries than we hold, the pending list is read first.

What waits here: ``next_group``, up to the caller's timeout, for producers to close a group.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import redis
from redis.exceptions import RedisError

from agentrl.errors import CodecError, Fenced, StreamError
from agentrl.stream import scripts
from agentrl.stream.codec import decode
from agentrl.stream.connection import Pauses, retry
from agentrl.stream.keys import GROUP, Keys
from agentrl.stream.policy import policy_fields
from agentrl.types import AGAIN_MARK, REQUEUED, GroupClose, PolicyRecord, Trajectory, TrajectoryGroup, round_of

log = logging.getLogger(__name__)

READ_COUNT: Final = 32
"""Entries of one read: what it costs apart from them, two round trips in effect, is that of decoding several."""
BLOCK_S: Final = 0.5
_PENDING_PAGE: Final = 256
_FETCH_PAGE: Final = 16
"""Payloads asked for in one round trip."""
_COMMIT_ROWS: Final = 256
"""Entries removed by one script: long scripts stall every producer."""
_FULL_RECENT_S: Final = 5.0
_REMEMBERED_IDS: Final = 65_536
"""Far more than a server without ``appendfsync always`` can lose: it forgets about the last two seconds."""

TRAINED: Final = "trained"
FILTERED: Final = "filtered"
STALE: Final = "stale"
SUPERSEDED: Final = "superseded"
DEAD_LETTER: Final = "dead_letter"


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry that Redis holds as pending for us."""

    entry_id: str
    kind: str
    """``t`` trajectory, ``c`` close, anything else is foreign."""
    id: str
    group_id: str
    num_bytes: int
    side: bool


@dataclass(slots=True)
class _Row:
    """One entry as the commit script removes it."""

    entry: _Entry
    outcome: str = ""
    reason: str = ""
    """Not empty: copy the entry to the dead-letter stream first."""


@dataclass(slots=True)
class _Building:
    """A group some of whose entries have arrived."""

    members: dict[str, tuple[_Entry, Trajectory]] = field(default_factory=dict[str, tuple[_Entry, Trajectory]])
    repeated: list[_Entry] = field(default_factory=list[_Entry])


@dataclass(slots=True)
class _Closing:
    """A group whose close has arrived, perhaps corrupted."""

    entry: _Entry
    close: GroupClose | None
    reason: str = ""


@dataclass(slots=True)
class _Assembled:
    """A complete group and the rows that will remove it."""

    group: TrajectoryGroup
    rows: list[_Row]


@dataclass(slots=True)
class Counters:
    """What this consumer met since ``acquire``."""

    groups: int = 0
    """Handed out by ``next_group``."""
    skipped_groups: int = 0
    """Committed without being returned: the checkpoint contained them."""
    partial_groups: int = 0
    """Groups of which the checkpoint contained some members only; the rest was returned as a smaller group."""
    dead: int = 0
    """Entries sent to the dead-letter stream."""
    superseded: int = 0
    """Trajectories whose group closed without them, or that came twice."""
    returned_groups: int = 0
    """Groups that came again after they were handed out: the server lost the end of its file. They are not handed out twice."""
    recovered: int = 0
    """Entries found in the pending list instead of being read as new."""
    outages: int = 0
    """Reads that failed and were repaired."""


class TrajectoryConsumer:
    """The ``TrajectorySource`` on Redis. One per learner; ``commit`` may run in another thread than ``next_group``.

    Args:
        client: from ``connect``; it must not retry by itself.
        keys: of the run.
        consumer: stable name within the group; a restarted learner uses the same.
        trained: ids that the restored checkpoint contains: trajectory ids, and close ids (``group.close.id``) for groups
            decided as a whole. A mapping gives their outcomes; a plain collection means ``trained`` for trajectories
            and ``filtered`` for other members of a listed close.
        max_deliveries: a trajectory delivered this often after ``blame`` is poison and goes to the dead letters.
        patience_s: seconds of unreachable server after which acquire, commit and publish raise; None waits for ever.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        *,
        consumer: str = "L0",
        trained: Collection[str] = (),
        max_deliveries: int = 3,
        patience_s: float | None = 60.0,
    ) -> None:
        self._client: Any = client
        self._keys = keys
        self._consumer = consumer
        self._trained: Collection[str] = trained if isinstance(trained, Mapping) else frozenset(trained)
        self._max_deliveries = max_deliveries
        self._patience_s = patience_s
        self._epoch = 0
        self._committed_groups = 0
        self._lock = threading.RLock()
        self._window: dict[str, _Entry] = {}
        self._building: dict[str, _Building] = {}
        self._closing: deque[_Closing] = deque()
        self._ready: deque[_Assembled] = deque()
        self._handed: dict[str, _Assembled] = {}
        self._group_of: dict[str, str] = {}
        self._settled: list[_Row] = []
        self._recent: OrderedDict[str, str] = OrderedDict()
        """What was committed last, id -> outcome: a server that loses the end of its file gives it out again."""
        self._must_recover = True
        self._outage: Pauses | None = None
        self.counters = Counters()
        self._acquire = self._client.register_script(scripts.ACQUIRE)
        self._commit = self._client.register_script(scripts.COMMIT)
        self._claim = self._client.register_script(scripts.CLAIM)
        self._blame = self._client.register_script(scripts.BLAME)
        self._publish = self._client.register_script(scripts.PUBLISH)
        self._report = self._client.register_script(scripts.REPORT)

    # -- ownership ----------------------------------------------------------------------------------------------------

    def acquire(self, *, at_least: int = 0) -> int:
        """Become the run's only learner. Returns the run epoch, which is above every earlier one and ``at_least``.

        Everything earlier learners had read but not committed is ours afterwards.
        """
        keys = self._keys
        answer = retry(
            lambda: self._acquire(keys=[keys.fence, keys.traj, keys.progress, keys.stats], args=[at_least]),
            "acquiring the stream",
            patience_s=self._patience_s,
        )
        self._epoch, self._committed_groups = int(answer[0]), int(answer[1])
        self._must_recover = True
        retry(self._recover, "reading pending entries", patience_s=self._patience_s)
        log.info("stream acquired: run_epoch=%d pending=%d", self._epoch, len(self._window))
        return self._epoch

    @property
    def run_epoch(self) -> int:
        """0 before ``acquire``."""
        return self._epoch

    @property
    def committed_groups(self) -> int:
        """Groups that ever left the stream, as of the last acquire or commit.

        What a learner reports as consumed is this plus the groups it has decided and not committed yet.
        """
        return self._committed_groups

    # -- reading ------------------------------------------------------------------------------------------------------

    def next_group(self, timeout_s: float) -> TrajectoryGroup | None:
        """The next complete group in stream order, or None when none was complete in time.

        A group all of whose rollouts failed comes with no trajectories: it is the caller's to count and commit.
        An unreachable server is retried until the timeout and then None is returned; see ``outage_s``.

        Raises:
            Fenced: a newer learner owns the stream.
            StreamError: the server lost the stream, or refuses us.
        """
        if not self._epoch:
            raise StreamError("next_group before acquire: this learner does not own the stream yet. Call acquire first")
        deadline = time.monotonic() + timeout_s
        while True:
            if (group := self._hand_out()) is not None:
                return group
            try:
                self._advance(max(0.0, min(BLOCK_S, deadline - time.monotonic())))
                self._outage = None
            except (RedisError, OSError) as error:
                if self._outage is None:
                    self._outage = Pauses("reading the stream", None)
                    self.counters.outages += 1
                pause_s = self._outage.after(error)
                time.sleep(max(0.0, min(pause_s, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                return self._hand_out()

    @property
    def outage_s(self) -> float:
        """Seconds since which every read failed; 0 while the server answers."""
        return self._outage.waited_s if self._outage else 0.0

    def producers_blocked(self) -> bool:
        """Whether a producer found the stream full in the last seconds. A learner that holds uncommitted groups and
        gets no new ones should then checkpoint and commit early: its unacknowledged entries fill ``max_bytes``."""
        age = retry(lambda: full_age_s(self._client, self._keys), "reading stats", patience_s=self._patience_s)
        return age is not None and age < _FULL_RECENT_S

    def entry_id(self, trajectory_id: str) -> str:
        """The stream id of a trajectory that was handed out and not committed, for ``fetch`` on another rank."""
        with self._lock:
            if trajectory_id not in self._group_of:
                raise StreamError(f"trajectory {trajectory_id} is not in hand: it was never read, or already committed")
            assembled = self._handed[self._group_of[trajectory_id]]
            return next(row.entry.entry_id for row in assembled.rows if row.entry.id == trajectory_id)

    def fetch(self, entry_ids: Sequence[str]) -> list[Trajectory]:
        """The trajectories of these stream ids, in order. See the function ``fetch``."""
        return fetch(self._client, self._keys, entry_ids, patience_s=self._patience_s)

    # -- letting go ---------------------------------------------------------------------------------------------------

    def commit(self, ids: Iterable[str], *, outcomes: Mapping[str, str]) -> None:
        """Remove groups whose fate a durable checkpoint contains. Repeating it changes nothing.

        Args:
            ids: close ids (``group.close.id``), which name a whole group, or the ids of all its trajectories (here or in
                ``outcomes``): its close goes with them. Groups without trajectories can only be named by their close id.
            outcomes: trajectory id -> ``trained | filtered | stale | stale:requeued | superseded | failed:<reason>``; ids that
                are not in it were trained. One ``stale:requeued`` gives its whole group back to be sampled again.

        Raises:
            Fenced: a newer learner owns the stream; nothing was removed by this call's last script.
            ValueError: an unknown outcome, or only a part of a group.
            StreamError: the server stayed away longer than ``patience_s``.
        """
        for outcome in set(outcomes.values()):
            if outcome not in (TRAINED, FILTERED, STALE, REQUEUED, SUPERSEDED) and not outcome.startswith("failed:"):
                raise ValueError(
                    f"outcome {outcome!r} is none of trained, filtered, stale, {REQUEUED}, superseded, failed:<reason>"
                )
        named = set(ids) | set(outcomes)
        with self._lock:
            closes = {self._group_of[i] for i in named if i in self._group_of}
            rows = [row for close_id in sorted(closes) for row in self._rows_of(close_id, named, outcomes)]
        self._remove(rows, self._retry_fenced)
        with self._lock:
            for close_id in closes:
                self._forget(close_id)

    def blame(self, ids: Iterable[str]) -> None:
        """Say that training on these trajectories raised. After ``max_deliveries`` deliveries they are dead letters.

        The other members of their groups are not held to account; a close id blames its whole group.

        Only this counts against an entry. A learner that was killed says nothing about its data, so the deliveries that
        follow a kill, a lost reply or an outage do not count.
        """
        named = set(ids)
        with self._lock:
            closes = {self._group_of[i] for i in named if i in self._group_of}
            wanted = {
                row.entry.entry_id
                for close_id in closes
                for row in self._handed[close_id].rows
                if row.entry.kind == "t" and (row.entry.id in named or close_id in named)
            }
        args = [self._epoch, self._consumer, *sorted(wanted)]
        self._retry_fenced(self._blame, [self._keys.fence, self._keys.traj], args, "blaming entries")

    def publish_policy(self, record: PolicyRecord, *, consumed_groups: int) -> None:
        """Announce what every server must serve, and the groups decided so far.

        Raises:
            Fenced: a newer learner owns the stream.
        """
        if record.run_epoch != self._epoch:
            raise ValueError(f"record of run_epoch={record.run_epoch} but this learner acquired epoch {self._epoch}")
        keys = [self._keys.fence, self._keys.progress, self._keys.policy]
        args = [self._epoch, consumed_groups, record.version, *policy_fields(record)]
        self._retry_fenced(self._publish, keys, args, "publishing the policy")

    def report_progress(self, consumed_groups: int) -> None:
        """Report the absolute number of groups whose fate this lineage has decided, discarded ones included.

        Raises:
            Fenced: a newer learner owns the stream.
        """
        keys = [self._keys.fence, self._keys.progress]
        self._retry_fenced(self._report, keys, [self._epoch, consumed_groups], "reporting progress")

    # -- one step of reading ------------------------------------------------------------------------------------------

    def _hand_out(self) -> TrajectoryGroup | None:
        with self._lock:
            if not self._ready:
                return None
            assembled = self._ready.popleft()
            self.counters.groups += 1
            return assembled.group

    def _advance(self, block_s: float) -> None:
        """Take in what Redis has for us, at most one blocking read, and assemble what is complete."""
        if self._must_recover:
            self._recover()
        elif not self._closing:
            self._read_new(block_s)
        self._assemble()
        if self._settled:
            self._remove(self._settled, self._call_fenced)
            self._settled = []

    def _read_new(self, block_s: float) -> None:
        # Until the reply is taken in, Redis may have delivered entries that we never saw.
        self._must_recover = True
        with self._client.pipeline(transaction=False) as pipe:
            block_ms = max(1, int(block_s * 1000)) if block_s > 0 else None
            pipe.xreadgroup(GROUP, self._consumer, {self._keys.traj: ">"}, count=READ_COUNT, block=block_ms)
            pipe.get(self._keys.fence)
            pipe.xpending(self._keys.traj, GROUP)
            streams, fence, pending = pipe.execute()
        self._check_fence(fence)
        entries = [pair for _, pairs in streams or [] for pair in pairs]
        self._take_in(entries)
        # Someone (a fenced learner's last read, an operator's XCLAIM) moved entries: they are pending, but not here.
        self._must_recover = int(pending["pending"]) > len(self._window)

    def _recover(self) -> None:
        """Make every pending entry of the group ours and take in those we do not hold, in stream order."""
        keys = self._keys
        with self._client.pipeline(transaction=False) as pipe:
            pipe.get(keys.fence)
            pipe.xpending(keys.traj, GROUP)
            fence, pending = pipe.execute()
        self._check_fence(fence)
        if any(other["name"].decode() != self._consumer for other in pending["consumers"]):
            self._claim_from_others()
        after = "-"
        while True:
            page = self._client.xpending_range(keys.traj, GROUP, after, "+", _PENDING_PAGE, self._consumer)
            with self._lock:
                unknown = {
                    item["message_id"].decode(): int(item["times_delivered"])
                    for item in page
                    if item["message_id"].decode() not in self._window
                }
            self._take_in_pending(unknown)
            if len(page) < _PENDING_PAGE:
                break
            after = "(" + page[-1]["message_id"].decode()
        self._must_recover = False

    def _claim_from_others(self) -> None:
        cursor, done = "0-0", False
        while not done:
            args = [self._epoch, self._consumer, cursor]
            cursor = self._call_fenced(self._claim, [self._keys.fence, self._keys.traj], args, "claiming entries")
            done = cursor == "0-0"

    def _take_in_pending(self, deliveries: Mapping[str, int]) -> None:
        ids = list(deliveries)
        for start in range(0, len(ids), _FETCH_PAGE):
            chunk = ids[start : start + _FETCH_PAGE]
            found = dict(zip(chunk, _read_entries(self._client, self._keys, chunk), strict=True))
            vanished = [entry_id for entry_id, fields in found.items() if fields is None]
            if vanished:
                # Deleted while pending: nothing is left to train, and the pending list would hold it for ever.
                self._client.xack(self._keys.traj, GROUP, *vanished)
            present = [(entry_id.encode(), fields) for entry_id, fields in found.items() if fields is not None]
            self.counters.recovered += len(present)
            self._take_in(present, deliveries)

    def _take_in(
        self, entries: Sequence[tuple[bytes, Mapping[bytes, bytes]]], deliveries: Mapping[str, int] | None = None
    ) -> None:
        side_ids = [fields.get(b"t", b"").decode(errors="replace") for _, fields in entries if b"s" in fields]
        blobs = dict(zip(side_ids, _read_blobs(self._client, self._keys, side_ids), strict=True))
        with self._lock:
            for raw_id, fields in entries:
                entry = _entry(raw_id.decode(), fields)
                if entry.entry_id in self._window:
                    continue
                payload = blobs.get(entry.id) if entry.side else fields.get(b"b")
                self._place(entry, payload, (deliveries or {}).get(entry.entry_id, 1))
                self._window[entry.entry_id] = entry

    def _place(self, entry: _Entry, payload: bytes | None, times_delivered: int) -> None:
        """Put one entry where it belongs: its group, the closes, or the dead letters."""
        try:
            value = _decode_entry(entry, payload)
        except CodecError as error:
            if entry.kind == "c":
                self._closing.append(_Closing(entry, None, str(error)))
            else:
                self._bury(entry, str(error))
            return
        if isinstance(value, GroupClose):
            self._closing.append(_Closing(entry, value))
        elif times_delivered >= self._max_deliveries:
            self._bury(entry, f"poison: delivered {times_delivered} times, training on it raised each time")
        else:
            building = self._building.setdefault(entry.group_id, _Building())
            if value.id in building.members:  # the server lost the older one, or there could be no newer
                building.repeated.append(building.members[value.id][0])
            building.members[value.id] = (entry, value)

    def _bury(self, entry: _Entry, reason: str) -> None:
        log.warning("entry sent to the dead letters: entry=%s id=%s reason=%s", entry.entry_id, entry.id, reason)
        self.counters.dead += 1
        outcome = f"failed:{DEAD_LETTER}" if entry.kind == "t" else ""
        self._settled.append(_Row(entry, outcome, reason))

    # -- assembling ---------------------------------------------------------------------------------------------------

    def _assemble(self) -> None:
        """Turn every close whose members are known into a group."""
        while self._closing:
            with self._lock:
                closing = self._closing[0]
                building = self._building.get(closing.entry.group_id, _Building())
                missing = closing.close is not None and any(m not in building.members for m in closing.close.members)
            if missing:
                # Members precede their close, so a missing one is either pending somewhere or gone for good.
                self._recover()
            with self._lock:
                self._closing.popleft()
                building = self._building.pop(closing.entry.group_id, _Building())
                self._settle(closing, building)

    def _settle(self, closing: _Closing, building: _Building) -> None:
        close = closing.close or _close_from_members(closing.entry, building)
        if closing.close is None:
            log.warning("group close is corrupt: group=%s reason=%s", close.group_id, closing.reason)
            self.counters.dead += 1
        present = {m: building.members.pop(m) for m in close.members if m in building.members}
        gone = {m: DEAD_LETTER for m in close.members if m not in present}
        decided = {m for m in present if m in self._trained or m in self._recent}
        whole = close.id in self._trained or close.id in self._recent or (bool(present) and len(decided) == len(present))
        rows = [_Row(entry, self._outcome(m)) for m, (entry, _) in present.items()]
        extras = [entry for entry, _ in building.members.values()] + building.repeated
        self.counters.superseded += len(extras)
        rows += [_Row(entry, SUPERSEDED) for entry in extras]
        rows.append(_Row(closing.entry, reason=closing.reason))
        self.counters.returned_groups += close.id in self._recent or close.id in self._handed
        if close.id in self._handed:
            # The server lost the entries of a group in hand and the group was sampled again: the commit removes the new ones as well.
            self._handed[close.id].rows += rows
            self._group_of |= dict.fromkeys((row.entry.id for row in rows), close.id)
            return
        if whole:
            rows[-1].outcome = _again(close, {row.entry.id: row.outcome for row in rows})
            self.counters.skipped_groups += 1
            self._settled += rows
            return
        if decided:
            self.counters.partial_groups += 1
            log.warning("group was consumed in part: group=%s consumed=%d of %d", close.id, len(decided), len(present))
        left = [m for m in present if m not in decided]
        close = replace(close, members=tuple(left), failed={**close.failed, **gone})
        assembled = _Assembled(TrajectoryGroup(close, tuple(present[m][1] for m in left)), rows)
        self._ready.append(assembled)
        self._handed[close.id] = assembled
        self._group_of |= {row.entry.id: close.id for row in rows} | {close.id: close.id}

    def _outcome(self, trajectory_id: str) -> str:
        """How this learner or the restored checkpoint decided on it; overwritten by ``commit`` when it was handed out."""
        if trajectory_id in self._recent:
            return self._recent[trajectory_id]
        if isinstance(self._trained, Mapping):
            outcomes = cast("Mapping[str, str]", self._trained)
            return outcomes.get(trajectory_id, FILTERED)
        return TRAINED if trajectory_id in self._trained else FILTERED

    # -- removing -----------------------------------------------------------------------------------------------------

    def _rows_of(self, close_id: str, named: set[str], outcomes: Mapping[str, str]) -> list[_Row]:
        assembled = self._handed[close_id]
        members = {t.id for t in assembled.group}
        unnamed = members - named
        if unnamed and close_id not in named:
            raise ValueError(
                f"commit names {len(members) - len(unnamed)} of {len(members)} trajectories of group "
                f"{assembled.group.close.group_id} (missing: {min(unnamed)}): a group is committed whole"
            )
        for row in assembled.rows:
            if row.entry.id in members:
                row.outcome = outcomes.get(row.entry.id, TRAINED)
            elif row.entry.kind == "c":
                row.outcome = _again(assembled.group.close, outcomes)
        return assembled.rows

    def _forget(self, close_id: str) -> None:
        assembled = self._handed.pop(close_id, None)
        self._group_of.pop(close_id, None)
        for row in assembled.rows if assembled else ():
            self._group_of.pop(row.entry.id, None)

    def _remove(self, rows: Sequence[_Row], run: Callable[[Any, list[str], list[Any], str], str]) -> None:
        keys = self._keys
        names = [keys.fence, keys.traj, keys.stats, keys.dead, keys.closed, keys.requeued, keys.dead_blobs]
        for start in range(0, len(rows), _COMMIT_ROWS):
            chunk = rows[start : start + _COMMIT_ROWS]
            args: list[Any] = [self._epoch, keys.prefix]
            for row in chunk:
                e = row.entry
                args += [e.entry_id, e.kind, e.id, e.num_bytes, int(e.side), row.outcome, row.reason]
            self._committed_groups = int(run(self._commit, names, args, "committing"))
            with self._lock:
                for row in chunk:
                    self._window.pop(row.entry.entry_id, None)
                    self._recent[row.entry.id] = row.outcome
                while len(self._recent) > _REMEMBERED_IDS:
                    self._recent.popitem(last=False)

    def _retry_fenced(self, script: Any, keys: list[str], args: list[Any], what: str) -> str:
        return retry(lambda: self._call_fenced(script, keys, args, what), what, patience_s=self._patience_s)

    def _call_fenced(self, script: Any, keys: list[str], args: list[Any], what: str) -> str:
        status, value = (part.decode() for part in script(keys=keys, args=args))
        if status == "FENCED":
            raise self._lost_fence(int(value), what)
        return value

    def _check_fence(self, value: bytes | None) -> None:
        if value is None or int(value) != self._epoch:
            raise self._lost_fence(int(value or 0), "reading the stream")

    def _lost_fence(self, holder: int, what: str) -> StreamError:
        if holder < self._epoch:
            return StreamError(
                f"{what}: the fence is {holder} but this learner acquired epoch {self._epoch}, so the server lost its data: "
                "run Redis with appendfsync always"
            )
        return Fenced(
            f"{what}: this learner holds epoch {self._epoch} but epoch {holder} owns the stream: "
            "a newer learner was started, stop this one"
        )


def full_age_s(client: redis.Redis, keys: Keys) -> float | None:
    """Seconds since a producer last found the stream full, by the server's clock; None for never."""
    script: Any = client.register_script(scripts.FULL_AGE)
    age_ms = int(script(keys=[keys.stats], args=[]))
    return None if age_ms < 0 else age_ms / 1000


def fetch(client: redis.Redis, keys: Keys, entry_ids: Sequence[str], *, patience_s: float | None = 60.0) -> list[Trajectory]:
    """The trajectories of these stream ids, in order: how other ranks get the payloads that rank 0 planned.

    Raises:
        StreamError: an entry is gone (it was committed) or is not a trajectory.
    """
    found: list[Trajectory] = []
    for start in range(0, len(entry_ids), _FETCH_PAGE):
        chunk = entry_ids[start : start + _FETCH_PAGE]
        read = retry(lambda chunk=chunk: _read_entries(client, keys, chunk), "fetching entries", patience_s=patience_s)
        for entry_id, fields in zip(chunk, read, strict=True):
            if fields is None:
                raise StreamError(f"entry {entry_id} is not on the stream: it was committed before this rank fetched it")
            entry = _entry(entry_id, fields)
            payload = fields.get(b"b")
            if entry.side:
                payload = retry(
                    lambda entry=entry: _read_blobs(client, keys, [entry.id])[0], "fetching a blob", patience_s=patience_s
                )
            value = _decode_entry(entry, payload)
            if not isinstance(value, Trajectory):
                raise StreamError(f"entry {entry_id} is the close of group {entry.group_id}, not a trajectory")
            found.append(value)
    return found


def _read_entries(client: Any, keys: Keys, entry_ids: Sequence[str]) -> list[Mapping[bytes, bytes] | None]:
    with client.pipeline(transaction=False) as pipe:
        for entry_id in entry_ids:
            pipe.xrange(keys.traj, entry_id, entry_id)
        return [pairs[0][1] if pairs else None for pairs in pipe.execute()]


def _read_blobs(client: Any, keys: Keys, ids: Sequence[str]) -> list[bytes | None]:
    return cast("list[bytes | None]", client.mget([keys.blob(i) for i in ids])) if ids else []


def _entry(entry_id: str, fields: Mapping[bytes, bytes]) -> _Entry:
    def text(name: bytes) -> str:
        return fields.get(name, b"").decode(errors="replace")

    size = text(b"n")
    return _Entry(
        entry_id=entry_id,
        kind=text(b"k"),
        id=text(b"t"),
        group_id=text(b"g"),
        num_bytes=int(size) if size.isascii() and size.isdigit() else 0,
        side=b"s" in fields,
    )


def _decode_entry(entry: _Entry, payload: bytes | None) -> Trajectory | GroupClose:
    if entry.kind not in ("t", "c"):
        raise CodecError(f"entry has kind {entry.kind!r}, so agentrl did not write it")
    if payload is None:
        raise CodecError("the payload is missing" + (" from its side key" if entry.side else ""))
    value = decode(payload)
    if isinstance(value, GroupClose) != (entry.kind == "c"):
        raise CodecError(f"entry of kind {entry.kind!r} carries a {type(value).__name__}")
    if value.id != entry.id or value.group_id != entry.group_id:
        raise CodecError(f"entry is labelled {entry.id!r} of {entry.group_id!r} but carries {value.id!r}")
    return value


def _again(close: GroupClose, outcomes: Mapping[str, str]) -> str:
    """What the commit script does with a close: ``again:<ordinal>:<round>`` gives the group back, nothing does nothing.

    Asks the ids in ``failed`` as well: members that an interrupted commit already removed are listed there.
    """
    round_ = round_of(close.group_id)
    if round_ is None or not any(outcomes.get(i) == REQUEUED for i in (*close.members, *close.failed)):
        return ""
    return f"again:{close.ordinal}:{round_ + 1}"


def _close_from_members(entry: _Entry, building: _Building) -> GroupClose:
    """What can be said of a group whose close cannot be read: the members that came before it."""
    members = tuple(building.members)
    first = next((t for _, t in building.members.values()), None)
    task_id, _, place = entry.group_id.rpartition("/")
    ordinal = place.partition(AGAIN_MARK)[0]
    return GroupClose(
        group_id=entry.group_id,
        task_id=first.task_id if first else task_id,
        ordinal=first.ordinal if first else int(ordinal) if ordinal.isdigit() else 0,
        size=max(1, len(members)),
        members=members,
    )
