"""Groups and the worker: siblings fail alone, admission follows the stream, restarts repeat nothing."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from rollout_kit import MemoryStream, tiny_trajectory

from agentrl.errors import GenerationError, RewardError, RolloutError, ToolInfraError
from agentrl.rollout import worker as worker_module
from agentrl.rollout.group import GroupPlan, run_group
from agentrl.rollout.worker import RolloutWorker
from agentrl.supervise import current_waits, running
from agentrl.testing.clock import pass_time
from agentrl.testing.waits import until
from agentrl.types import GroupClose, Task, Trajectory

Play = Callable[[int, int, int], Awaitable[None]]
"""(ordinal, sample, attempt): returns for success, raises for failure."""


def task_at(ordinal: int) -> Task:
    return Task(id=f"t{ordinal}", prompt=[], data_source="d")


def rollout_of(play: Play) -> Any:
    async def rollout(
        task: Task, trajectory_id: str, group_id: str, ordinal: int, sample: int, attempt: int
    ) -> tuple[Trajectory, None]:
        await play(ordinal, sample, attempt)
        return tiny_trajectory(task, trajectory_id, ordinal, sample, attempt), None

    return rollout


async def succeed(ordinal: int, sample: int, attempt: int) -> None:
    await asyncio.sleep(0)


async def group(play: Play, stream: MemoryStream, *, plan: GroupPlan | None = None, **more: Any) -> GroupClose:
    permits = more.pop("permits", asyncio.Semaphore(16))
    plan = plan or GroupPlan(size=4)
    return await run_group(task_at(0), 0, plan=plan, rollout=rollout_of(play), sink=stream, permits=permits, **more)


@pytest.mark.asyncio
async def test_each_trajectory_is_put_as_it_finishes_and_the_close_comes_last() -> None:
    stream = MemoryStream()

    async def play(ordinal: int, sample: int, attempt: int) -> None:
        await until(lambda: len(stream.trajectories) == 3 - sample)

    close = await group(play, stream)
    assert stream.events == ["t0/0/3/0", "t0/0/2/0", "t0/0/1/0", "t0/0/0/0", "t0/0/close"]
    assert (close.size, close.failed) == (4, {})


@pytest.mark.asyncio
async def test_members_fail_alone_with_their_kind_and_infrastructure_is_tried_again() -> None:
    attempts: list[tuple[int, int]] = []

    async def play(ordinal: int, sample: int, attempt: int) -> None:
        attempts.append((sample, attempt))
        if sample == 0:
            raise RewardError("scorer broke")  # would break again
        if sample == 1 and attempt == 0:
            raise GenerationError("server died")
        if sample == 2:
            raise ToolInfraError("still down")

    close = await group(play, MemoryStream())
    assert sorted(close.members) == ["t0/0/1/1", "t0/0/3/0"]
    assert close.failed == {"t0/0/0/0": "reward", "t0/0/2/1": "tool_infra"}
    assert sorted(attempts) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]


@pytest.mark.asyncio
async def test_the_greedy_rollouts_reward_is_in_the_close_and_the_rollout_nowhere_else() -> None:
    asked: list[tuple[int, int]] = []

    async def greedy(ordinal: int, sample: int, attempt: int) -> None:
        asked.append((sample, attempt))
        if attempt == 0:
            raise GenerationError("server died")

    stream = MemoryStream()
    close = await group(succeed, stream, baseline=rollout_of(greedy))
    assert asked == [(4, 0), (4, 1)]
    assert close.baseline == tiny_trajectory(task_at(0), "t0/0/4/1", 0, 4, 1).reward
    assert (close.size, len(close.members), close.failed) == (4, 4, {})
    assert "t0/0/4/1" not in stream.events


@pytest.mark.asyncio
async def test_a_greedy_rollout_that_fails_leaves_the_group_without_a_baseline_and_the_ledger_as_it_is() -> None:
    async def greedy(ordinal: int, sample: int, attempt: int) -> None:
        raise RewardError("scorer broke")

    close = await group(succeed, MemoryStream(), baseline=rollout_of(greedy))
    assert (close.baseline, close.failed, len(close.members)) == (None, {}, 4)


@pytest.mark.asyncio
async def test_the_groups_deadline_closes_it_without_the_stragglers() -> None:
    stream = MemoryStream()

    async def play(ordinal: int, sample: int, attempt: int) -> None:
        if sample == 2:
            await until(lambda: len(stream.trajectories) == 3)
            pass_time(200)
            await asyncio.sleep(3600)

    close = await group(play, stream, plan=GroupPlan(size=4, timeout_s=200))
    assert close.failed == {"t0/0/2/0": "group_deadline"}
    assert len(close.members) == 3


@pytest.mark.asyncio
async def test_the_groups_deadline_does_not_cut_a_finished_member_that_waits_for_the_stream() -> None:
    stream = MemoryStream()
    stream.room.clear()
    async with asyncio.TaskGroup() as tasks:
        closing = tasks.create_task(group(succeed, stream, plan=GroupPlan(size=2, timeout_s=200)))
        await until(lambda: "stream" in current_waits() and current_waits()["stream"].count == 2)
        pass_time(200)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not closing.done()
        stream.room.set()
    assert len(closing.result().members) == 2


@pytest.mark.asyncio
async def test_below_the_quorum_nothing_is_put_and_every_member_is_accounted_for() -> None:
    async def play(ordinal: int, sample: int, attempt: int) -> None:
        if sample > 1:
            raise RewardError("no")

    stream = MemoryStream()
    close = await group(play, stream, plan=GroupPlan(size=4, min_group=3))
    assert (close.members, stream.trajectories) == ((), {})
    assert sorted(close.failed.values()) == ["quorum", "quorum", "reward", "reward"]
    reached = await group(play, MemoryStream(), plan=GroupPlan(size=4, min_group=2))
    assert len(reached.members) == 2


@pytest.mark.asyncio
async def test_members_on_the_stream_are_not_rolled_out_again() -> None:
    played: list[int] = []

    async def play(ordinal: int, sample: int, attempt: int) -> None:
        played.append(sample)

    stream = MemoryStream()
    for sample, attempt in ((1, 0), (3, 1)):
        put = tiny_trajectory(task_at(0), f"t0/0/{sample}/{attempt}", 0, sample, attempt)
        await stream.put_trajectory(put)
    close = await group(play, stream, already=set(stream.trajectories))
    assert sorted(played) == [0, 2]
    assert sorted(close.members) == ["t0/0/0/0", "t0/0/1/0", "t0/0/2/0", "t0/0/3/1"]


@pytest.mark.asyncio
async def test_permits_come_back_after_success_failure_and_cancellation() -> None:
    permits = asyncio.Semaphore(2)

    async def play(ordinal: int, sample: int, attempt: int) -> None:
        if sample == 0:
            raise RewardError("no")
        await asyncio.sleep(0)

    await group(play, MemoryStream(), permits=permits)
    started = asyncio.create_task(group(lambda *_: asyncio.sleep(30), MemoryStream(), permits=permits))
    await asyncio.sleep(0.02)
    assert permits.locked()
    started.cancel()
    with pytest.raises(asyncio.CancelledError):
        await started
    await asyncio.sleep(0)
    for _ in range(2):
        await asyncio.wait_for(permits.acquire(), 60)


@pytest.mark.asyncio
async def test_an_unexpected_error_stops_the_group_because_it_is_a_bug() -> None:
    async def play(ordinal: int, sample: int, attempt: int) -> None:
        raise KeyError("bug")

    with pytest.raises(BaseExceptionGroup) as caught:
        await group(play, MemoryStream())
    assert caught.value.subgroup(KeyError) is not None


# The worker


def make_worker(stream: MemoryStream, play: Play = succeed, **settings: Any) -> RolloutWorker:
    defaults: dict[str, Any] = {
        "group_size": 2, "groups_per_step": 2, "max_staleness": 1, "pipeline_depth": 4, "in_flight": 8, "poll_s": 0.005,
    }  # fmt: skip
    return RolloutWorker(
        task_at=task_at,
        sink=stream,
        read_progress=stream.read_progress,
        rollout=rollout_of(play),
        **{**defaults, **settings},
    )


@pytest.mark.asyncio
async def test_generation_runs_ahead_by_the_bound_and_then_waits_for_the_trainer() -> None:
    stream = MemoryStream()
    worker = make_worker(stream)
    async with running(worker=worker.run()):
        await until(lambda: len(stream.closes) == 4)  # (min(1, 4) + 1) * 2
        await until(lambda: worker.waits()["reason"] == "trainer")
        await asyncio.sleep(0.05)
        assert len(stream.closes) == 4
        assert "trainer" in current_waits()
        stream.progress.consumed_groups = 2
        await until(lambda: len(stream.closes) == 6)
    status = worker.status()
    assert (status["finished"], status["groups_closed"], status["tokens_sampled"], status["open_groups"]) == (12, 6, 24, 0)
    assert current_waits() == {}


@pytest.mark.asyncio
async def test_no_more_rollouts_run_than_permitted_and_the_permits_are_kept_busy() -> None:
    now, most = 0, 0

    async def play(ordinal: int, sample: int, attempt: int) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.002)
        now -= 1

    stream = MemoryStream()
    await make_worker(stream, play, in_flight=5, max_staleness=50, pipeline_depth=50, last_ordinal=20).run()
    assert (most, len(stream.closes), len(stream.trajectories)) == (5, 20, 40)


@pytest.mark.asyncio
async def test_a_full_stream_stops_admission() -> None:
    stream = MemoryStream()
    stream.room.clear()
    started: list[int] = []

    async def play(ordinal: int, sample: int, attempt: int) -> None:
        started.append(ordinal)

    worker = make_worker(stream, play, in_flight=3, max_staleness=50, pipeline_depth=50, last_ordinal=10)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.run())
        await until(lambda: current_waits().get("stream") is not None and current_waits()["stream"].count == 3)
        await asyncio.sleep(0.03)
        assert len(started) == 3
        stream.room.set()
    assert len(stream.trajectories) == 20


@pytest.mark.asyncio
async def test_a_restart_begins_at_the_lowest_open_group_and_repeats_nothing() -> None:
    stream = MemoryStream()
    played: list[tuple[int, int]] = []

    async def play(ordinal: int, sample: int, attempt: int) -> None:
        played.append((ordinal, sample))

    for ordinal in (0, 1, 3):  # 2 was open when the first worker died; one of its members had been put
        for sample in range(2):
            await stream.put_trajectory(tiny_trajectory(task_at(ordinal), f"t{ordinal}/{ordinal}/{sample}/0", ordinal, sample, 0))
        members = tuple(f"t{ordinal}/{ordinal}/{s}/0" for s in range(2))
        await stream.close_group(
            GroupClose(group_id=f"t{ordinal}/{ordinal}", task_id=f"t{ordinal}", ordinal=ordinal, size=2, members=members)
        )
    await stream.put_trajectory(tiny_trajectory(task_at(2), "t2/2/1/0", 2, 1, 0))
    await make_worker(stream, play, max_staleness=9, pipeline_depth=9, last_ordinal=6).run()
    assert sorted(played) == [(2, 0), (4, 0), (4, 1), (5, 0), (5, 1)]
    assert sorted(stream.closes) == list(range(6))
    assert len(stream.trajectories) == 12


@pytest.mark.asyncio
async def test_killed_at_any_moment_and_restarted_every_group_closes_once() -> None:
    rng = random.Random(7)
    stream = MemoryStream()

    async def play(ordinal: int, sample: int, attempt: int) -> None:
        await asyncio.sleep(rng.random() * 0.01)
        if rng.random() < 0.1:
            raise GenerationError("died")

    for _ in range(15):
        run = asyncio.create_task(make_worker(stream, play, max_staleness=50, pipeline_depth=50, last_ordinal=30).run())
        await asyncio.sleep(rng.random() * 0.03)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
    await make_worker(stream, play, max_staleness=50, pipeline_depth=50, last_ordinal=30).run()
    assert sorted(stream.closes) == list(range(30))  # MemoryStream refuses second closes and unknown members
    in_groups = [m for c in stream.closes.values() for m in c.members]
    assert sorted(in_groups) == sorted(stream.trajectories)
    assert sum(len(c.members) + len(c.failed) for c in stream.closes.values()) == 60


@pytest.mark.asyncio
async def test_drain_lets_open_groups_finish_and_starts_no_others() -> None:
    stream = MemoryStream()
    worker = make_worker(stream, lambda *_: asyncio.sleep(0.05), max_staleness=50, pipeline_depth=50)
    async with running(worker=worker.run()):
        await until(lambda: worker.status()["running_rollouts"] == 8)
        await worker.drain(limit_s=200)
        assert sorted(stream.closes) == [0, 1, 2, 3]
        assert worker.status()["draining"]


@pytest.mark.asyncio
async def test_drain_cuts_what_does_not_finish_and_leaves_it_open_for_the_next_start() -> None:
    stream = MemoryStream()

    async def play(ordinal: int, sample: int, attempt: int) -> None:
        await asyncio.sleep(3600 if sample == 1 else 0)

    worker = make_worker(stream, play, max_staleness=50, pipeline_depth=50, in_flight=4)
    async with running(worker=worker.run()):
        await until(lambda: worker.status()["finished"] >= 2)
        draining = asyncio.create_task(worker.drain(limit_s=200))
        await until(lambda: worker.status()["draining"])
        pass_time(200)
        await draining
    assert stream.closes == {}
    before = dict(stream.trajectories)
    await make_worker(stream, max_staleness=50, pipeline_depth=50, last_ordinal=2).run()
    assert sorted(stream.closes) == [0, 1]
    assert before.items() <= stream.trajectories.items()


@pytest.mark.asyncio
async def test_a_pause_reason_stops_new_groups_and_is_shown() -> None:
    reasons: list[str | None] = ["tool:code"]
    stream = MemoryStream()
    worker = make_worker(stream, paused=lambda: reasons[0])
    async with running(worker=worker.run()):
        await until(lambda: worker.waits()["reason"] == "tool:code")
        assert stream.closes == {}
        reasons[0] = None
        await until(lambda: len(stream.closes) == 4)


@pytest.mark.asyncio
async def test_a_wave_of_failures_pauses_instead_of_burning_through_the_tasks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_module, "FAILURE_COOLDOWN_S", 0.05)
    failures: list[tuple[str, str]] = []
    is_down = True

    async def play(ordinal: int, sample: int, attempt: int) -> None:
        if is_down:
            raise GenerationError("no server")

    def on_failure(trajectory_id: str, error: RolloutError) -> None:
        failures.append((trajectory_id, error.kind))

    stream = MemoryStream()
    worker = make_worker(stream, play, max_staleness=500, pipeline_depth=500, in_flight=4, on_failure=on_failure)
    async with running(worker=worker.run()):
        await until(lambda: worker.waits()["reason"] == "failing:generation")
        lost = len(stream.closes)
        assert lost < 10
        assert "no server" in caplog.text
        assert "single groups probe" in caplog.text
        is_down = False
        await until(lambda: len(stream.closes) > lost + 5)
    assert worker.status()["failed"]["generation"] == sum(not c.members for c in stream.closes.values()) * 2
    assert failures[0][1] == "generation"


@pytest.mark.asyncio
async def test_listeners_hear_of_a_trajectory_before_it_is_on_the_stream() -> None:
    stream = MemoryStream()
    heard: list[tuple[str, bool]] = []

    def on_trajectory(trajectory: Trajectory, episode: object) -> None:
        heard.append((trajectory.id, trajectory.id in stream.trajectories))

    await make_worker(stream, on_trajectory=on_trajectory, last_ordinal=1).run()
    assert sorted(heard) == [("t0/0/0/0", False), ("t0/0/1/0", False)]


@pytest.mark.asyncio
async def test_a_bug_in_a_rollout_stops_the_worker_with_its_error() -> None:
    async def play(ordinal: int, sample: int, attempt: int) -> None:
        raise KeyError("bug")

    worker = make_worker(MemoryStream(), play)
    with pytest.raises(BaseExceptionGroup) as caught:
        async with running(worker=worker.run()):
            await asyncio.sleep(200)
    assert caught.value.subgroup(KeyError) is not None
