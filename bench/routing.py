"""Makespan and prefix-cache hits of routing policies over simulated servers, ours and others', on the same episodes.

    python bench/routing.py [--servers 2,8,64] [--load 64,192] [--seeds 3]

A discrete-event simulation. A server shares its speed among its requests: each decodes ``SPEED`` tokens/s until there are more
than ``BATCH``, from where on the total stays. A prompt token that is not in the server's cache costs ``1 / PREFILL`` of a
sampled one. Rollouts come in groups with a common prompt; lengths, turns and tool times are heavy-tailed; all start at once,
``--load`` of them per server: with few the longest rollout decides, with many the work does. Every turn is one request to the
policy.

Bounds: no policy can end before the total work, with a perfect cache, spread evenly over all servers at full speed, nor before
the longest rollout alone on an idle server. Shown against the larger of the two. Cache hits are shown against perfect
stickiness: a group's prompt computed once, every other token never twice.

``ours`` is ``agentrl.serving.routing.choose_server`` with the token costs that the manager accounts. ``verl old`` (up to 0.7): one
heap per agent-loop worker of sessions ever assigned; sticky. ``verl new`` (0.8 on): fewest requests in flight, the first of
equals; sticky, without an escape. ``oracle`` knows every length beforehand and stays where it placed a rollout: where both
bounds are close to each other, sharing a server's speed keeps even that one from them.
"""

import argparse
import heapq
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agentrl.serving.routing import Candidate, choose_server

SPEED = 50.0
BATCH = 32
PREFILL = 20.0
GROUP_SIZE = 8
VERL_WORKERS = 8
EXPECTED_DECAY = 0.02


@dataclass(frozen=True)
class Rollout:
    """One rollout: what it will do, which no policy knows."""

    group: int
    prompt: int
    outputs: tuple[int, ...]
    tools: tuple[tuple[float, int], ...]
    """(seconds, tokens observed) after each turn but the last."""

    @property
    def alone_s(self) -> float:
        """Seconds on an idle server with the prompt in its cache."""
        return sum(self.outputs) / SPEED + sum(s + n / PREFILL / SPEED for s, n in self.tools)


@dataclass
class Server:
    """Processor sharing in virtual time: one unit is one sampled token of every request that runs."""

    clock: float = 0.0
    virtual: float = 0.0
    running: list[tuple[float, int]] = field(default_factory=list)
    """Heap of (virtual end, rollout)."""
    events: int = 0
    tokens: int = 0
    sessions: int = 0

    @property
    def rate(self) -> float:
        return SPEED * min(1.0, BATCH / max(1, len(self.running)))

    def advance(self, now: float) -> None:
        self.virtual += (now - self.clock) * self.rate
        self.clock = now


@dataclass(frozen=True)
class Request:
    """What a policy may know."""

    rollout: int
    group: int
    turn: int
    context: int
    home: int | None
    group_home: int | None
    servers: list[Server]
    rng: random.Random


Policy = Callable[[Request], int]


def rollouts_of(num_rollouts: int, rng: random.Random) -> list[Rollout]:
    made: list[Rollout] = []
    for group in range(num_rollouts // GROUP_SIZE):
        prompt = min(8192, int(rng.lognormvariate(math.log(1200), 0.6)))
        hardness = rng.lognormvariate(0.0, 0.5)  # members of a group are alike
        for _ in range(GROUP_SIZE):
            turns = 1 + min(11, int(rng.expovariate(1 / 3.0)))
            outputs = tuple(max(8, min(4096, int(hardness * rng.lognormvariate(math.log(200), 0.9)))) for _ in range(turns))
            tools = tuple(
                (min(30.0, rng.lognormvariate(0.0, 1.0)), int(rng.lognormvariate(math.log(80), 0.7))) for _ in range(turns - 1)
            )
            made.append(Rollout(group, prompt, outputs, tools))
    return made


@dataclass(frozen=True)
class Outcome:
    makespan_s: float
    work_s: float
    longest_s: float
    hits: float
    """Cached prompt tokens, of those of perfect stickiness."""
    moves: float
    """Share of later turns that left the server of the turn before."""

    @property
    def bound_s(self) -> float:
        return max(self.work_s, self.longest_s)


def simulate(rollouts: list[Rollout], num_servers: int, policy: Policy, rng: random.Random) -> Outcome:
    servers = [Server() for _ in range(num_servers)]
    home: dict[int, int] = {}
    group_home: dict[int, int] = {}
    cached: list[dict[int, int]] = [{} for _ in servers]  # per server: rollout -> its context cached there
    prompts: list[set[int]] = [set() for _ in servers]
    turn = [0] * len(rollouts)
    context = [r.prompt for r in rollouts]
    cost = [0] * len(rollouts)
    expected, hit, moved, later, makespan = 256.0, 0, 0, 0, 0.0
    order = list(range(len(rollouts)))
    # (time, kind, number, event) with kind 0: a turn begins, 1: the server's next end
    queue: list[tuple[float, int, int, int]] = [(0.0, 0, index, 0) for index in order]
    heapq.heapify(queue)

    def schedule(number: int, now: float) -> None:
        server = servers[number]
        server.events += 1
        if server.running:
            ends = now + max(0.0, server.running[0][0] - server.virtual) / server.rate
            heapq.heappush(queue, (ends, 1, number, server.events))

    while queue:
        now, kind, number, event = heapq.heappop(queue)
        if kind == 0:
            rollout = rollouts[number]
            last = home.get(number)
            request = Request(
                number, rollout.group, turn[number], context[number], last, group_home.get(rollout.group), servers, rng
            )
            chosen = policy(request)
            if last is not None:
                later += 1
                moved += chosen != last
            home[number] = chosen
            group_home.setdefault(rollout.group, chosen)
            known = cached[chosen].get(number, rollout.prompt if rollout.group in prompts[chosen] else 0)
            hit += known
            prompts[chosen].add(rollout.group)
            cost[number] = context[number] + max(1, int(expected))
            server = servers[chosen]
            server.advance(now)
            server.tokens += cost[number]
            server.sessions += turn[number] == 0
            work = rollout.outputs[turn[number]] + (context[number] - known) / PREFILL
            heapq.heappush(server.running, (server.virtual + work, number))
            schedule(chosen, now)
        elif event == servers[number].events:
            server = servers[number]
            server.advance(now)
            _, ended = heapq.heappop(server.running)
            server.tokens -= cost[ended]
            schedule(number, now)
            rollout, at = rollouts[ended], turn[ended]
            expected += EXPECTED_DECAY * (rollout.outputs[at] - expected)
            context[ended] += rollout.outputs[at]
            cached[number][ended] = context[ended]
            makespan = max(makespan, now)
            if at + 1 < len(rollout.outputs):
                seconds, observed = rollout.tools[at]
                turn[ended] += 1
                context[ended] += observed
                heapq.heappush(queue, (now + seconds, 0, ended, 0))
    perfect_hits, work = 0, 0.0
    seen: set[int] = set()
    for rollout in rollouts:
        perfect_hits += rollout.prompt if rollout.group in seen else 0
        work += 0 if rollout.group in seen else rollout.prompt / PREFILL
        seen.add(rollout.group)
        length = rollout.prompt
        for at, sampled in enumerate(rollout.outputs):
            length += sampled
            work += sampled
            if at + 1 < len(rollout.outputs):
                perfect_hits += length
                work += rollout.tools[at][1] / PREFILL
                length += rollout.tools[at][1]
    longest = max(r.alone_s for r in rollouts)
    return Outcome(makespan, work / (num_servers * SPEED * BATCH), longest, hit / perfect_hits, moved / max(1, later))


# ---- the policies


def ours(r: Request) -> int:
    candidates = [Candidate(str(i), server.tokens) for i, server in enumerate(r.servers)]
    home = r.group_home if r.home is None else r.home
    chosen = choose_server(candidates, home=None if home is None else str(home), prefix_tokens=r.context, rng=r.rng)
    return int(chosen)


def random_server(r: Request) -> int:
    return r.rng.randrange(len(r.servers))


def make_round_robin() -> Policy:
    count = iter(range(10**12))
    return lambda r: next(count) % len(r.servers)


def fewest(r: Request, numbers: list[int]) -> int:
    least = min(len(r.servers[i].running) for i in numbers)
    return r.rng.choice([i for i in numbers if len(r.servers[i].running) == least])


def least_requests(r: Request) -> int:
    return fewest(r, list(range(len(r.servers))))


def power_of_two(r: Request) -> int:
    return fewest(r, r.rng.sample(range(len(r.servers)), min(2, len(r.servers))))


def verl_new(r: Request) -> int:
    return r.home if r.home is not None else min(range(len(r.servers)), key=lambda i: len(r.servers[i].running))


def make_verl_old(num_servers: int, rng: random.Random) -> Policy:
    """Each worker gets a chunk of the batch and counts only what it assigned itself."""
    heaps = [[[0, place, i] for place, i in enumerate(rng.sample(range(num_servers), num_servers))] for _ in range(VERL_WORKERS)]

    def choose(r: Request) -> int:
        if r.home is not None:
            return r.home
        heap = heaps[r.rollout % VERL_WORKERS]
        entry = heapq.heappop(heap)
        heapq.heappush(heap, [entry[0] + 1, entry[1], entry[2]])
        return entry[2]

    return choose


def make_oracle(rollouts: list[Rollout]) -> Policy:
    """Knows every length: a rollout goes where the least work is left, and stays. What better placement could gain."""
    left: dict[int, float] = {}

    def choose(r: Request) -> int:
        if r.home is not None:
            left[r.home] -= rollouts[r.rollout].outputs[r.turn - 1]
            return r.home
        chosen = min(range(len(r.servers)), key=lambda i: left.get(i, 0.0))
        left[chosen] = left.get(chosen, 0.0) + sum(rollouts[r.rollout].outputs)
        return chosen

    return choose


def policies(num_servers: int, seed: int, rollouts: list[Rollout]) -> dict[str, Policy]:
    return {
        "ours": ours,
        "verl new": verl_new,
        "verl old": make_verl_old(num_servers, random.Random(seed)),
        "least requests": least_requests,
        "power of two": power_of_two,
        "round robin": make_round_robin(),
        "random": random_server,
        "oracle": make_oracle(rollouts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default="2,8,64")
    parser.add_argument("--load", default="64,192", help="rollouts per server")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    cells = [(int(n), int(load)) for load in args.load.split(",") for n in args.servers.split(",")]
    for num_servers, load in cells:
        outcomes: dict[str, list[Outcome]] = {}
        began = time.perf_counter()
        for seed in range(args.seeds):
            rollouts = rollouts_of(num_servers * load, random.Random(f"work {num_servers} {load} {seed}"))
            for name, policy in policies(num_servers, seed, rollouts).items():
                outcome = simulate(rollouts, num_servers, policy, random.Random(seed))
                outcomes.setdefault(name, []).append(outcome)
        work, longest = (statistics.median(getattr(o, what) for o in outcomes["ours"]) for what in ("work_s", "longest_s"))
        print(
            f"{num_servers} servers x {load} rollouts, medians of {args.seeds} seeds; bounds: work {work:.0f} s, "
            f"longest {longest:.0f} s ({time.perf_counter() - began:.0f} s to simulate)"
        )
        for name, rows in outcomes.items():
            ratio = statistics.median(o.makespan_s / o.bound_s for o in rows)
            worst = max(o.makespan_s / o.bound_s for o in rows)
            hits, moves = statistics.median(o.hits for o in rows), statistics.median(o.moves for o in rows)
            print(
                f"  {name:15} makespan {statistics.median(o.makespan_s for o in rows):7.1f} s = {ratio:5.3f} x bound "
                f"(worst {worst:5.3f})   cache hits {100 * hits:5.1f} % of perfect   moves {100 * moves:4.1f} %",
                flush=True,
            )
            results.append(
                {
                    "servers": num_servers,
                    "load": load,
                    "policy": name,
                    "ratio": ratio,
                    "worst": worst,
                    "hits": hits,
                    "moves": moves,
                }
            )
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
