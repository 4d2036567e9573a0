"""Dead letters are listed, replayed and dropped on a real server; the ledger closes after each."""

import pytest
import redis
import redis.asyncio

from agentrl.errors import ConfigError
from agentrl.stream import scripts
from agentrl.stream.consumer import TrajectoryConsumer
from agentrl.stream.dead_letters import drop_dead_letters, list_dead_letters, original_id, replay_dead_letters
from agentrl.stream.keys import Keys
from agentrl.stream.ledger import read_ledger
from agentrl.stream.producer import SIDE_KEY_BYTES, TrajectoryProducer
from agentrl.testing.stream_doubles import make_close, make_trajectory
from agentrl.types import Trajectory, content_digest

pytestmark = pytest.mark.asyncio
KEYS = Keys("dead")


async def bury_a_group(client: redis.Redis, aclient: redis.asyncio.Redis, size: int = 3) -> list[str]:
    """A group on which training raised again and again: all of it is in the dead letters and committed."""
    producer = TrajectoryProducer(aclient, KEYS)
    members = [make_trajectory(0, i) for i in range(size)]
    for member in members:
        await producer.put_trajectory(member)
    await producer.close_group(make_close(members))
    for _ in range(3):
        consumer = TrajectoryConsumer(client, KEYS)
        consumer.acquire()
        group = consumer.next_group(60.0)
        assert group is not None
        consumer.blame([t.id for t in group])
    consumer.commit([group.close.id], outcomes={})
    return [m.id for m in members]


async def test_poison_is_listed_with_its_reason_and_replayed_as_one_group(
    client: redis.Redis, aclient: redis.asyncio.Redis
) -> None:
    ids = await bury_a_group(client, aclient)
    letters = list_dead_letters(client, KEYS)
    assert [letter.id for letter in letters] == ids
    assert all("poison" in letter.reason and not letter.obstacle for letter in letters)
    before = read_ledger(client, KEYS)
    assert (before.submitted, dict(before.failed), before.closes) == (3, {"dead_letter": 3}, True)

    new = replay_dead_letters(client, KEYS, [letters[0].entry, ids[1]])  # by either name
    assert [original_id(i) for i in new] == ids[:2]
    assert len(list_dead_letters(client, KEYS)) == 1
    waiting = read_ledger(client, KEYS)
    assert (waiting.submitted, waiting.waiting, waiting.failed["dead_letter"], waiting.closes) == (3, 2, 1, True)

    consumer = TrajectoryConsumer(client, KEYS, trained=dict.fromkeys(ids, "failed:dead_letter"))
    consumer.acquire()
    group = consumer.next_group(60.0)
    assert group is not None
    assert [t.id for t in group] == new
    assert content_digest(group.trajectories[0]) == content_digest(make_trajectory(0, 0))
    consumer.commit([group.close.id], outcomes={})
    after = read_ledger(client, KEYS)
    assert (after.trained, after.waiting, after.failed["dead_letter"], after.bytes, after.closes) == (2, 0, 1, 0, True)


async def test_what_cannot_be_replayed_says_why_and_nothing_is_written(client: redis.Redis, aclient: redis.asyncio.Redis) -> None:
    producer = TrajectoryProducer(aclient, KEYS)
    members = [make_trajectory(1, i) for i in range(2)]
    for member in members:
        await producer.put_trajectory(member)
    client.xadd(KEYS.traj, {"t": "x", "g": "x", "k": "t", "n": 3, "b": b"bad"})
    await producer.close_group(make_close(members))
    consumer = TrajectoryConsumer(client, KEYS)
    consumer.acquire()
    group = consumer.next_group(60.0)
    assert group is not None
    consumer.commit([group.close.id], outcomes={})
    consumer.next_group(0.05)
    (letter,) = list_dead_letters(client, KEYS)
    assert "unreadable" in letter.obstacle
    with pytest.raises(ConfigError, match="cannot be replayed: its bytes are still unreadable"):
        replay_dead_letters(client, KEYS, [letter.entry])
    with pytest.raises(ConfigError, match="no dead letter 'nobody' among 1"):
        replay_dead_letters(client, KEYS, ["nobody"])
    assert drop_dead_letters(client, KEYS, [letter.entry]) == 1
    assert list_dead_letters(client, KEYS) == []
    assert read_ledger(client, KEYS).closes


async def test_a_dropped_letter_stays_counted_as_failed(client: redis.Redis, aclient: redis.asyncio.Redis) -> None:
    ids = await bury_a_group(client, aclient)
    assert drop_dead_letters(client, KEYS, ids) == 3
    ledger = read_ledger(client, KEYS)
    assert (ledger.failed["dead_letter"], ledger.dead, ledger.closes) == (3, 3, True)


def large(index: int, seed: int = 0) -> Trajectory:
    return make_trajectory(0, index, num_tokens=200_000, seed=seed)


async def bury_large(client: redis.Redis, aclient: redis.asyncio.Redis) -> list[Trajectory]:
    producer = TrajectoryProducer(aclient, KEYS)
    members = [large(0), large(1), make_trajectory(0, 2)]
    for member in members:
        await producer.put_trajectory(member)
    await producer.close_group(make_close(members))
    for _ in range(3):
        consumer = TrajectoryConsumer(client, KEYS)
        consumer.acquire()
        group = consumer.next_group(60.0)
        assert group is not None
        consumer.blame([t.id for t in group])
    consumer.commit([group.close.id], outcomes={})
    return members


async def test_a_large_letter_keeps_its_payload_and_is_replayed(client: redis.Redis, aclient: redis.asyncio.Redis) -> None:
    members = await bury_large(client, aclient)
    letters = list_dead_letters(client, KEYS)
    assert [letter.num_bytes > SIDE_KEY_BYTES for letter in letters] == [True, True, False]
    assert not any(letter.obstacle for letter in letters)
    assert client.keys(KEYS.blob("*")) == []
    assert drop_dead_letters(client, KEYS, [letters[1].id]) == 1
    new = replay_dead_letters(client, KEYS, [letters[0].id, letters[2].id])
    assert (client.keys(KEYS.dead_blob("*")), client.llen(KEYS.dead_blobs), client.hget(KEYS.stats, "dead_bytes")) == (
        [],
        0,
        b"0",
    )
    consumer = TrajectoryConsumer(client, KEYS)
    consumer.acquire()
    group = consumer.next_group(60.0)
    assert group is not None
    assert [t.id for t in group] == new
    assert [content_digest(t) for t in group] == [content_digest(members[0]), content_digest(members[2])]
    consumer.commit([group.close.id], outcomes={})
    book = read_ledger(client, KEYS)
    assert (book.trained, book.failed["dead_letter"], book.bytes, book.closes) == (2, 1, 0, True)
    assert client.keys(KEYS.blob("*")) == []


async def test_payloads_of_large_letters_are_bounded_in_all(
    client: redis.Redis, aclient: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "COMMIT", scripts.COMMIT.replace(str(scripts.DEAD_BLOB_BYTES), str(2 << 20)))
    await bury_large(client, aclient)
    oldest, newer, small = list_dead_letters(client, KEYS)
    assert "made room for newer" in oldest.obstacle
    assert not newer.obstacle
    assert not small.obstacle
    assert client.keys(KEYS.dead_blob("*")) == [KEYS.dead_blob(newer.id).encode()]
    with pytest.raises(ConfigError, match="cannot be replayed"):
        replay_dead_letters(client, KEYS, [oldest.entry])
    assert drop_dead_letters(client, KEYS, [oldest.entry, newer.entry]) == 2
    assert client.hget(KEYS.stats, "dead_bytes") == b"0"


async def test_a_large_letter_that_was_damaged_says_so_when_it_is_replayed(
    client: redis.Redis, aclient: redis.asyncio.Redis
) -> None:
    await bury_large(client, aclient)
    letter = list_dead_letters(client, KEYS)[0]
    client.setrange(KEYS.dead_blob(letter.id), 5000, b"damage")
    with pytest.raises(ConfigError, match="still unreadable"):
        replay_dead_letters(client, KEYS, [letter.entry])
    assert read_ledger(client, KEYS).waiting == 0


async def test_replaying_twice_gives_one_entry(client: redis.Redis, aclient: redis.asyncio.Redis) -> None:
    ids = await bury_a_group(client, aclient, size=1)
    replay_dead_letters(client, KEYS, ids)
    with pytest.raises(ConfigError, match="no dead letter"):
        replay_dead_letters(client, KEYS, ids)
    assert (read_ledger(client, KEYS).waiting, read_ledger(client, KEYS).closes) == (1, True)
