"""A state machine over a real server: producers, learners, checkpoints, crashes and damage in any order.

Whatever happened, once everything is drained: each trajectory is in the surviving checkpoint lineage exactly once, the
ledger closes, and nothing is left on the stream.
"""

import asyncio
import os
import signal
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agentrl.errors import Fenced
from agentrl.stream.consumer import TrajectoryConsumer
from agentrl.stream.keys import GROUP, Keys
from agentrl.stream.ledger import read_books, read_ledger
from agentrl.stream.policy import read_progress_sync
from agentrl.stream.producer import TrajectoryProducer
from agentrl.stream.put_ids import put_name
from agentrl.stream.server import EmbeddedServer, connect, connect_async
from agentrl.testing.stream_doubles import make_close, make_trajectory
from agentrl.types import REQUEUED, Trajectory, TrajectoryGroup, group_id_of

KEYS = Keys("machine")
OUTCOMES = ("trained", "filtered", "stale", REQUEUED)


class StreamMachine(RuleBasedStateMachine):
    server: ClassVar[EmbeddedServer]
    groups = Bundle("groups")

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.client: redis.Redis = connect(self.server.url, role="learn")
        self.client.flushall()
        self.aclient = connect_async(self.server.url, role="serve")
        self.producer = TrajectoryProducer(self.aclient, KEYS, max_items=8)
        self.next_ordinal = self.num_again = 0
        self.open: dict[int, list[Trajectory]] = {}
        self.put: set[str] = set()
        self.late: set[str] = set()
        self.ended: list[Trajectory] = []
        self.saved: dict[str, str] = {}
        self.restart_learner()

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.drain()
        finally:
            self.loop.run_until_complete(self.aclient.aclose())
            self.loop.close()
            self.client.close()

    def go(self, call: Any) -> None:
        self.loop.run_until_complete(asyncio.wait_for(call, 60))

    # -- producer -----------------------------------------------------------------------------------------------------

    def has_room(self) -> bool:
        backlog = self.client.xlen(KEYS.traj) - self.client.xpending(KEYS.traj, GROUP)["pending"]
        return backlog < 8

    @rule(target=groups, size=st.integers(1, 3))
    def open_group(self, size: int) -> int:
        ordinal = self.next_ordinal
        self.next_ordinal += 1
        self.open[ordinal] = [make_trajectory(ordinal, i, num_tokens=12) for i in range(size)]
        return ordinal

    @rule(target=groups, size=st.integers(1, 3))
    def open_again(self, size: int) -> Any:
        """What the learner gave back is sampled again, under ids of its own."""
        waiting = {o: r for o, r in self.loop.run_until_complete(self.producer.requeued()).items() if o not in self.open}
        if not waiting:
            return multiple()
        ordinal, round_ = next(iter(waiting.items()))
        self.num_again += 1
        self.open[ordinal] = []
        for t in (make_trajectory(ordinal, i, num_tokens=12) for i in range(size)):
            group_id = group_id_of(t.task_id, ordinal, round_)
            self.open[ordinal].append(replace(t, id=f"{group_id}/{t.sample_index}/0", group_id=group_id))
        return ordinal

    @precondition(lambda self: self.has_room())
    @rule(ordinal=groups, index=st.integers(0, 2), times=st.integers(1, 2))
    def put_member(self, ordinal: int, index: int, times: int) -> None:
        members = self.open[ordinal]
        member = members[index % len(members)]
        for _ in range(times):
            self.go(self.producer.put_trajectory(member))
        self.put.add(member.id)

    @rule(target=groups, ordinal=consumes(groups), times=st.integers(1, 2))
    def close_group(self, ordinal: int, times: int) -> Any:
        here = [m for m in self.open[ordinal] if m.id in self.put]
        failed = {m.id: "deadline" for m in self.open[ordinal] if m.id not in self.put}
        close = make_close(self.open[ordinal], size=len(self.open[ordinal]))
        close = type(close)(
            group_id=close.group_id, task_id=close.task_id, ordinal=ordinal, size=close.size,
            members=tuple(m.id for m in here), failed=failed,
        )  # fmt: skip
        for _ in range(times):
            self.go(self.producer.close_group(close))
        self.ended += self.open.pop(ordinal)
        return multiple()

    @precondition(lambda self: self.ended)
    @rule(back=st.integers(0, 40), times=st.integers(1, 2))
    def put_after_the_close(self, back: int, times: int) -> None:
        """A retry, or a first put, of a member whose group closed, was committed, or is open for another round."""
        member = self.ended[-1 - back % len(self.ended)]
        for _ in range(times):
            self.go(self.producer.put_trajectory(member))
        if member.id not in self.put:
            self.late.add(member.id)

    # -- learner ------------------------------------------------------------------------------------------------------

    def restart_learner(self, *, zombie: bool = False) -> None:
        """A new process: memory is gone, the checkpoint stays."""
        self.zombie = self.consumer if zombie else None
        self.held: list[TrajectoryGroup] = []
        self.unsaved: dict[str, str] = {}
        self.consumer = TrajectoryConsumer(self.client, KEYS, trained=dict(self.saved))
        self.consumer.acquire()

    @rule(outcome=st.sampled_from(OUTCOMES))
    def train(self, outcome: str) -> None:
        group = self.consumer.next_group(0.0)
        if group is None:
            return
        self.held.append(group)
        for t in group:
            assert t.id not in self.saved, "trained twice in one lineage"
            assert t.id not in self.unsaved
            self.unsaved[t.id] = outcome
        self.unsaved[group.close.id] = ""

    @rule()
    def checkpoint(self) -> None:
        self.saved |= self.unsaved
        self.unsaved = {}

    @rule()
    def commit(self) -> None:
        behind = [g for g in self.held if g.close.id in self.saved]
        outcomes = {t.id: self.saved[t.id] for g in behind for t in g}
        for _ in range(2):
            self.consumer.commit([g.close.id for g in behind], outcomes=outcomes)
        self.held = [g for g in self.held if g not in behind]

    @rule(zombie=st.booleans())
    def kill_learner(self, zombie: bool) -> None:
        self.restart_learner(zombie=zombie)

    @precondition(lambda self: self.zombie is not None)
    @rule()
    def zombie_tries(self) -> None:
        assert self.zombie is not None
        for call in (lambda z: z.next_group(0.0), lambda z: z.report_progress(99)):
            with pytest.raises(Fenced):
                call(self.zombie)

    # -- mishaps ------------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(["L0", "elsewhere"]), count=st.integers(1, 4))
    def lose_a_read(self, name: str, count: int) -> None:
        """Someone read new entries under this name and the reply never arrived."""
        self.client.xreadgroup(GROUP, name, {KEYS.traj: ">"}, count=count)

    @rule()
    def kill_server(self) -> None:
        pid = self.server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        while self.server.is_running():
            time.sleep(0.002)
        self.server.ensure()
        # The machine also reads through this client directly, without the consumer's retries.
        self.client.connection_pool.disconnect()

    # -- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "consumer"):
            return
        ledger = read_ledger(self.client, KEYS)
        assert ledger.closes, ledger.table()
        assert ledger.waiting + sum(v for v in (ledger.trained, ledger.filtered, ledger.stale)) == len(self.put)
        assert ledger.superseded == len(self.late)
        books = read_books(self.client, KEYS)
        assert books.put == {put_name(i) for i in self.put | self.late}

    def groups_to_come(self) -> int:
        progress = read_progress_sync(self.client, KEYS)
        return progress.closed_groups - progress.committed_groups - len(self.held)

    def drain(self) -> None:
        for ordinal in list(self.open):
            while not self.has_room():
                self.train("trained")
            self.close_group(ordinal, 1)
        ends = time.monotonic() + 60
        while (left := self.groups_to_come()) > 0:
            assert time.monotonic() < ends, f"{left} groups that closed are not handed out"
            if (group := self.consumer.next_group(0.05)) is not None:
                self.held.append(group)
                self.unsaved |= {t.id: "trained" for t in group} | {group.close.id: ""}
        self.checkpoint()
        self.commit()
        self.restart_learner()
        assert self.consumer.next_group(0.05) is None
        ledger = read_ledger(self.client, KEYS)
        ends = Counter(outcome for outcome in self.saved.values() if outcome)
        assert set(self.saved) - {i for i, o in self.saved.items() if not o} == self.put
        assert (ledger.trained, ledger.filtered, ledger.stale - ledger.requeued, ledger.requeued) == tuple(
            ends[o] for o in OUTCOMES
        )
        progress = read_progress_sync(self.client, KEYS)
        assert (progress.items, progress.bytes, ledger.waiting) == (0, 0, 0)
        assert progress.closed_groups == progress.committed_groups == self.next_ordinal + self.num_again
        assert self.client.xpending(KEYS.traj, GROUP)["pending"] == 0
        assert ledger.closes


def test_each_trajectory_is_trained_once_whatever_dies() -> None:
    with tempfile.TemporaryDirectory(prefix="arl-") as directory:
        StreamMachine.server = EmbeddedServer(Path(directory))
        StreamMachine.server.ensure()
        try:
            run_state_machine_as_test(
                StreamMachine,
                settings=settings(
                    max_examples=25,
                    stateful_step_count=30,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                    derandomize=True,
                ),
            )
        finally:
            StreamMachine.server.stop()
