"""Every Redis key of a run: what it holds, who writes it, who trims it.

All keys start with ``arl:{run}:``. The braces are a Redis hash tag: every key of a run lies in one slot, so one Lua
script may touch all of them.

| key | type | holds | written by | trimmed by |
|---|---|---|---|---|
| ``traj`` | stream | one entry per trajectory and per group close | producer | learner's commit (XACK + XDEL) |
| ``blob:<id>`` | string | payload of an entry over 1 MiB | producer, with the entry | whatever removes the entry |
| ``members:<group>`` | set | ids put of an open group; makes a retry one entry | producer | producer's close |
| ``put:<map>`` | bitmap | one bit for each id put of closed groups (``put_ids.py``) | producer's close | never (8 bits per group of 8) |
| ``put`` | set | the names of these maps | producer's close | never |
| ``dedupe`` | zset | ids put that have no such bit: replayed dead letters, and what older versions put | replay | never |
| ``open`` | hash | group id -> members put, until the group closes | producer | producer's close |
| ``closed`` | bitmap | bit ``ordinal`` is 1 once that group closed | producer's close | never (1 bit per group) |
| ``stats`` | hash | counters: bytes, submitted, closed, outcomes … | every script | never |
| ``fence`` | int | run epoch; only its holder may commit | learner's acquire | never |
| ``requeued`` | zset | ordinal -> round of groups given back, until they close again | learner's commit | producer's close |
| ``dead`` | stream | entries that cannot be trained, with the reason | learner | oldest first, at 1000 |
| ``deadblob:<id>`` | string | payload of a dead letter over 1 MiB | learner's commit | replay, drop; oldest first, at 256 MiB in all |
| ``dead_blobs`` | list | ``bytes:id`` of those payloads, oldest first | learner's commit | with the payload |
| ``policy`` | hash | the policy record | learner | never (overwritten) |
| ``progress`` | hash | version and groups decided, for admission | learner | never (overwritten) |
| ``leases`` | zset | ordinal -> ms until which its process plays it | rollout processes, when there are several | the same, once the group closed |
| ``lease_owners`` | hash | ordinal -> ``round:process``; ``next``: lowest ordinal never leased | rollout processes | the same |
| ``fleet`` | hash | the servers and what they serve, for other rollout processes | serve | serve, at its end |
| ``partial`` | hash | trajectory id -> completed turns of an unfinished rollout | serve, per turn | serve, when it is put or its group closes |
| ``fingerprint`` | hash | what serve and learn must agree on | first to start | ``clear_fingerprint`` |
"""

from dataclasses import dataclass
from typing import Final

from agentrl.errors import ConfigError

GROUP: Final = "learner"
"""The consumer group: one logical reader, the learner."""

KEY_NAMES: Final = (
    "traj",
    "dedupe",
    "put",
    "stats",
    "fence",
    "dead",
    "dead_blobs",
    "policy",
    "progress",
    "closed",
    "open",
    "leases",
    "lease_owners",
    "fleet",
    "requeued",
    "fingerprint",
    "partial",
)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one run. ``run`` names it: letters, digits and ``-_.:/@+`` keep it readable in ``redis-cli``."""

    run: str

    def __post_init__(self) -> None:
        if not self.run or any(c in "{}" or c.isspace() or not c.isprintable() for c in self.run):
            raise ConfigError(
                f"run name {self.run!r} cannot be part of a Redis key: use a non-empty name without braces or spaces"
            )

    @property
    def prefix(self) -> str:
        return f"arl:{{{self.run}}}:"

    @property
    def traj(self) -> str:
        """Stream. Fields: ``t`` id, ``g`` group id, ``k`` kind (t or c), ``n`` bytes, ``b`` payload or ``s`` side key."""
        return self.prefix + "traj"

    @property
    def dedupe(self) -> str:
        return self.prefix + "dedupe"

    @property
    def put(self) -> str:
        """Set: the names of the bitmaps that ``put_map`` finds."""
        return self.prefix + "put"

    def put_map(self, name: str) -> str:
        """Bitmap of ids put of closed groups; see ``put_ids.py``."""
        return f"{self.prefix}put:{name}"

    @property
    def stats(self) -> str:
        return self.prefix + "stats"

    @property
    def fence(self) -> str:
        return self.prefix + "fence"

    @property
    def dead(self) -> str:
        return self.prefix + "dead"

    @property
    def dead_blobs(self) -> str:
        return self.prefix + "dead_blobs"

    @property
    def policy(self) -> str:
        return self.prefix + "policy"

    @property
    def progress(self) -> str:
        return self.prefix + "progress"

    @property
    def closed(self) -> str:
        return self.prefix + "closed"

    @property
    def open(self) -> str:
        return self.prefix + "open"

    @property
    def leases(self) -> str:
        return self.prefix + "leases"

    @property
    def lease_owners(self) -> str:
        return self.prefix + "lease_owners"

    @property
    def fleet(self) -> str:
        return self.prefix + "fleet"

    @property
    def requeued(self) -> str:
        """Sorted set: ordinal -> round, of groups that the learner gave back and that have not closed again."""
        return self.prefix + "requeued"

    @property
    def fingerprint(self) -> str:
        return self.prefix + "fingerprint"

    @property
    def partial(self) -> str:
        return self.prefix + "partial"

    def blob(self, entry_id: str) -> str:
        """Side key of one large entry, by trajectory id."""
        return f"{self.prefix}blob:{entry_id}"

    def members(self, group_id: str) -> str:
        """Set of the ids put of one open group."""
        return f"{self.prefix}members:{group_id}"

    def dead_blob(self, entry_id: str) -> str:
        """Side key of one large dead letter, by trajectory id."""
        return f"{self.prefix}deadblob:{entry_id}"
