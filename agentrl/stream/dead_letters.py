"""Entries that could not be trained: look at them, put them back on the stream, or forget them. The ledger stays closed.

A dead letter was counted as ``failed:dead_letter`` when it was buried. Replaying it takes it out of that column and puts it on
the stream again under a new id (``<id>+replay<dead entry>``), because its group was decided without it and checkpoints remember
the old id. Letters of one group that are replayed together form one group again; the learner drops groups of one where its
advantage needs siblings. Dropping a letter only deletes the copy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import redis

from agentrl.errors import CodecError, ConfigError, StreamError
from agentrl.stream import scripts
from agentrl.stream.codec import decode, encode
from agentrl.stream.connection import retry
from agentrl.stream.keys import Keys
from agentrl.stream.producer import SIDE_KEY_BYTES
from agentrl.types import GroupClose, Trajectory

REPLAY_MARK: Final = "+replay"
_PAGE: Final = 64
_PATIENCE_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One entry of the dead stream."""

    entry: str
    """Its id on the dead stream."""
    id: str
    """Trajectory or close id, as labelled."""
    group_id: str
    kind: str
    """``t`` trajectory, ``c`` group close, anything else was not written by agentrl."""
    reason: str
    run_epoch: int
    """Of the learner that buried it."""
    num_bytes: int
    obstacle: str
    """Why it cannot be replayed; empty when it can."""

    @property
    def buried(self) -> float:
        """Unix seconds."""
        return int(self.entry.partition("-")[0]) / 1000


def original_id(trajectory_id: str) -> str:
    """The id under which a replayed trajectory was sampled."""
    return trajectory_id.partition(REPLAY_MARK)[0]


def list_dead_letters(client: redis.Redis, keys: Keys) -> list[DeadLetter]:
    """All letters, oldest first."""
    return [letter for letter, _ in _read(client, keys)]


def replay_dead_letters(client: redis.Redis, keys: Keys, names: Iterable[str]) -> list[str]:
    """Put letters back on the stream, those of one group as one group. Returns the new trajectory ids.

    Args:
        names: dead-stream ids or trajectory ids.

    Raises:
        ConfigError: no letter of that name, or one that cannot be replayed; nothing was written then.
        StreamError: another replayed it meanwhile.
    """
    groups: dict[str, list[tuple[DeadLetter, Trajectory]]] = {}
    for letter, payload in _chosen(client, keys, names):
        if letter.obstacle:
            raise ConfigError(
                f"{letter.entry} ({letter.id}) cannot be replayed: {letter.obstacle}. Drop it with --drop {letter.entry}"
            )
        groups.setdefault(letter.group_id, []).append((letter, _trajectory(client, keys, letter, payload)))
    return [new for members in groups.values() for new in _replay_group(client, keys, members)]


def drop_dead_letters(client: redis.Redis, keys: Keys, names: Iterable[str]) -> int:
    """Delete letters for good; they stay counted as failed. Returns how many.

    Raises:
        ConfigError: no letter of that name; nothing was deleted then.
    """
    pairs = [part for letter, _ in _chosen(client, keys, names) for part in (letter.entry, letter.id)]
    script: Any = client.register_script(scripts.DROP)
    chosen = [keys.dead, keys.stats, keys.dead_blobs]
    return int(
        retry(lambda: script(keys=chosen, args=[keys.dead_blob(""), *pairs]), "dropping dead letters", patience_s=_PATIENCE_S)
    )


def _trajectory(client: redis.Redis, keys: Keys, letter: DeadLetter, payload: bytes) -> Trajectory:
    """What the letter holds; a large one is read only now."""
    try:
        untyped: Any = client
        value = decode(payload or cast("bytes | None", untyped.get(keys.dead_blob(letter.id))) or b"")
    except CodecError as error:
        raise ConfigError(
            f"{letter.entry} ({letter.id}) cannot be replayed: its bytes are still unreadable: {error}. "
            f"Drop it with --drop {letter.entry}"
        ) from error
    if not isinstance(value, Trajectory) or value.id != letter.id:
        raise ConfigError(
            f"{letter.entry} cannot be replayed: it carries {value.id!r} under the label {letter.id!r}. "
            f"Drop it with --drop {letter.entry}"
        )
    return value


def _replay_group(client: redis.Redis, keys: Keys, members: Sequence[tuple[DeadLetter, Trajectory]]) -> list[str]:
    first, trajectory = members[0]
    mark = f"{REPLAY_MARK}{first.entry}"
    group_id = trajectory.group_id + mark
    again = [replace(t, id=original_id(t.id) + mark, group_id=group_id) for _, t in members]
    close = GroupClose(
        group_id=group_id, task_id=trajectory.task_id, ordinal=trajectory.ordinal, size=len(again), members=tuple(t.id for t in again)
    )  # fmt: skip
    args: list[Any] = [close.id, group_id, encode(close)]
    args += [keys.prefix, SIDE_KEY_BYTES]
    for (letter, _), new in zip(members, again, strict=True):
        args += [letter.entry, letter.id, new.id, encode(new)]
    script = client.register_script(scripts.REPLAY)
    names = [keys.traj, keys.dedupe, keys.stats, keys.dead, keys.dead_blobs]
    # Not repeated after a lost reply: a second run would answer GONE for what the first one did.
    status, value = (part.decode() for part in cast("list[bytes]", script(keys=names, args=args)))
    if status != "OK":
        why = "somebody replayed or dropped it meanwhile" if status == "GONE" else "no producer of this run put it"
        raise StreamError(f"dead letter {value} was not replayed: {why}. List the dead letters again")
    return [t.id for t in again]


def _chosen(client: redis.Redis, keys: Keys, names: Iterable[str]) -> list[tuple[DeadLetter, bytes]]:
    wanted = list(dict.fromkeys(names))
    letters = _read(client, keys)
    chosen: dict[str, tuple[DeadLetter, bytes]] = {}
    for name in wanted:
        found = [pair for pair in letters if name in (pair[0].entry, pair[0].id)]
        if not found:
            raise ConfigError(f"no dead letter {name!r} among {len(letters)}: list them with `agentrl dead-letters RUN`")
        chosen |= {letter.entry: (letter, payload) for letter, payload in found}
    return list(chosen.values())


def _read(client: redis.Redis, keys: Keys) -> list[tuple[DeadLetter, bytes]]:
    untyped: Any = client
    found: list[tuple[DeadLetter, bytes]] = []
    after = "-"
    while True:
        page: list[tuple[bytes, dict[bytes, bytes]]] = retry(
            lambda after=after: untyped.xrange(keys.dead, after, "+", _PAGE), "reading dead letters", patience_s=_PATIENCE_S
        )
        for entry, fields in page:
            side_bytes = 0
            if b"s" in fields:
                side = keys.dead_blob(fields.get(b"t", b"").decode(errors="replace"))
                side_bytes = int(retry(lambda side=side: untyped.strlen(side), "reading dead letters", patience_s=_PATIENCE_S))
            found.append((_letter(entry.decode(), fields, side_bytes), fields.get(b"b", b"")))
        if len(page) < _PAGE:
            return found
        after = "(" + page[-1][0].decode()


def _letter(entry: str, fields: dict[bytes, bytes], side_bytes: int) -> DeadLetter:
    def text(name: bytes) -> str:
        return fields.get(name, b"").decode(errors="replace")

    epoch = text(b"epoch")
    return DeadLetter(
        entry=entry,
        id=text(b"t"),
        group_id=text(b"g"),
        kind=text(b"k"),
        reason=text(b"reason"),
        run_epoch=int(epoch) if epoch.isdigit() else 0,
        num_bytes=len(fields.get(b"b", b"")) or side_bytes,
        obstacle=_obstacle(text(b"k"), text(b"t"), fields, side_bytes),
    )


def _obstacle(kind: str, trajectory_id: str, fields: dict[bytes, bytes], side_bytes: int) -> str:
    if kind != "t":
        return "its group was closed with the members that came" if kind == "c" else "agentrl did not write it"
    if b"s" in fields:  # read when it is replayed: a list of letters must not load them all
        return "" if side_bytes else "its payload was missing, or made room for newer dead letters"
    if b"b" not in fields:
        return "it carries no payload"
    try:
        value = decode(fields[b"b"])
    except CodecError as error:
        return f"its bytes are still unreadable: {error}"
    if value.id != trajectory_id:
        return f"it carries {value.id!r} under the label {trajectory_id!r}"
    return ""
