"""``agentrl rollout``: play one prompt, or one row of the run's data, against the configured engine, and keep nothing.

It works in a folder of its own, so it never touches the processes of a run that is going on with the same settings.
"""

import asyncio
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from agentrl.assembly.agents import agent_host
from agentrl.assembly.engines import engines
from agentrl.assembly.parts import (
    build_scorer,
    build_template,
    build_toolbox,
    load_tasks,
    load_tokenizer,
    needs_sandbox,
    share_sandbox_token,
)
from agentrl.assembly.rollouts import rollout_function
from agentrl.assembly.sandbox import sandbox_process
from agentrl.config import Config
from agentrl.errors import ConfigError, RolloutError
from agentrl.rollout.agent_loop import Rollout
from agentrl.rollout.reward import Scorer
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.supervise import deadline, waiting
from agentrl.telemetry.run_dir import RunDir
from agentrl.types import Episode, SamplingParams, Task, Trajectory

ENGINE_START_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HandRollout:
    """One rollout, for people to look at."""

    trajectory: Trajectory
    episode: Episode
    tokenizer: Any
    is_scored: bool
    """False where nothing could score it: the reward then means nothing."""
    error: str = ""
    """Why it failed; what was rolled out before is kept."""


def task_by_hand(config: Config, *, prompt: str | None, system: str | None, row: int | None, split: str) -> Task:
    """A task of one user message, or row ``row`` of the run's file.

    Raises:
        ConfigError: neither or both were given, or the file has no such row.
    """
    if (prompt is None) == (row is None):
        raise ConfigError("give --prompt TEXT, or --row N of the run's data, one of them")
    if prompt is not None:
        opening = [{"role": "system", "content": system}] if system else []
        return Task(id="by-hand", prompt=[*opening, {"role": "user", "content": prompt}], data_source="by-hand", split="none")
    tasks = load_tasks(config.data.val if split == "val" else config.data.train, what=f"data.{split}")
    assert row is not None
    if not 0 <= row < len(tasks):
        raise ConfigError(f"--row {row}: data.{split} has rows 0 to {len(tasks) - 1}")
    return tasks[row]


def rollout_by_hand(config: Config, task: Task, *, temperature: float | None = None) -> HandRollout:
    """Start what the config says (or attach to ``serve.urls``), play the task once, stop everything.

    Raises:
        RolloutError: it failed before anything was sampled.
    """
    folder = Path(tempfile.mkdtemp(prefix="agentrl-rollout-"))
    played = uvloop.run(_play(config, task, RunDir(folder).create(), temperature))
    shutil.rmtree(folder)  # only after success: the engine's log is in it
    return played


async def _play(config: Config, task: Task, directory: RunDir, temperature: float | None) -> HandRollout:
    tokenizer = load_tokenizer(config)
    share_sandbox_token(config, directory)
    wanted = needs_sandbox(config) and config.sandbox.url == "auto"
    scorer, is_scored = _scorer(config, task)
    sampling = SamplingParams(
        max_new_tokens=config.serve.tokens_per_turn,
        temperature=config.serve.temperature if temperature is None else temperature,
        top_p=config.serve.top_p,
        top_k=config.serve.top_k,
    )
    async with sandbox_process(config, directory, wanted=wanted) as started:
        toolbox = build_toolbox(config, tokenizer, sandbox_url=started or (None if wanted else config.sandbox.url))
        try:
            template = build_template(config, tokenizer, toolbox)
            async with engines(config, directory, model_path=config.model.path) as manager, agent_host(config) as host:
                await _ready(manager)
                rollout = rollout_function(
                    config, manager, template, toolbox, scorer, sampling=sampling, require_versions=False, host=host
                )
                try:
                    trajectory, episode = await rollout(task, "by-hand/0/0/0", "by-hand/0", 0, 0, 0)
                except RolloutError as error:
                    if not isinstance(error.partial, Rollout):
                        raise
                    partial = error.partial
                    return HandRollout(
                        trajectory=partial.trajectory, episode=partial.episode, tokenizer=tokenizer, is_scored=False, error=str(error)
                    )  # fmt: skip
        finally:
            await toolbox.aclose()
    assert episode is not None
    return HandRollout(trajectory=trajectory, episode=episode, tokenizer=tokenizer, is_scored=is_scored)


def _scorer(config: Config, task: Task) -> tuple[Scorer, bool]:
    """The run's scorer where the task can be scored; a written prompt has no ground truth."""
    has_scorer = bool(config.env or config.reward.fn or config.agent.reward != "score")
    if has_scorer and (task.ground_truth is not None or config.serve.agent in ("env", "proxy")):
        return build_scorer(config), True
    return Scorer(fn=lambda **_: 0.0), False


async def _ready(manager: AsyncLLMServerManager) -> None:
    """Until an engine is up, so that the first turn's time is the model's."""
    with waiting("server"):
        async with deadline(ENGINE_START_LIMIT_S, "engine start"):
            while not manager.urls:  # noqa: ASYNC110  # a fleet comes up once, in seconds
                await asyncio.sleep(0.05)
