"""``agentrl serve``: tasks in, trajectories on the stream, for as long as it is left running.

Waits for: the first policy record (learn announces it), room on the stream (learn makes it by acknowledging), a server that
serves the announced version (the reconciler brings it there). Each wait has a name in ``status/serve.json``.
"""

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import uvloop

from agentrl.assembly.adopted_progress import AdoptedProgress, counted_on
from agentrl.assembly.engines import engines
from agentrl.assembly.failure_budget import FailureBudget
from agentrl.assembly.fleet import FleetOwner
from agentrl.assembly.parts import (
    needs_sandbox,
    release_stream_server,
    run_dir_of,
    run_secret,
    share_sandbox_token,
    stream_url,
)
from agentrl.assembly.rollouts import Stage, rollout_status, stage_of
from agentrl.assembly.run import refuse_if_active
from agentrl.assembly.sandbox import sandbox_process
from agentrl.assembly.serve_on_ray import RayWorkers, cluster
from agentrl.assembly.serve_workers import WorkerProcesses
from agentrl.assembly.servers import SERVERS_TOKEN
from agentrl.assembly.watchdog import ServeProgress, Watchdog
from agentrl.config import Config, dump_config
from agentrl.process import settle_garbage_collector
from agentrl.rollout.worker import RolloutWorker
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.servers_api import serving_servers_api
from agentrl.serving.snapshot_store import SnapshotStore
from agentrl.serving.weight_broadcast import WeightBroadcaster
from agentrl.serving.weight_reconciler import PolicyProblem, WeightReconciler
from agentrl.stream.connection import connect_async
from agentrl.stream.fleet_board import FleetBoard
from agentrl.stream.keys import Keys
from agentrl.stream.policy import read_policy
from agentrl.supervise import running
from agentrl.telemetry.run_dir import RunDir

log = logging.getLogger(__name__)

STATUS_EVERY_S = 1.0
DRAIN_LIMIT_S = 60.0
SNAPSHOT_CACHE = ".full"
"""Below the run's weights: full snapshots put together from deltas."""


def main(config: Config) -> None:
    """Run serve until SIGTERM or Ctrl-C, then drain."""
    directory = run_dir_of(config).create()
    refuse_if_active(directory, ("serve",))
    share_sandbox_token(config, directory)
    if not directory.config.is_file():
        directory.write_config(dump_config(config))
    try:
        uvloop.run(serve(config, directory))
    finally:
        release_stream_server(config, directory)


async def serve(config: Config, directory: RunDir) -> None:
    """Wire the parts and run them until a signal asks to drain."""
    stop = stop_on_signals()
    directory.register("serve")
    try:
        async with _players(config, directory) as players:
            settle_garbage_collector()
            directory.event("serve_ready")
            watchdog = _watch(Watchdog(directory, config))
            status = report_status(directory, "serve", players.status)
            budget = FailureBudget(config.serve.failure_budget_s, events=directory.events).watch(players.status)
            async with running(rollouts=players.run(), status=status, watchdog=watchdog, failure_budget=budget):
                await stop.wait()
                log.info("draining: open groups finish, no new ones start")
                await players.drain(limit_s=DRAIN_LIMIT_S)
    finally:
        directory.event("serve_ended")
        directory.deregister("serve")


def stop_on_signals() -> asyncio.Event:
    """Set by SIGTERM or Ctrl-C."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


class Players(Protocol):
    """Whoever plays the rollouts: this process, or its worker processes."""

    async def run(self) -> None: ...
    async def drain(self, *, limit_s: float) -> None: ...
    def status(self) -> dict[str, Any]: ...


@asynccontextmanager
async def _players(config: Config, directory: RunDir) -> AsyncGenerator[Players]:
    """Engines at the announced policy, and rollouts over them; opened in the order of the data path, closed in reverse."""
    keys, url = Keys(config.run.name), stream_url(config, directory)
    sandbox_url = directory.url_of("sandbox") if config.sandbox.url == "auto" else config.sandbox.url
    async with AsyncExitStack() as stack:
        wanted = needs_sandbox(config) and not sandbox_url
        sandbox_url = sandbox_url or await stack.enter_async_context(sandbox_process(config, directory, wanted=wanted))
        stage = None
        is_alone = config.serve.workers == 1 and config.serve.launcher == "local"
        if is_alone:
            stage = await stack.enter_async_context(stage_of(config, directory, stream=url, sandbox_url=sandbox_url))
        client = connect_async(url, role="serve")
        stack.push_async_callback(client.aclose)
        ray = await stack.enter_async_context(cluster(config)) if config.serve.launcher == "ray" else None
        manager = await stack.enter_async_context(engines(config, directory, model_path=config.model.path, ray=ray))
        owner = FleetOwner(FleetBoard(client, keys), manager) if stage is None else None
        broadcaster = _broadcaster(config, directory)
        reconciler = WeightReconciler(
            manager, read_policy=partial(read_policy, client, keys), mode=config.serve.weight_sync,
            on_update=lambda update: directory.event("weights_updated", **asdict(update)),
            on_problem=lambda problem: _note_problem(directory, problem),
            prepare=SnapshotStore(directory.weights / SNAPSHOT_CACHE).full,
            before_update=owner.announce if owner else None,
            after_drain=owner.settle if owner else None,
            broadcast=await stack.enter_async_context(broadcaster) if broadcaster else None,
        )  # fmt: skip
        servers_api = serving_servers_api(manager, token=run_secret(directory, SERVERS_TOKEN))
        directory.register("serve", url=await stack.enter_async_context(servers_api))
        served = partial(counted_on, reconciler, max_behind=config.learn.max_staleness - config.learn.pipeline_depth)
        if owner is not None:
            await stack.enter_async_context(running(fleet=owner.run(served)))
        await stack.enter_async_context(running(reconciler=reconciler.run()))
        if stage is not None:
            progress = AdoptedProgress(stage.read_progress, served)
            yield _Here(stage.worker(manager, progress, in_flight=config.serve.in_flight), stage, manager, reconciler)
        else:
            where: dict[str, Any] = {
                "stream": url,
                "sandbox_url": sandbox_url,
                "fleet": partial(_fleet_status, manager, reconciler),
            }
            yield RayWorkers(ray, config, directory, **where) if ray else WorkerProcesses(config, directory, **where)


class _Here:
    """Rollouts in this process."""

    def __init__(self, worker: RolloutWorker, stage: Stage, manager: AsyncLLMServerManager, reconciler: WeightReconciler) -> None:
        self._worker, self._stage, self._manager, self._reconciler = worker, stage, manager, reconciler
        self._progress = ServeProgress()

    async def run(self) -> None:
        await self._worker.run()

    async def drain(self, *, limit_s: float) -> None:
        await self._worker.drain(limit_s=limit_s)

    def status(self) -> dict[str, Any]:
        fleet = _fleet_status(self._manager, self._reconciler)
        return {**fleet, **rollout_status(self._worker, self._stage, self._manager, self._progress)}


def _broadcaster(config: Config, directory: RunDir) -> WeightBroadcaster | None:
    serve = config.serve
    if serve.weight_transport == "disk":
        return None
    size = serve.broadcast_bucket_mb << 20
    return WeightBroadcaster(backend=serve.broadcast_backend, bucket_bytes=size, log_dir=directory.logs)


def _note_problem(directory: RunDir, problem: PolicyProblem | None) -> None:
    if problem is None:
        directory.event("policy_served_again")
    else:
        directory.event("policy_not_served", **asdict(problem))


async def _watch(watchdog: Watchdog) -> None:
    while True:
        await asyncio.sleep(watchdog.every_s)
        await asyncio.to_thread(watchdog.look)


async def report_status(directory: RunDir, role: str, status: Callable[[], dict[str, Any]]) -> None:
    """Keep ``status/<role>.json`` true until cancelled."""
    while True:
        directory.write_status(role, status())
        await asyncio.sleep(STATUS_EVERY_S)


def _fleet_status(manager: AsyncLLMServerManager, reconciler: WeightReconciler) -> dict[str, Any]:
    """What the servers do."""
    return {
        "engines": [asdict(server) for server in manager.stats()],
        "policy": {
            "target": reconciler.target.label if reconciler.target else "",
            "rollbacks": reconciler.num_rollbacks,
            "problem": asdict(reconciler.problem) if reconciler.problem else None,
        },
    }
