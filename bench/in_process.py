"""The quickstart's task in one process: real agent loop, real learner, and a staleness that is set rather than suffered.

Shared by `bench/staleness.py` and `bench/algorithms.py`. A step rolls groups out with the weights of ``staleness`` versions ago, through
the agent loop, tools and scoring that ``agentrl serve`` uses, and trains on them with the learner that ``agentrl learn`` builds from
the same settings. Only the engine differs: `LocalSampler` is a plain batched loop with a KV cache, so that nothing depends on timing.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from agentrl.assembly.learn import build_learner
from agentrl.assembly.parts import build_scorer, build_template, build_toolbox, load_tokenizer
from agentrl.assembly.rollouts import rollout_function
from agentrl.config import Config, load_config
from agentrl.learner.batching import BatchBuilder
from agentrl.learner.distributed import Team
from agentrl.learner.learner import Learner
from agentrl.learner.model import full_state
from agentrl.learner.settings import GROUPLESS_ADVANTAGES
from agentrl.learner.sft import run_sft
from agentrl.plugins import load_object
from agentrl.types import Generation, GroupClose, SamplingParams, Task, Trajectory, TrajectoryGroup

SFT_STEPS, SFT_BATCH = 1100, 16
"""The quickstart's cold start."""
EVAL_TASKS = 64


class LocalSampler:
    """A Generator that waits until every running rollout has asked, then samples for all of them at once."""

    def __init__(self, model_dir: Path, *, seed: int) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._random = torch.Generator().manual_seed(seed)
        self._asked: list[tuple[list[int], SamplingParams, asyncio.Future[Generation]]] = []
        self._running = 0
        self.version = 0

    def load(self, weights: dict[str, torch.Tensor], version: int) -> None:
        self._model.load_state_dict(weights, strict=False)
        self.version = version

    async def play(self, rollouts: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Run rollouts side by side; their results in order."""
        self._running = len(rollouts)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._counted(rollout)) for rollout in rollouts]
        return [task.result() for task in tasks]

    async def generate(
        self, ids: Sequence[int], sampling: SamplingParams, *, trajectory_id: str, group_id: str, deadline: float
    ) -> Generation:
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._asked.append((list(ids), sampling, future))
        self._sample_if_all_wait()
        return await future

    async def _counted(self, rollout: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await rollout
        finally:
            self._running -= 1
            self._sample_if_all_wait()

    def _sample_if_all_wait(self) -> None:
        if self._asked and len(self._asked) == self._running:
            asked, self._asked = self._asked, []
            for (_, _, future), generation in zip(asked, self._sample([(ids, s) for ids, s, _ in asked]), strict=True):
                future.set_result(generation)

    @torch.no_grad()
    def _sample(self, asked: Sequence[tuple[list[int], SamplingParams]]) -> list[Generation]:
        """All requests in one left-padded batch."""
        width = max(len(ids) for ids, _ in asked)
        ids = torch.tensor([[0] * (width - len(i)) + i for i, _ in asked])
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i, _ in asked])
        lengths = mask.sum(dim=1)
        stops = torch.tensor(sorted(set(asked[0][1].stop_token_ids)))
        limits = torch.tensor([s.max_new_tokens for _, s in asked])
        greedy = torch.tensor([s.temperature == 0 for _, s in asked])
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        found: list[torch.Tensor] = []
        logprobs: list[torch.Tensor] = []
        ended = torch.zeros(len(asked), dtype=torch.bool)
        ends = limits.clone()
        cache: Any = None
        for number in range(1, int(limits.max()) + 1):
            out = self._model(
                ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = out.past_key_values
            log_p = out.logits[:, -1].log_softmax(dim=-1)
            token = torch.where(greedy, log_p.argmax(-1), torch.multinomial(log_p.exp(), 1, generator=self._random)[:, 0])
            found.append(token)
            logprobs.append(log_p.gather(1, token[:, None])[:, 0])
            ends = torch.where(~ended & torch.isin(token, stops), number, ends)
            ended |= torch.isin(token, stops) | (number >= limits)
            if ended.all():
                break
            ids, positions = token[:, None], (lengths + number - 1)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(asked), 1)], dim=1)
        tokens, logps = torch.stack(found, dim=1), torch.stack(logprobs, dim=1)
        return [
            Generation(
                ids=tokens[i, :end].tolist(), logprobs=logps[i, :end].tolist(), versions=[self.version] * end,
                finish="stop" if bool(torch.isin(tokens[i, end - 1], stops)) else "length", server="local",
            )
            for i, end in enumerate(ends.tolist())
        ]  # fmt: skip


def cold_start(folder: Path, *, seed: int, team: Team) -> Path:
    """The quickstart's supervised model of a seed; made once."""
    out = folder / f"seed{seed}"
    if not out.exists():
        scratch = folder / f"scratch{seed}"
        load_object("envs.arithmetic_model:make_scratch_model")(scratch, seed=seed)
        rows = load_object("envs.arithmetic:generate_sft_conversations")(SFT_STEPS * SFT_BATCH, seed)
        dialogues = [SimpleNamespace(messages=row["messages"], tools=row["tools"]) for row in rows]
        run_sft(
            scratch, dialogues, out_dir=out, steps=SFT_STEPS, batch_size=SFT_BATCH, micro_batch_tokens=3400, shuffle=False,
            seed=seed, team=team,
        )  # fmt: skip
    return out


def quickstart_config(model: Path, overrides: Sequence[str], *, seed: int) -> Config:
    """The quickstart's settings with ``overrides``, for this model."""
    return load_config("quickstart", [f"model.path={model}", f"run.seed={seed}", *overrides])


@dataclass
class Run:
    """What a run showed, one entry per evaluation, in policy versions."""

    versions: list[int]
    sampled: list[float]
    """Success at temperature 1 on held-out tasks, by the policy of that version."""
    greedy: list[float]
    """The same greedily, at the start and at the end."""
    rewards: list[float]
    """Of each step's batch."""
    kl: list[float]
    """From the sampling policy to the one that is trained, per token, of each step."""
    seconds: float
    cpu_seconds: float


def train(config: Config, *, team: Team, staleness: int, steps: int, eval_every: int, log_every: int = 0) -> Run:
    """Train for ``steps`` on data that is exactly ``staleness`` versions old (less in the first steps)."""
    started, cpu_started = time.perf_counter(), time.process_time()
    learner = build_learner(config, team=team)
    rig = _Rig(config, learner)
    weights: deque[dict[str, torch.Tensor]] = deque([_weights(learner)], maxlen=staleness + 1)
    run = Run(versions=[], sampled=[], greedy=[], rewards=[], kl=[], seconds=0.0, cpu_seconds=0.0)
    rig.evaluate(run, weights[-1], greedy=True)
    for step in range(steps):
        batches = BatchBuilder(
            groups_per_step=config.learn.groups, max_staleness=staleness, zero_spread=config.learn.zero_spread,
            min_group_size=1 if config.learn.advantage in GROUPLESS_ADVANTAGES else 2,
            needs_baseline=config.learn.needs_greedy_baseline,
        )  # fmt: skip
        for group in rig.groups(weights[0], version=learner.policy_version - len(weights) + 1, step=step):
            batches.add(group)
        metrics = learner.step(batches.build(learner.policy_version))
        weights.append(_weights(learner))
        run.rewards.append(metrics["reward/mean"])
        run.kl.append(metrics.get("rollout_corr/kl", 0.0))
        if (step + 1) % eval_every == 0 or step + 1 == steps:
            rig.evaluate(run, weights[-1], greedy=step + 1 == steps)
        if log_every and (step + 1) % log_every == 0:
            print(
                f"  step {step + 1}: reward {metrics['reward/mean']:.3f} held out {run.sampled[-1]:.3f} "
                f"staleness {metrics.get('training/off_policy/trajectory_staleness/max', 0):.0f} {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    run.seconds, run.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return run


class _Rig:
    """Rolls out and evaluates."""

    def __init__(self, config: Config, learner: Learner) -> None:
        self._config, self._learner = config, learner
        tokenizer = load_tokenizer(config)
        tokenizer.apply_chat_template = _remembered(tokenizer.apply_chat_template)  # siblings ask for the same text
        toolbox = build_toolbox(config, tokenizer, sandbox_url=None)
        self._sampler = LocalSampler(Path(config.model.path), seed=config.run.seed)
        self._loop = asyncio.Runner()  # one loop for all: tools hold semaphores of the loop that first used them
        parts: Any = (config, self._sampler, build_template(config, tokenizer, toolbox), toolbox, build_scorer(config))
        self._rollout = rollout_function(*parts)
        self._greedy = rollout_function(
            *parts, sampling=SamplingParams(max_new_tokens=config.serve.tokens_per_turn, temperature=0.0)
        )
        generate = load_object("envs.arithmetic:generate_tasks")
        self._tasks: list[Task] = generate(4096, config.run.seed)
        self._held_out: list[Task] = generate(EVAL_TASKS, 0, "val")

    def groups(self, weights: dict[str, torch.Tensor], *, version: int, step: int) -> list[TrajectoryGroup]:
        """One step's groups."""
        self._sampler.load(weights, version)
        count, size = self._config.learn.groups, self._config.serve.n
        tasks = [(o, self._tasks[o % len(self._tasks)]) for o in range(step * count, (step + 1) * count)]
        rollouts = [
            self._rollout(task, f"{task.id}/{o}/{i}/0", f"{task.id}/{o}", o, i, 0) for o, task in tasks for i in range(size)
        ]
        if self._config.learn.needs_greedy_baseline:
            rollouts += [self._greedy(task, f"{task.id}/{o}/{size}/0", f"{task.id}/{o}", o, size, 0) for o, task in tasks]
        played = [trajectory for trajectory, _ in self._loop.run(self._sampler.play(rollouts))]
        members, greedy = played[: count * size], played[count * size :]
        baselines: list[float | None] = [t.reward for t in greedy] or [None] * count
        return [_closed(o, task, members[i * size : (i + 1) * size], baselines[i]) for i, (o, task) in enumerate(tasks)]

    def evaluate(self, run: Run, weights: dict[str, torch.Tensor], *, greedy: bool) -> None:
        """Success on the same held-out tasks every time."""
        self._sampler.load(weights, self._learner.policy_version)
        run.versions.append(self._learner.policy_version)
        kinds = [(self._rollout, run.sampled), *([(self._greedy, run.greedy)] if greedy else [])]
        for rollout, found in kinds:
            tasks = [rollout(task, f"{task.id}/0/0/0", f"{task.id}/0", 0, 0, 0) for task in self._held_out]
            rewards = [trajectory.reward for trajectory, _ in self._loop.run(self._sampler.play(tasks))]
            found.append(sum(rewards) / len(rewards))


def _closed(ordinal: int, task: Task, members: Sequence[Trajectory], baseline: float | None) -> TrajectoryGroup:
    close = GroupClose(
        group_id=f"{task.id}/{ordinal}", task_id=task.id, ordinal=ordinal, size=len(members),
        members=tuple(t.id for t in members), baseline=baseline,
    )  # fmt: skip
    return TrajectoryGroup(close, tuple(members))


def _remembered(render: Callable[..., str]) -> Callable[..., str]:
    known: dict[str, str] = {}

    def remembered(messages: Any, **options: Any) -> str:
        key = json.dumps([messages, options], sort_keys=True)
        if key not in known:
            known[key] = render(messages, **options)
        return known[key]

    return remembered


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in full_state(learner.policy).items()}
