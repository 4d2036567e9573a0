"""How every rollout ended, counted by the same scripts that moved it; the sums must close.

``submitted`` counts rollouts: the sizes of all closed groups, the members put of groups still open, and trajectories
that came although their group did not list them. Each of them is in exactly one of the other columns:

    submitted = trained + filtered + stale + failed + superseded + waiting

``waiting`` is measured, not counted: it is what lies on the stream. A difference means that something left the stream
by another way than a commit (an operator's XDEL or XTRIM, a server that lost data).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import redis

from agentrl.stream import scripts
from agentrl.stream.connection import retry
from agentrl.stream.keys import Keys
from agentrl.stream.put_ids import names_in_maps, put_name
from agentrl.types import REQUEUED

_OUTCOME = "outcome:"
_FAILED = "outcome:failed:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """How the rollouts of a run ended, as of one instant."""

    submitted: int
    trained: int
    filtered: int
    stale: int
    """Beyond the bound, dropped or given back."""
    requeued: int
    """Of ``stale``: members of groups that were given back to be sampled again."""
    failed: Mapping[str, int]
    """Reason -> rollouts. ``dead_letter`` are those whose entry could not be read or trained."""
    superseded: int
    waiting: int
    """Trajectories on the stream: not read, or read and not committed."""
    dead: int
    """Entries ever sent to the dead letters, group closes included."""
    open_groups: int
    """Groups with members on the stream that have not closed."""
    closed_groups: int
    committed_groups: int
    bytes: int
    """Encoded bytes on the stream."""

    @property
    def difference(self) -> int:
        """Rollouts submitted minus rollouts accounted for; 0 when the ledger closes."""
        ended = self.trained + self.filtered + self.stale + sum(self.failed.values()) + self.superseded
        return self.submitted - ended - self.waiting

    @property
    def closes(self) -> bool:
        """Whether every rollout is accounted for, and an empty stream holds no bytes."""
        empty = self.waiting == 0 and self.closed_groups == self.committed_groups
        return self.difference == 0 and not (empty and self.bytes != 0)

    def to_json(self) -> str:
        """One JSON object: the fields, ``difference`` and ``closes``."""
        return json.dumps({**asdict(self), "difference": self.difference, "closes": self.closes}, sort_keys=True)

    def table(self) -> str:
        """The ledger for people."""
        rows = [
            ("submitted", self.submitted),
            ("trained", self.trained),
            ("filtered", self.filtered),
            ("stale", self.stale),
            *([("  of which given back", self.requeued)] if self.requeued else []),
            *((f"failed ({reason})", count) for reason, count in sorted(self.failed.items())),
            ("superseded", self.superseded),
            ("waiting", self.waiting),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {count:>10,}" for name, count in rows]
        lines.append(f"groups: {self.open_groups} open, {self.closed_groups} closed, {self.committed_groups} committed")
        lines.append(f"dead letters: {self.dead}; stream: {self.bytes:,} bytes")
        if self.closes:
            lines.append("The ledger closes.")
        else:
            lines.append(
                f"THE LEDGER DOES NOT CLOSE: {self.difference} rollouts and {self.bytes} bytes are unaccounted for. "
                "Were entries deleted by hand, or did the server lose data?"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """The ledger and the ids behind it, as of one instant."""

    ledger: Ledger
    on_stream: tuple[str, ...]
    """Ids of every entry on the stream, closes included, in stream order."""
    put: frozenset[str]
    """Every trajectory that was ever put, by its ``put_name``."""


def read_ledger(client: redis.Redis, keys: Keys, *, patience_s: float | None = 30.0) -> Ledger:
    """The ledger of a run, while it runs or after; needs the server.

    Raises:
        StreamError: the server stayed away.
    """
    return _ledger(_snapshot(client, keys, with_ids=False, patience_s=patience_s))


def read_books(client: redis.Redis, keys: Keys, *, patience_s: float | None = 30.0) -> Books:
    """The ledger with every id: for audits. Costs the server a walk over the stream and the remembered ids.

    Raises:
        StreamError: the server stayed away.
    """
    answers = _snapshot(client, keys, with_ids=True, patience_s=patience_s)
    on_stream, known = (tuple(i.decode(errors="replace") for i in cast("list[bytes]", ids)) for ids in answers[3:5])
    flat = cast("list[bytes]", answers[5])
    folded = names_in_maps((name.decode(), data) for name, data in zip(flat[::2], flat[1::2], strict=True))
    put = frozenset(folded | {put_name(i) for i in known if not i.endswith("/close")})
    return Books(ledger=_ledger(answers), on_stream=on_stream, put=put)


def _snapshot(client: redis.Redis, keys: Keys, *, with_ids: bool, patience_s: float | None) -> list[Any]:
    script = client.register_script(scripts.SNAPSHOT)
    names = [keys.traj, keys.dedupe, keys.stats, keys.open, keys.put]
    answer = retry(lambda: script(keys=names, args=[int(with_ids), keys.prefix]), "reading the ledger", patience_s=patience_s)
    return cast("list[Any]", answer)


def _ledger(answers: list[Any]) -> Ledger:
    flat = cast("list[bytes]", answers[0])
    raw = dict(zip(flat[::2], flat[1::2], strict=True))
    stats = {name.decode(): int(value) for name, value in raw.items() if name != b"full_why"}

    def count(name: str) -> int:
        return stats.get(name, 0)

    closes_on_stream = count("closed_groups") - count("committed_groups")
    return Ledger(
        submitted=count("submitted"),
        trained=count(_OUTCOME + "trained"),
        filtered=count(_OUTCOME + "filtered"),
        stale=count(_OUTCOME + "stale") + count(_OUTCOME + REQUEUED),
        requeued=count(_OUTCOME + REQUEUED),
        failed={name.removeprefix(_FAILED): value for name, value in sorted(stats.items()) if name.startswith(_FAILED)},
        superseded=count(_OUTCOME + "superseded"),
        waiting=int(answers[1]) - closes_on_stream,
        dead=count("dead"),
        open_groups=int(answers[2]),
        closed_groups=count("closed_groups"),
        committed_groups=count("committed_groups"),
        bytes=count("bytes"),
    )
