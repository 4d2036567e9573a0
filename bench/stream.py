"""Trajectories per second through producer, Redis and consumer, next to raw XADD and XREADGROUP of the same bytes in the same run.

    python bench/stream.py [--seconds 2] [--tokens 1024,4096,16384,65536] [--soak 20000] [--soak-seconds 480] [--ray]

Each cell: both sides alternate on one embedded server, so that whatever else the machine does hits both. ``put`` is encode plus
the idempotent script against XADD of the ready bytes; ``take`` is read, decode, assemble and the fenced commit against
XREADGROUP, XACK and XDEL. ``--ray`` adds a Ray actor queue (`ray.util.queue.Queue`, the usual alternative: in memory, gone with its
actor) with the same encoded bytes. The soak sends small trajectories through a bounded stream and watches the memory of the server and its clients.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agentrl.stream.codec import encode
from agentrl.stream.connection import connect, connect_async
from agentrl.stream.consumer import TrajectoryConsumer
from agentrl.stream.keys import Keys
from agentrl.stream.ledger import read_ledger
from agentrl.stream.producer import TrajectoryProducer
from agentrl.stream.server import EmbeddedServer
from agentrl.testing.stream_doubles import make_close, make_trajectory
from agentrl.types import Trajectory

GROUP_SIZE = 8
WRITERS = 8
PRODUCERS = 2
"""Processes that put in the soak."""
COMMIT_GROUPS = 8
"""Groups of the soak that one commit removes."""
DURABILITY = {"off": ("no", "everysec"), "everysec": ("yes", "everysec"), "always": ("yes", "always")}


@dataclass(frozen=True)
class Side:
    """One side's numbers: rates in trajectories/s, latencies of one put in ms."""

    put_per_s: float
    put_p50_ms: float
    put_p99_ms: float
    take_per_s: float

    @property
    def through_per_s(self) -> float:
        return 1 / (1 / self.put_per_s + 1 / self.take_per_s)


def trajectories(count: int, num_tokens: int, first: int) -> list[list[Trajectory]]:
    """Groups of one size; prompts of a quarter."""
    return [
        [make_trajectory(first + g, i, num_tokens=num_tokens, prompt_length=num_tokens // 4, seed=1) for i in range(GROUP_SIZE)]
        for g in range(count)
    ]


async def timed_puts(puts: Sequence[Callable[[], Awaitable[Any]]]) -> tuple[float, list[float]]:
    """Seconds in all and milliseconds each, with ``WRITERS`` at work."""
    waiting, each = list(reversed(puts)), list[float]()

    async def write() -> None:
        while waiting:
            put = waiting.pop()
            began = time.perf_counter()
            await put()
            each.append((time.perf_counter() - began) * 1e3)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(WRITERS):
            group.create_task(write())
    return time.perf_counter() - began, each


async def measure_ours(url: str, groups: list[list[Trajectory]]) -> Side:
    keys, client = Keys("ours"), connect_async(url)
    producer = TrajectoryProducer(client, keys, max_items=10**9)
    members = [t for group in groups for t in group]
    seconds, each = await timed_puts([lambda t=t: producer.put_trajectory(t) for t in members])
    began = time.perf_counter()
    for group in groups:
        await producer.close_group(make_close(group))
    seconds += time.perf_counter() - began
    await client.aclose()

    def take() -> float:
        with connect(url) as sync:
            consumer = TrajectoryConsumer(sync, keys)
            consumer.acquire()
            began = time.perf_counter()
            for _ in groups:
                group = consumer.next_group(10.0)
                assert group is not None
                assert len(group.trajectories) == GROUP_SIZE
                consumer.commit([group.close.id], outcomes={})
            return time.perf_counter() - began

    taken = await asyncio.to_thread(take)
    return side(len(members), seconds, each, taken)


async def measure_raw(url: str, groups: list[list[Trajectory]]) -> Side:
    client: Any = connect_async(url)
    entries = [{"t": t.id, "g": t.group_id, "k": "t", "n": 1, "b": encode(t)} for group in groups for t in group]
    seconds, each = await timed_puts([lambda e=e: client.xadd("raw", e) for e in entries])
    await client.aclose()

    def take() -> float:
        with connect(url) as sync:
            untyped: Any = sync
            untyped.xgroup_create("raw", "g", "0", mkstream=True)
            began, left = time.perf_counter(), len(entries)
            while left:
                ((_, pairs),) = untyped.xreadgroup("g", "c", {"raw": ">"}, count=GROUP_SIZE)
                ids = [entry for entry, _ in pairs]
                untyped.xack("raw", "g", *ids)
                untyped.xdel("raw", *ids)
                left -= len(ids)
            seconds = time.perf_counter() - began
            untyped.delete("raw")
            return seconds

    return side(len(entries), seconds, each, await asyncio.to_thread(take))


async def measure_ray(groups: list[list[Trajectory]]) -> Side:
    """Encode and put into a queue actor; take by eights and decode. Nothing is durable, repeated or counted there."""
    from ray.util.queue import Queue

    from agentrl.stream.codec import decode

    queue: Any = Queue()
    members = [t for group in groups for t in group]
    await queue.put_async(b"warm")
    await queue.get_async()
    seconds, each = await timed_puts([lambda t=t: queue.put_async(encode(t)) for t in members])

    def take() -> float:
        began, left = time.perf_counter(), len(members)
        while left:
            left -= len([decode(raw) for raw in queue.get_nowait_batch(min(left, GROUP_SIZE))])
        return time.perf_counter() - began

    taken = await asyncio.to_thread(take)
    queue.shutdown()
    return side(len(members), seconds, each, taken)


def compare_with_ray(url: str, tokens: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Ours at ``appendfsync always`` and the actor queue, in turns."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    rows: list[dict[str, Any]] = []
    try:
        for num_tokens in tokens:
            ours, theirs, first = list[Side](), list[Side](), 0
            ends = time.monotonic() + seconds
            while time.monotonic() < ends or len(ours) < 3:
                with connect(url) as client:
                    client.flushall()
                groups = trajectories(max(4, min(16, 100_000 // num_tokens)), num_tokens, first)
                first += len(groups)
                ours.append(asyncio.run(measure_ours(url, groups)))
                theirs.append(asyncio.run(measure_ray(groups)))
            a, b = mean(ours), mean(theirs)
            print(
                f"ray       {num_tokens:6d}         | "
                + " | ".join(f"{s.put_per_s:9.0f} {s.put_p50_ms:5.2f} {s.put_p99_ms:6.2f} {s.take_per_s:8.0f}" for s in (a, b))
                + f" | {100 * a.through_per_s / b.through_per_s:4.0f} %",
                flush=True,
            )
            rows.append({"tokens": num_tokens, "ours": asdict(a), "ray": asdict(b)})
    finally:
        ray.shutdown()
    return rows


def side(count: int, put_s: float, each_ms: list[float], take_s: float) -> Side:
    p50, p99 = np.percentile(each_ms, [50, 99])
    return Side(put_per_s=count / put_s, put_p50_ms=float(p50), put_p99_ms=float(p99), take_per_s=count / take_s)


def mean(sides: list[Side]) -> Side:
    return Side(**{name: float(np.median([getattr(s, name) for s in sides])) for name in asdict(sides[0])})


async def cell(url: str, num_tokens: int, seconds: float) -> tuple[Side, Side, int]:
    """Both sides in turns until the time is over; medians."""
    ours, raw, first = list[Side](), list[Side](), 0
    with connect(url) as client:
        client.flushall()
    per_round = max(4, min(64, 200_000 // num_tokens))
    size = len(encode(make_trajectory(0, 0, num_tokens=num_tokens, prompt_length=num_tokens // 4, seed=1)))
    ends = time.monotonic() + seconds
    while time.monotonic() < ends or len(ours) < 3:
        groups = trajectories(per_round, num_tokens, first)
        first += per_round
        ours.append(await measure_ours(url, groups))
        raw.append(await measure_raw(url, groups))
    return mean(ours), mean(raw), size


def soak_group(template: Sequence[Trajectory], ordinal: int) -> list[Trajectory]:
    """Group ``ordinal``, with the arrays of the template: making up tokens would cost more than putting them."""
    group_id = f"{template[0].task_id}/{ordinal}"
    return [replace(t, id=f"{group_id}/{t.sample_index}/{t.attempt}", group_id=group_id, ordinal=ordinal) for t in template]


def produce(url: str, producer: int, num_groups: int, ends: float) -> None:
    """One producer process of the soak: every ``PRODUCERS``-th group, by ``WRITERS`` tasks."""

    async def run() -> None:
        client = connect_async(url)
        sink = TrajectoryProducer(client, Keys("soak"), max_items=256)
        template = [make_trajectory(0, i, num_tokens=64) for i in range(GROUP_SIZE)]
        ordinals = iter(range(producer, num_groups, PRODUCERS))

        async def write() -> None:
            for ordinal in ordinals:
                if time.time() > ends:
                    break
                group = soak_group(template, ordinal)
                for member in group:
                    await sink.put_trajectory(member)
                if ordinal % 10 == 0:  # a retry whose first reply was lost, before and after the close
                    await sink.put_trajectory(group[0])
                await sink.close_group(make_close(group))
                if ordinal % 10 == 0:
                    await sink.put_trajectory(group[1])

        async with asyncio.TaskGroup() as tasks:
            for _ in range(WRITERS):
                tasks.create_task(write())
        await client.aclose()

    asyncio.run(run())


def rss_mib(pid: int) -> float:
    """Resident memory of a process now; 0 when it ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return 0.0


def soak(url: str, count: int, limit_s: float) -> list[dict[str, float]]:
    """Small trajectories through a stream of at most 256 entries: producer processes, one consumer; everybody's memory on the way.

    Ends after ``limit_s`` seconds with what went through by then. Of each tenth group two puts are repeated, one of them after
    the close.
    """
    keys, rows, num_groups = Keys("soak"), list[dict[str, float]](), count // GROUP_SIZE
    began, ends = time.perf_counter(), time.time() + limit_s
    context = multiprocessing.get_context("spawn")
    producers = [context.Process(target=produce, args=(url, n, num_groups, ends)) for n in range(PRODUCERS)]
    for process in producers:
        process.start()
    with connect(url) as client:
        untyped: Any = client

        def sample(done: int) -> None:
            memory = untyped.info("memory")
            ids = [keys.put_map(name.decode()) for name in untyped.smembers(keys.put)]
            rows.append(
                {
                    "seconds": time.perf_counter() - began,
                    "trajectories": done,
                    "server_rss_mib": memory["used_memory_rss"] / 2**20,
                    "server_used_mib": memory["used_memory"] / 2**20,
                    "stream_kib": (untyped.memory_usage(keys.traj) or 0) / 1024,
                    "ids_kib": sum(untyped.memory_usage(key) or 0 for key in ids) / 1024,
                    "consumer_rss_mib": rss_mib(os.getpid()),
                    "producers_rss_mib": max(rss_mib(p.pid or 0) for p in producers),
                }
            )
            print("soak  " + "  ".join(f"{name} {value:,.1f}" for name, value in rows[-1].items()), flush=True)

        consumer = TrajectoryConsumer(client, keys)
        consumer.acquire()
        held, next_row = list[str](), 0.0
        for number in range(num_groups):
            group = consumer.next_group(60.0 if time.time() < ends else 5.0)
            if group is None:
                assert time.time() > ends, "no group came for a minute"
                break
            held.append(group.close.id)
            if len(held) == COMMIT_GROUPS or number == num_groups - 1:
                consumer.commit(held, outcomes={})
                held.clear()
            if time.perf_counter() - began > next_row:
                next_row += limit_s / 20
                sample((number + 1) * GROUP_SIZE)
        consumer.commit(held, outcomes={})
        for process in producers:
            process.join()
        book = read_ledger(client, keys)
        sample(book.trained)
        assert book.closes, book.table()
        assert (book.superseded, book.waiting) == (0, 0), book.table()
    print(
        f"soak  {book.trained:,} in {rows[-1]['seconds']:,.0f} s: {book.trained / rows[-1]['seconds']:,.0f}/s; the ledger closes"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="per cell")
    parser.add_argument("--tokens", default="1024,4096,16384,65536", help="none leaves the cells out")
    parser.add_argument("--soak", type=int, default=20_000, help="trajectories; 0 leaves it out")
    parser.add_argument("--soak-seconds", type=float, default=480.0, help="the soak ends after these")
    parser.add_argument("--ray", action="store_true", help="also a Ray actor queue (needs ray)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="arl-bench-") as folder:
        server = EmbeddedServer(folder)
        url = server.ensure()
        try:
            print(
                "AOF       tokens     KiB | ours: put/s p50 p99 ms   take/s | raw: put/s p50 p99 ms   take/s | ours/raw put take through"
            )
            for durability, (aof, fsync) in DURABILITY.items() if args.tokens != "none" else ():
                with connect(url) as client:
                    untyped: Any = client
                    untyped.flushall()
                    untyped.config_set("appendonly", aof)
                    untyped.config_set("appendfsync", fsync)
                    while untyped.info("persistence")["aof_rewrite_in_progress"]:
                        time.sleep(0.05)
                for num_tokens in (int(n) for n in args.tokens.split(",")):
                    ours, raw, size = asyncio.run(cell(url, num_tokens, args.seconds))
                    shares = [a / b for a, b in zip(
                        (ours.put_per_s, ours.take_per_s, ours.through_per_s), (raw.put_per_s, raw.take_per_s, raw.through_per_s), strict=True
                    )]  # fmt: skip
                    print(
                        f"{durability:9} {num_tokens:6d} {size / 1024:7.1f} | "
                        + " | ".join(f"{s.put_per_s:9.0f} {s.put_p50_ms:5.2f} {s.put_p99_ms:6.2f} {s.take_per_s:8.0f}" for s in (ours, raw))
                        + " | " + " ".join(f"{100 * s:4.0f} %" for s in shares),
                        flush=True,
                    )  # fmt: skip
                    results.append(
                        {"aof": durability, "tokens": num_tokens, "bytes": size, "ours": asdict(ours), "raw": asdict(raw)}
                    )
            if args.ray:
                rows = compare_with_ray(url, [int(n) for n in args.tokens.split(",")], args.seconds)
                results += [{"ray": row} for row in rows]
            if args.soak:
                with connect(url) as client:
                    client.flushall()
                results += [{"soak": row} for row in soak(url, args.soak, args.soak_seconds)]
        finally:
            server.stop()
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
