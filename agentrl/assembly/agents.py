"""Black-box agents: the endpoint beside ``serve``, and ``agentrl agent run``, which plays and records without training."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop

from agentrl.assembly.parts import build_scorer, build_template, load_tasks, load_tokenizer, run_dir_of
from agentrl.assembly.run import refuse_if_active
from agentrl.config import Config
from agentrl.errors import ConfigError, RolloutError
from agentrl.rollout.agent_loop import Rollout
from agentrl.rollout.proxy.agent_process import AgentCommand
from agentrl.rollout.proxy.host import ProxyHost, proxy_host
from agentrl.rollout.toolbox import Toolbox
from agentrl.telemetry.run_dir import RunDir
from agentrl.telemetry.trajectory_log import TrajectoryLog


@asynccontextmanager
async def agent_host(config: Config) -> AsyncGenerator[ProxyHost | None]:
    """The endpoint and what runs the agents, or None where no command is configured."""
    agent = config.agent
    if not agent.command:
        yield None
        return
    command = AgentCommand(
        argv=agent.command, env=agent.env, cwd=agent.cwd, extra_info=agent.extra_info, grace_s=agent.grace_s
    )  # fmt: skip
    host = ProxyHost(
        command, reward=agent.reward, model=agent.model_name, follows_request=agent.sampling == "request"
    )  # fmt: skip
    async with proxy_host(host, bind=agent.host, port=agent.port):
        yield host


def run_agents(config: Config, *, split: str, n: int | None, samples: int, name: str) -> tuple[Path, dict[str, Any]]:
    """Play ``n`` tasks of ``data.train`` or ``data.val`` with the configured command; records go to ``agents/<name>/``.

    Raises:
        ConfigError: there is no command, no such data, or a run is going on in the same directory.
    """
    if not config.agent.command:
        raise ConfigError("no command to run: write it behind --, for example `agentrl agent run -c FILE -- python my_agent.py`")
    directory = run_dir_of(config).create()
    refuse_if_active(directory, ("run", "serve"))
    return uvloop.run(_run_agents(config, directory, split=split, n=n, samples=samples, name=name))


async def _run_agents(
    config: Config, directory: RunDir, *, split: str, n: int | None, samples: int, name: str
) -> tuple[Path, dict[str, Any]]:
    from agentrl.assembly.engines import engines
    from agentrl.assembly.rollouts import rollout_function  # which imports this module

    tasks = load_tasks(config.data.val if split == "val" else config.data.train, what=f"data.{split}")[:n]
    tokenizer = load_tokenizer(config)
    toolbox = Toolbox()  # an agent brings its own tools
    template, scorer = build_template(config, tokenizer, toolbox), build_scorer(config)
    out = directory.root / "agents" / name
    trajectory_log = TrajectoryLog(out)
    permits = asyncio.Semaphore(config.serve.in_flight)
    rewards: list[float] = []
    correct: list[float] = []
    stops: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    errors: list[str] = []
    started = time.monotonic()
    try:
        async with engines(config, directory, model_path=config.model.path) as manager, agent_host(config) as host:
            rollout = rollout_function(config, manager, template, toolbox, scorer, require_versions=False, host=host)

            async def play(ordinal: int, sample: int) -> None:
                task = tasks[ordinal]
                group = f"{name}/{task.id}/{ordinal}"
                async with permits:
                    try:
                        trajectory, episode = await rollout(task, f"{group}/{sample}/0", group, ordinal, sample, 0)
                    except RolloutError as error:
                        failures[error.kind] += 1
                        errors.append(f"{task.id}: {error}")
                        if isinstance(error.partial, Rollout) and error.partial.trajectory.segments:
                            trajectory_log.write(*error.partial)
                        return
                rewards.append(trajectory.reward)
                correct.append(float(trajectory.reward_terms.get("correct", trajectory.reward)))
                stops[trajectory.stop] += 1
                trajectory_log.write(trajectory, episode)

            async with asyncio.TaskGroup() as players:
                for ordinal in range(len(tasks)):
                    for sample in range(samples):
                        players.create_task(play(ordinal, sample))
            branches = host.sessions.num_branches if host is not None else 0
    finally:
        trajectory_log.close()
    report: dict[str, Any] = {
        "tasks": len(tasks),
        "rollouts": len(tasks) * samples,
        "finished": len(rewards),
        "reward_mean": sum(rewards) / len(rewards) if rewards else None,
        "success": sum(correct) / len(correct) if correct else None,
        "stops": dict(stops),
        "failed": dict(failures),
        "first_errors": errors[:3],
        "branches": branches,
        "seconds": round(time.monotonic() - started, 2),
    }
    return out, report
