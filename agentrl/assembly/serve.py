"""``agentrl serve``: tasks in, trajectories on the stream, for as long as it is left running.

Waits for: the first policy record (learn announces it), room on the stream (learn makes it by acknowledging), a server that
serves the announced version (the reconciler brings it there). Each wait has a name in ``status/serve.json``.
"""

import asyncio
import logging
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from agentrl.assembly.parts import (
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
from agentrl.assembly.watchdog import ServeProgress, Watchdog, waits_now
from agentrl.config import Config, dump_config
from agentrl.data.task_source import TaskSource
from agentrl.process import settle_garbage_collector
from agentrl.rollout.agent_loop import Limits, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.group import RolloutFunction
from agentrl.rollout.reward import Scorer
from agentrl.rollout.toolbox import Toolbox
from agentrl.rollout.worker import RolloutWorker
from agentrl.serving.engine_process import (
    AttachedServers,
    EmbeddedEngineSpec,
    EngineFleet,
    EngineSpec,
    ProcessEntry,
    SGLangEngineSpec,
    kill_stale,
)
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.weight_reconciler import WeightReconciler
from agentrl.stream.connection import check_server, connect, connect_async
from agentrl.stream.fingerprint import check_fingerprint
from agentrl.stream.keys import Keys
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
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    directory.register("serve")
    try:
        async with _rollouts(config, directory) as (worker, status):
            settle_garbage_collector()
            directory.event("serve_ready")
            watchdog = _watch(Watchdog(directory, config))
            async with running(worker=worker.run(), status=_report(directory, status), watchdog=watchdog):
                await stop.wait()
                log.info("draining: open groups finish, no new ones start")
                await worker.drain(limit_s=DRAIN_LIMIT_S)
    finally:
        directory.event("serve_ended")
        directory.deregister("serve")


@asynccontextmanager
async def _rollouts(config: Config, directory: RunDir) -> AsyncGenerator[tuple[RolloutWorker, Callable[[], dict[str, Any]]]]:
    """Everything a rollout needs, opened in the order of the data path and closed in reverse."""
    tasks = TaskSource(load_tasks(config.data.train, what="data.train"), seed=config.run.seed, shuffle=config.data.shuffle)
    tokenizer = load_tokenizer(config)
    keys = Keys(config.run.name)
    url = stream_url(config, directory)
    sandbox_url = directory.url_of("sandbox") if config.sandbox.url == "auto" else config.sandbox.url
    async with sandbox_process(config, directory, wanted=needs_sandbox(config) and not sandbox_url) as started_url:
        toolbox = build_toolbox(config, tokenizer, sandbox_url=sandbox_url or started_url)
        template = build_template(config, tokenizer, toolbox)
        scorer = build_scorer(config)
        with connect(url, role="serve") as checking:
            server = check_server(checking)
            check_fingerprint(checking, keys, "serve", fingerprint(config, tokenizer, toolbox.schemas()))
        log.info("stream server=%s %s durability=%s", server.name, server.version, server.persistence)
        client = connect_async(url, role="serve")
        trajectory_log = TrajectoryLog(directory.trajectories) if config.log.trajectories == "all" else None
        try:
            async with engines(config, directory, model_path=config.model.path) as manager:
                producer = TrajectoryProducer(client, keys, max_items=config.max_items, max_bytes=config.queue.max_bytes)
                reconciler = WeightReconciler(
                    manager, read_policy=partial(read_policy, client, keys), mode=config.serve.weight_sync,
                    on_update=lambda update: directory.event("weights_updated", **asdict(update)),
                )  # fmt: skip
                meter, progress = _TokenMeter(), ServeProgress()

                def on_trajectory(trajectory: Trajectory, episode: Episode | None) -> None:
                    meter.add(trajectory.num_sampled)
                    if trajectory_log is not None:
                        trajectory_log.write(trajectory, episode)

                worker = RolloutWorker(
                    task_at=tasks.task,
                    sink=producer,
                    read_progress=_AdoptedProgress(partial(read_progress, client, keys), reconciler),
                    rollout=rollout_function(config, manager, template, toolbox, scorer),
                    group_size=config.serve.n,
                    groups_per_step=config.learn.groups,
                    max_staleness=config.learn.max_staleness,
                    pipeline_depth=config.learn.pipeline_depth,
                    in_flight=config.serve.in_flight,
                    min_group=config.serve.min_group,
                    group_timeout_s=config.serve.group_timeout_s,
                    attempts=config.serve.attempts,
                    on_trajectory=on_trajectory,
                    on_failure=lambda rollout_id, error: directory.event(
                        "rollout_failed", id=rollout_id, kind=error.kind, error=str(error)
                    ),
                    paused=toolbox.blocked,
                )
                async with running(reconciler=reconciler.run()):
                    yield worker, lambda: _status(worker, manager, meter, progress, toolbox.stats())
        finally:
            if trajectory_log is not None:
                trajectory_log.close()
            await toolbox.aclose()
            await client.aclose()


class _AdoptedProgress:
    """The stream's progress, with room for new groups only once the servers are being brought to that policy.

    The learner's announcement frees places a moment before any server has the new weights. A group started in between would be
    sampled by the old ones: one version staler than admission counted on.
    """

    def __init__(self, read: Callable[[], Awaitable[Progress]], reconciler: WeightReconciler) -> None:
        self._read, self._reconciler = read, reconciler
        self._adopted: Progress | None = None

    async def __call__(self) -> Progress:
        progress = await self._read()
        target = self._reconciler.target
        if target is not None and (target.run_epoch, target.version) >= (progress.run_epoch, progress.version):
            self._adopted = progress
        if self._adopted is None or self._adopted is progress:
            return progress
        return replace(progress, consumed_groups=min(progress.consumed_groups, self._adopted.consumed_groups))


def rollout_function(
    config: Config,
    manager: AsyncLLMServerManager,
    template: ChatTemplate,
    toolbox: Toolbox,
    scorer: Scorer,
    *,
    sampling: SamplingParams | None = None,
    require_versions: bool = True,
) -> RolloutFunction:
    """One rollout with everything but the task bound."""
    limits = Limits(
        max_turns=config.serve.turns,
        max_tokens=config.serve.tokens,
        max_tokens_per_turn=config.serve.tokens_per_turn,
        max_tool_tokens=config.serve.tool_tokens,
        max_calls_per_turn=config.serve.calls_per_turn,
        max_invalid_calls=config.serve.invalid_calls,
        turn_timeout_s=config.serve.turn_timeout_s,
        rollout_timeout_s=config.serve.rollout_timeout_s,
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
            parser=config.serve.parser,
            require_versions=require_versions,
        )

    return rollout


@asynccontextmanager
async def engines(config: Config, directory: RunDir, *, model_path: str) -> AsyncGenerator[AsyncLLMServerManager]:
    """The manager over running servers: attached ones, or engine processes that are started, watched and stopped here."""
    left_behind = [e for e in directory.recorded_processes() if e["role"].startswith(ENGINE_ROLE)]
    await asyncio.to_thread(kill_stale, [{"role": "engine", "pid": e["pid"], "started": e["created"]} for e in left_behind])
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        manager = AsyncLLMServerManager(session=session, seed=config.run.seed, vocab_size=vocab_size_of(model_path))
        async with manager:
            fleet = _fleet(config, directory, manager, model_path)
            async with running(health=manager.run(), fleet=fleet.run()):
                yield manager


def _fleet(config: Config, directory: RunDir, manager: AsyncLLMServerManager, model_path: str) -> EngineFleet | AttachedServers:
    def record(processes: Sequence[ProcessEntry]) -> None:
        entries = [{"role": Path(p["log"]).stem, "pid": p["pid"], "url": p["url"]} for p in processes if p["pid"] is not None]
        directory.update_processes(drop_prefix=ENGINE_ROLE, add=entries)

    serve = config.serve
    if serve.urls:
        return AttachedServers(serve.urls, manager=manager, api_key=serve.api_key, admin_key=serve.admin_key)
    spec = _engine_spec(config, directory, model_path)
    return EngineFleet(
        [spec] * serve.replicas, manager=manager, log_dir=directory.logs, omp_threads=serve.engine_threads, on_change=record
    )


def _engine_spec(config: Config, directory: RunDir, model_path: str) -> EngineSpec:
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
        extra_args=["--num-blocks", str(serve.engine_blocks), "--seed", str(config.run.seed)],
    )


async def _watch(watchdog: Watchdog) -> None:
    while True:
        await asyncio.sleep(watchdog.every_s)
        await asyncio.to_thread(watchdog.look)


async def _report(directory: RunDir, status: Callable[[], dict[str, Any]]) -> None:
    while True:
        directory.write_status("serve", status())
        await asyncio.sleep(STATUS_EVERY_S)


def _status(
    worker: RolloutWorker,
    manager: AsyncLLMServerManager,
    meter: "_TokenMeter",
    progress: ServeProgress,
    tools: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    status, servers, waits = worker.status(), manager.stats(), waits_now()
    answered = sum(int(t["calls"] - t["infra_errors"] - t["timeouts"]) for t in tools.values())
    tokens = sum(server.tokens_served for server in servers)
    return {
        **status,
        **progress.fields(finished=int(status["finished"]), tokens=tokens, calls=answered),
        "wait": next(iter(waits), ""),
        "waits": waits,
        "tokens_per_s": round(meter.rate(), 1),
        "engines": [asdict(server) for server in servers],
        "tools": tools,
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
