"""What rollouts need beside servers, built from the config: tasks, tools, template, scorer, stream; and what they report."""

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import redis.asyncio

from agentrl.assembly.adopted_progress import AdoptedProgress
from agentrl.assembly.agents import agent_host
from agentrl.assembly.parts import (
    build_parser,
    build_scorer,
    build_template,
    build_toolbox,
    env_name,
    fingerprint,
    load_tasks,
    load_tokenizer,
)
from agentrl.assembly.watchdog import ServeProgress, waits_now
from agentrl.config import Config
from agentrl.data.task_source import TaskSource
from agentrl.errors import ConfigError
from agentrl.protocols import Generator
from agentrl.rollout.agent_loop import AgentHost, Limits, get_agent_loop, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.context import ContextPolicy
from agentrl.rollout.group import RolloutFunction
from agentrl.rollout.partial import PartialRollouts
from agentrl.rollout.partial_sink import PartialSink
from agentrl.rollout.proxy.host import ProxyHost
from agentrl.rollout.reward import Scorer
from agentrl.rollout.toolbox import Toolbox
from agentrl.rollout.worker import RolloutWorker
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.stream.connection import check_server, connect, connect_async
from agentrl.stream.fingerprint import check_fingerprint
from agentrl.stream.keys import Keys
from agentrl.stream.leases import TaskLeases
from agentrl.stream.partials import RedisPartials
from agentrl.stream.policy import Progress, read_progress
from agentrl.stream.producer import TrajectoryProducer
from agentrl.telemetry.run_dir import RunDir
from agentrl.telemetry.trajectory_log import TrajectoryLog
from agentrl.types import Episode, SamplingParams, Task, Trajectory

log = logging.getLogger(__name__)


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
    scorer = build_scorer(config)  # its file may register an agent loop
    check_rows(tasks, toolbox)
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


def check_rows(tasks: TaskSource, toolbox: Toolbox) -> None:
    """Find rows that name what the run does not have before it starts: such a row would end it whenever its turn comes.

    Raises:
        ConfigError: names the first such row.
    """
    known: set[tuple[str | None, tuple[str, ...] | None]] = set()
    for ordinal in range(len(tasks)):
        task = tasks.task(ordinal)
        selection = None if task.tool_selection is None else tuple(task.tool_selection)
        if (task.agent, selection) in known:
            continue
        known.add((task.agent, selection))
        try:
            toolbox.schemas(selection)
            if task.agent is not None:
                get_agent_loop(task.agent)
        except ConfigError as error:
            raise ConfigError(f"data.train: row {task.id}: {error}") from error


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
