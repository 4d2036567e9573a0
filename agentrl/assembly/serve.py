"""``agentrl serve``: tasks in, trajectories on the stream, for as long as it is left running.

Waits for: the first policy record (learn announces it), room on the stream (learn makes it by acknowledging), a server that
serves the announced version (the reconciler brings it there). Each wait has a name in ``status/serve.json``.
"""

import asyncio
import logging
import signal
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import redis.asyncio
import uvloop

from agentrl.assembly.adopted_progress import AdoptedProgress, counted_on
from agentrl.assembly.agents import agent_host
from agentrl.assembly.fleet import FleetOwner
from agentrl.assembly.parts import (
    build_parser,
    build_scorer,
    build_template,
    build_toolbox,
    env_name,
    fingerprint,
    load_tasks,
    load_tokenizer,
    needs_sandbox,
    release_stream_server,
    run_dir_of,
    run_secret,
    share_sandbox_token,
    stream_url,
    vocab_size_of,
)
from agentrl.assembly.run import refuse_if_active
from agentrl.assembly.sandbox import sandbox_process
from agentrl.assembly.serve_on_ray import RayEngines, RayWorkers, cluster
from agentrl.assembly.serve_workers import WorkerProcesses
from agentrl.assembly.servers import SERVERS_TOKEN
from agentrl.assembly.watchdog import ServeProgress, Watchdog, waits_now
from agentrl.config import Config, dump_config
from agentrl.data.task_source import TaskSource
from agentrl.process import settle_garbage_collector
from agentrl.protocols import Generator
from agentrl.rollout.agent_loop import AgentHost, Limits, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.context import ContextPolicy
from agentrl.rollout.group import RolloutFunction
from agentrl.rollout.partial import PartialRollouts
from agentrl.rollout.partial_sink import PartialSink
from agentrl.rollout.proxy.host import ProxyHost
from agentrl.rollout.reward import Scorer
from agentrl.rollout.toolbox import Toolbox
from agentrl.rollout.worker import RolloutWorker
from agentrl.serving.engine_process import (
    AttachedServers,
    EmbeddedEngineSpec,
    EngineFleet,
    ProcessEntry,
    SGLangEngineSpec,
    kill_stale,
)
from agentrl.serving.load_policy import ConcurrencyPolicy
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.servers_api import serving_servers_api
from agentrl.serving.snapshot_store import SnapshotStore
from agentrl.serving.weight_broadcast import WeightBroadcaster
from agentrl.serving.weight_reconciler import PolicyProblem, WeightReconciler
from agentrl.stream.connection import check_server, connect, connect_async
from agentrl.stream.fingerprint import check_fingerprint
from agentrl.stream.fleet_board import FleetBoard
from agentrl.stream.keys import Keys
from agentrl.stream.leases import TaskLeases
from agentrl.stream.partials import RedisPartials
from agentrl.stream.policy import Progress, read_policy, read_progress
from agentrl.stream.producer import TrajectoryProducer
from agentrl.supervise import running
from agentrl.telemetry.run_dir import RunDir
from agentrl.telemetry.trajectory_log import TrajectoryLog
from agentrl.types import Episode, SamplingParams, Task, Trajectory

log = logging.getLogger(__name__)

ENGINE_ROLE = "engine-"
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
        directory.config.write_text(dump_config(config))
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
            async with running(rollouts=players.run(), status=status, watchdog=watchdog):
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


@dataclass
class Stage:
    """What rollouts need beside servers, opened."""

    config: Config
    directory: RunDir
    keys: Keys
    client: redis.asyncio.Redis
    tasks: TaskSource
    toolbox: Toolbox
    template: ChatTemplate
    scorer: Scorer
    trajectory_log: TrajectoryLog | None
    host: ProxyHost | None
    """Where black-box agents play, when a command for them is configured."""
    partials: PartialRollouts | None
    meter: "_TokenMeter"

    async def read_progress(self) -> Progress:
        return await read_progress(self.client, self.keys)

    def worker(
        self,
        manager: AsyncLLMServerManager,
        progress: "AdoptedProgress",
        *,
        in_flight: int,
        leases: TaskLeases | None = None,
    ) -> RolloutWorker:
        """The worker over these servers; with ``leases`` one of several."""
        config, parts = self.config, (self.template, self.toolbox, self.scorer)
        producer = TrajectoryProducer(self.client, self.keys, max_items=config.max_items, max_bytes=config.queue.max_bytes)
        return RolloutWorker(
            task_at=self.tasks.task,
            sink=producer if self.partials is None else PartialSink(producer, self.partials, attempts=config.serve.attempts),
            read_progress=progress,
            rollout=rollout_function(config, manager, *parts, host=self.host, partials=self.partials),
            baseline=greedy_rollout_function(config, manager, *parts) if config.learn.needs_greedy_baseline else None,
            group_size=config.serve.n,
            groups_per_step=config.learn.groups,
            max_staleness=config.learn.max_staleness,
            pipeline_depth=config.learn.pipeline_depth,
            in_flight=in_flight,
            min_group=config.serve.min_group,
            group_timeout_s=config.serve.group_timeout_s,
            attempts=config.serve.attempts,
            on_trajectory=self._on_trajectory,
            on_failure=lambda rollout_id, error: self.directory.event(
                "rollout_failed", id=rollout_id, kind=error.kind, error=str(error)
            ),
            paused=self.toolbox.blocked,
            requeued=producer.requeued,
            leases=leases,
        )

    def _on_trajectory(self, trajectory: Trajectory, episode: Episode | None) -> None:
        self.meter.add(trajectory.num_sampled)
        if self.trajectory_log is not None:
            self.trajectory_log.write(trajectory, episode)


@asynccontextmanager
async def stage_of(
    config: Config, directory: RunDir, *, stream: str, sandbox_url: str | None, log_name: str = "rollouts"
) -> AsyncGenerator[Stage]:
    """Load tasks, tools, template and scorer, check them against the learner's, and open the stream."""
    tasks = TaskSource(load_tasks(config.data.train, what="data.train"), seed=config.run.seed, shuffle=config.data.shuffle)
    tokenizer, keys = load_tokenizer(config), Keys(config.run.name)
    toolbox = build_toolbox(config, tokenizer, sandbox_url=sandbox_url)
    template = build_template(config, tokenizer, toolbox)
    scorer = build_scorer(config)
    with connect(stream, role="serve") as checking:
        server = check_server(checking)
        check_fingerprint(checking, keys, "serve", fingerprint(config, tokenizer, toolbox.schemas()))
    log.info("stream server=%s %s durability=%s", server.name, server.version, server.persistence)
    client = connect_async(stream, role="serve")
    trajectory_log = TrajectoryLog(directory.trajectories, name=log_name) if config.log.trajectories == "all" else None
    try:
        async with agent_host(config) as host:
            yield Stage(
                config=config,
                directory=directory,
                keys=keys,
                client=client,
                tasks=tasks,
                toolbox=toolbox,
                template=template,
                scorer=scorer,
                trajectory_log=trajectory_log,
                host=host,
                partials=PartialRollouts(RedisPartials(client, keys)) if config.serve.resume_partial else None,
                meter=_TokenMeter(),
            )
    finally:
        if trajectory_log is not None:
            trajectory_log.close()
        await toolbox.aclose()
        await client.aclose()


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


def rollout_function(
    config: Config,
    manager: Generator,
    template: ChatTemplate,
    toolbox: Toolbox,
    scorer: Scorer,
    *,
    sampling: SamplingParams | None = None,
    require_versions: bool = True,
    host: AgentHost | None = None,
    partials: PartialRollouts | None = None,
) -> RolloutFunction:
    """One rollout with everything but the task bound."""
    parser = build_parser(config, template)
    limits = Limits(
        max_turns=config.serve.turns,
        max_tokens=config.serve.tokens,
        max_tokens_per_turn=config.serve.tokens_per_turn,
        max_tool_tokens=config.serve.tool_tokens,
        max_calls_per_turn=config.serve.calls_per_turn,
        max_invalid_calls=config.serve.invalid_calls,
        max_reply_tokens=config.serve.reply_tokens,
        turn_timeout_s=config.serve.turn_timeout_s,
        env_timeout_s=config.serve.env_timeout_s,
        rollout_timeout_s=config.serve.rollout_timeout_s,
        context=_context_policy(config),
    )
    sampling = sampling or SamplingParams(
        max_new_tokens=config.serve.tokens_per_turn,
        temperature=config.serve.temperature,
        top_p=config.serve.top_p,
        top_k=config.serve.top_k,
    )

    async def rollout(
        task: Task, trajectory_id: str, group_id: str, ordinal: int, sample_index: int, attempt: int
    ) -> tuple[Trajectory, Episode | None]:
        return await run_rollout(
            task,
            loop=task.agent or config.serve.agent,
            template=template,
            generator=manager,
            toolbox=toolbox,
            scorer=scorer,
            limits=limits,
            sampling=sampling,
            trajectory_id=trajectory_id,
            group_id=group_id,
            ordinal=ordinal,
            sample_index=sample_index,
            attempt=attempt,
            env_name=env_name(config),
            parser=parser,
            require_versions=require_versions,
            host=host,
            partials=partials,
        )

    return rollout


def greedy_rollout_function(
    config: Config, manager: AsyncLLMServerManager, template: ChatTemplate, toolbox: Toolbox, scorer: Scorer
) -> RolloutFunction:
    """The same rollout without chance: what remax compares a sampled one with."""
    greedy = SamplingParams(max_new_tokens=config.serve.tokens_per_turn, temperature=0.0)
    return rollout_function(config, manager, template, toolbox, scorer, sampling=greedy)


def _context_policy(config: Config) -> ContextPolicy | None:
    context = config.serve.context
    if context is None:
        return None
    to_tokens = context.to_tokens or max(1, context.at_tokens // 2)
    return ContextPolicy(at_tokens=context.at_tokens, to_tokens=to_tokens, keep=context.keep)


@asynccontextmanager
async def engines(
    config: Config, directory: RunDir, *, model_path: str, ray: Any = None
) -> AsyncGenerator[AsyncLLMServerManager]:
    """The manager over running servers: attached ones, or engine processes that are started, watched and stopped here.

    Args:
        ray: the module, connected: then engines are placed on the cluster.
    """
    left_behind = [e for e in directory.recorded_processes() if e["role"].startswith(ENGINE_ROLE)]
    await asyncio.to_thread(kill_stale, [{"role": "engine", "pid": e["pid"], "started": e["created"]} for e in left_behind])
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        concurrency = config.serve.concurrency
        manager = AsyncLLMServerManager(
            session=session,
            seed=config.run.seed,
            vocab_size=vocab_size_of(model_path),
            max_requests_per_server=concurrency if isinstance(concurrency, int) else None,
            concurrency=ConcurrencyPolicy() if concurrency == "auto" else None,
        )
        async with manager:
            fleet = _fleet(config, directory, manager, model_path, ray)
            async with running(health=manager.run(), fleet=fleet.run()):
                yield manager


def _fleet(
    config: Config, directory: RunDir, manager: AsyncLLMServerManager, model_path: str, ray: Any
) -> EngineFleet | AttachedServers | RayEngines:
    def record(processes: Sequence[ProcessEntry]) -> None:
        entries = [{"role": Path(p["log"]).stem, "pid": p["pid"], "url": p["url"]} for p in processes if p["pid"] is not None]
        directory.update_processes(drop_prefix=ENGINE_ROLE, add=entries)

    serve = config.serve
    if serve.urls:
        return AttachedServers(serve.urls, manager=manager, api_key=serve.api_key, admin_key=serve.admin_key)
    spec = _engine_spec(config, directory, model_path)
    if ray is not None:
        return RayEngines(ray, config, [spec] * serve.replicas, manager=manager, directory=directory, on_change=record)
    return EngineFleet(
        [spec] * serve.replicas, manager=manager, log_dir=directory.logs, omp_threads=serve.engine_threads, on_change=record
    )


def _engine_spec(config: Config, directory: RunDir, model_path: str) -> EmbeddedEngineSpec | SGLangEngineSpec:
    serve = config.serve
    if serve.engine == "sglang":
        return SGLangEngineSpec(
            model_path=model_path, command_prefix=serve.sglang_command, extra_args=serve.sglang_args, api_key=serve.api_key
        )
    return EmbeddedEngineSpec(
        model_path=model_path,
        device=None if serve.device == "auto" else serve.device,
        dtype=config.model.dtype,
        max_running_requests=serve.engine_requests,
        api_key=serve.api_key or (run_secret(directory, "engine_key") if serve.engine_auth else None),
        extra_args=[
            "--num-blocks",
            str(serve.engine_blocks),
            "--seed",
            str(config.run.seed),
            "--weights-root",
            str(directory.root.absolute()),
        ],
    )


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


def rollout_status(
    worker: RolloutWorker, stage: Stage, manager: AsyncLLMServerManager, progress: ServeProgress
) -> dict[str, Any]:
    """What the rollouts of this process do and wait for."""
    status, waits, tools = worker.status(), waits_now(), stage.toolbox.stats()
    answered = sum(int(t["calls"] - t["infra_errors"] - t["timeouts"]) for t in tools.values())
    tokens = sum(server.tokens_served for server in manager.stats())
    return {
        **status,
        **progress.fields(finished=int(status["finished"]), tokens=tokens, calls=answered),
        "wait": next(iter(waits), ""),
        "waits": waits,
        "tokens_per_s": round(stage.meter.rate(), 1),
        "requests": {**manager.counters(), "parked": manager.num_parked()},
        "tools": tools,
        "agents": stage.host.stats() if stage.host is not None else {},
        "partials": stage.partials.stats() if stage.partials is not None else {},
    }


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


@dataclass
class _TokenMeter:
    """Sampled tokens per second over the last half minute."""

    window_s: float = 30.0

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int]] = []

    def add(self, tokens: int) -> None:
        self._events.append((time.monotonic(), tokens))

    def rate(self) -> float:
        now = time.monotonic()
        self._events = [e for e in self._events if now - e[0] < self.window_s]
        return sum(n for _, n in self._events) / max(1.0, now - self._events[0][0]) if self._events else 0.0
