"""``agentrl eval``: play held-out tasks with a fixed model and report success with its interval."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import uvloop

from agentrl.assembly.agents import agent_host
from agentrl.assembly.audit import newest_checkpoint
from agentrl.assembly.engines import engines
from agentrl.assembly.parts import (
    build_scorer,
    build_template,
    build_toolbox,
    load_tasks,
    load_tokenizer,
    needs_sandbox,
    run_dir_of,
    share_sandbox_token,
)
from agentrl.assembly.rollouts import rollout_function
from agentrl.assembly.sandbox import sandbox_process
from agentrl.config import Config
from agentrl.errors import ConfigError, RolloutError
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.waiting_room import Priority
from agentrl.telemetry.run_dir import RunDir, write_json
from agentrl.telemetry.statistics import wilson_interval
from agentrl.telemetry.trajectory_log import to_record
from agentrl.types import Episode, SamplingParams, Task, Trajectory

MAX_FAILED_SHARE = 0.05
"""More rollouts than this failing for infrastructure reasons makes the number meaningless: the evaluation is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalMode:
    """How to decode. Temperature 0 is greedy and plays each task once."""

    temperature: float
    samples: int = 1

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def evaluate_from_config(config: Config, *, model: str | None, name: str | None) -> tuple[Path, dict[str, Any]]:
    """Evaluate the named model, the run's newest checkpoint, or the starting model; writes ``evals/<name>.json``.

    Servers that are attached to (``serve.urls``, ``serve.router_url``) are evaluated with what they serve.

    Raises:
        ConfigError: a model is named, but servers are given that serve what they serve.
    """
    directory = run_dir_of(config).create()
    is_attached = not config.serve.starts_engines
    if is_attached and model is not None:
        raise ConfigError(
            f"--model={model} names what engines of this evaluation would serve, but serve.urls or serve.router_url attaches to servers "
            "that serve what they serve. Leave out --model to measure those, or add serve.urls=[] serve.router_url=null"
        )
    path = config.model.path if is_attached else model or _default_model(config, directory)
    mode = EvalMode(temperature=config.eval.temperature, samples=config.eval.samples)
    (result,) = evaluate_model(config, directory, model_path=path, modes=[mode])
    out = directory.evals / f"{name or _name_of('servers' if is_attached else path, mode)}.json"
    write_json(out, {k: v for k, v in result.items() if k != "records"})
    return out, result


def evaluate_model(config: Config, directory: RunDir, *, model_path: str, modes: Sequence[EvalMode]) -> list[dict[str, Any]]:
    """Play ``eval.n`` tasks of ``data.val`` in each mode with one set of engines.

    Raises:
        RolloutError: more than 5 % of the rollouts failed for reasons that are not the model's.
    """
    return uvloop.run(_evaluate(config, directory, model_path, modes))


async def _evaluate(config: Config, directory: RunDir, model_path: str, modes: Sequence[EvalMode]) -> list[dict[str, Any]]:
    tasks = load_tasks(config.data.val, what="data.val")[: config.eval.n]
    tokenizer = load_tokenizer(config, model_path)
    wanted = needs_sandbox(config) and config.sandbox.url == "auto" and directory.url_of("sandbox") is None
    share_sandbox_token(config, directory)
    async with sandbox_process(config, directory, wanted=wanted) as started:
        sandbox_url = started or (directory.url_of("sandbox") if config.sandbox.url == "auto" else config.sandbox.url)
        toolbox = build_toolbox(config, tokenizer, sandbox_url=sandbox_url)
        try:
            template = build_template(config, tokenizer, toolbox)
            async with _own_engines(config, directory, model_path) as manager, agent_host(config) as host:
                results: list[dict[str, Any]] = []
                for mode in modes:
                    sampling = SamplingParams(max_new_tokens=config.serve.tokens_per_turn, temperature=mode.temperature)
                    rollout = rollout_function(
                        config,
                        manager.at(Priority.EVALUATION),
                        template,
                        toolbox,
                        build_scorer(config),
                        sampling=sampling,
                        require_versions=False,
                        host=host,
                    )
                    results.append({"model": model_path, **await _play(tasks, mode, rollout, config.eval.in_flight)})
                return results
        finally:
            await toolbox.aclose()


@asynccontextmanager
async def _own_engines(config: Config, directory: RunDir, model_path: str) -> AsyncGenerator[AsyncLLMServerManager]:
    """Engines in a folder of their own: in the run's, they would pass for leftovers of it, and the run's for leftovers of these."""
    with TemporaryDirectory(prefix=".engines-", dir=directory.evals) as folder:
        async with engines(config, RunDir(folder).create(), model_path=model_path) as manager:
            yield manager


async def _play(tasks: Sequence[Task], mode: EvalMode, rollout: Any, in_flight: int) -> dict[str, Any]:
    permits = asyncio.Semaphore(in_flight)
    played: list[tuple[Trajectory, Episode]] = []
    failures: Counter[str] = Counter()
    started = time.monotonic()

    async def play(ordinal: int, sample: int, task: Task) -> None:
        async with permits:
            group = f"eval/{task.id}/{ordinal}"
            try:
                played.append(await rollout(task, f"{group}/{sample}/0", group, ordinal, sample, 0))
            except RolloutError as error:
                failures[error.kind] += 1

    async with asyncio.TaskGroup() as group:
        for ordinal, task in enumerate(tasks):
            for sample in range(1 if mode.greedy else mode.samples):
                group.create_task(play(ordinal, sample, task))
    attempted = len(played) + failures.total()
    if failures.total() > MAX_FAILED_SHARE * attempted:
        raise RolloutError(
            f"{failures.total()} of {attempted} evaluation rollouts failed outside the model's control ({dict(failures)}); "
            "a success rate over the rest would mislead. Look at logs/engine-*.log and the tools, then evaluate again"
        )
    correct = [t.reward_terms.get("correct", t.reward) for t, _ in played]
    successes = sum(correct)
    low, high = wilson_interval(successes, len(correct))
    return {
        "success": successes / max(1, len(correct)),
        "n": len(tasks),
        "greedy": mode.greedy,
        "samples": 1 if mode.greedy else mode.samples,
        "temperature": mode.temperature,
        "ci95": [low, high],
        "reward_mean": sum(t.reward for t, _ in played) / max(1, len(played)),
        "called_a_tool": sum(bool(e.calls) for _, e in played) / max(1, len(played)),
        "info": _mean_info(played),
        "stops": dict(Counter(t.stop for t, _ in played)),
        "policy_versions": _versions(played),
        "failed": dict(failures),
        "seconds": round(time.monotonic() - started, 2),
        "records": [to_record(t, e) for t, e in sorted(played, key=lambda pair: pair[0].ordinal)],
    }


def _versions(played: Sequence[tuple[Trajectory, Episode]]) -> list[int]:
    """Policy versions that sampled the tokens; none where the servers serve no policy of a run."""
    seen = {int(version) for t, _ in played for s in t.segments for version in np.unique(s.versions[s.mask])}
    return sorted(seen - {-1})


def _mean_info(played: Sequence[tuple[Trajectory, Episode]]) -> dict[str, float]:
    """Mean of each named reward term."""
    names = {name for t, _ in played for name in t.reward_terms}
    return {name: sum(t.reward_terms.get(name, 0.0) for t, _ in played) / len(played) for name in sorted(names)}


def _default_model(config: Config, directory: RunDir) -> str:
    try:
        return str(newest_checkpoint(directory))
    except ConfigError:
        return config.model.path


def _name_of(path: str, mode: EvalMode) -> str:
    return f"{Path(path).name or 'model'}-{'greedy' if mode.greedy else f't{mode.temperature:g}'}"
