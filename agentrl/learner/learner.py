"""One step of learning: advantages, off-policy correction, packed micro-batches, one or more optimizer updates, metrics.

The loss is normalised by the step's global counts, so how the batch is cut into micro-batches, minibatch rows and ranks does
not matter (I8). On more than one rank every method named a collective must be called on all of them; rank 0 alone has the
batch and gets the metrics.
"""

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agentrl.errors import TrainingDiverged
from agentrl.learner.batching import StepBatch
from agentrl.learner.critic import Critic
from agentrl.learner.distributed import Team
from agentrl.learner.lora import LoraSettings
from agentrl.learner.model import (
    PACKING_TOLERANCE,
    PACKING_TOLERANCE_HALF,
    check_packing,
    full_state,
    load_policy,
    write_hf_directory,
)
from agentrl.learner.optim import OptimizerSettings, build_optimizer, update
from agentrl.learner.settings import CriticSettings, KLSettings, LossSettings, check_settings
from agentrl.learner.step import MicroBatch, Models, Step
from agentrl.learner.step_arrays import StepArrays, check_rows, flatten

logger = logging.getLogger(__name__)

__all__ = ["CriticSettings", "KLSettings", "Learner", "LossSettings", "batch_metrics"]


class Learner:
    """The policy under training, its optimizer and its version; and the critic's, where PPO has one.

    ``policy_version`` counts `step` calls: one per published version, whatever ``num_epochs * num_minibatches`` updates it
    took. A step whose gradients were not finite, or that had nothing to train on, counts too and leaves the weights alone.

    Args:
        model_path: Hugging Face directory to start from; also the source of tokenizer files in every snapshot.
        team: this process's ranks (`start_team`).
        optimizer: how gradients become weights.
        loss: what is minimised.
        critic: the value model; only with ``advantage="gae"``.
        lora: train adapters only; the KL's reference is then the policy without them.
        micro_batch_tokens: most tokens in one row, which is one forward pass of one rank, or of the ranks that share its tokens; no
            trajectory segment may be longer.
        temperature: the sampler's.
        dtype: ``bf16`` computes in bf16 over fp32 master weights and writes bf16 snapshots.
        chunk_size: tokens whose logits exist at a time.
        gradient_checkpointing: compute activations again in backward instead of keeping them.
        offload: keep shards, gradients and optimizer state in host memory.
        compiled: ``torch.compile`` the decoder layers of all models.
        grad_sync: ``last`` adds gradients up over ranks once per update, in the last micro-batch, and keeps whole gradients until
            then; ``each`` after every micro-batch, which needs memory only for shards.
        reference_path: frozen reference for the KL; None takes ``model_path``.
        max_nonfinite_steps: steps in a row with non-finite gradients before `TrainingDiverged`.

    Raises:
        ConfigError: settings that cannot work together, or a model that this learner would train wrongly.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        team: Team,
        optimizer: OptimizerSettings,
        loss: LossSettings | None = None,
        critic: CriticSettings | None = None,
        lora: LoraSettings | None = None,
        micro_batch_tokens: int = 16384,
        temperature: float = 1.0,
        dtype: Literal["fp32", "bf16"] = "fp32",
        chunk_size: int = 1024,
        gradient_checkpointing: bool = False,
        offload: bool = False,
        compiled: bool = False,
        grad_sync: Literal["last", "each"] = "last",
        reference_path: str | Path | None = None,
        max_nonfinite_steps: int = 3,
    ) -> None:
        self.loss = loss or LossSettings()
        check_settings(self.loss, temperature=temperature, has_critic=critic is not None)
        self.team = team
        self.model_path = Path(model_path)
        self.dtype: Literal["fp32", "bf16"] = dtype
        self.optimizer_settings = optimizer
        self.micro_batch_tokens = micro_batch_tokens
        options: dict[str, Any] = {
            "dtype": dtype, "temperature": temperature, "chunk_size": chunk_size, "offload": offload, "compiled": compiled,
        }  # fmt: skip
        self.policy = load_policy(model_path, team, gradient_checkpointing=gradient_checkpointing, lora=lora, **options)
        tolerance = PACKING_TOLERANCE if dtype == "fp32" else PACKING_TOLERANCE_HALF
        check_packing(self.policy, team, tolerance=tolerance)
        needs_reference = self.loss.kl.coef > 0 and (lora is None or reference_path is not None)
        self.reference = load_policy(reference_path or model_path, team, trainable=False, **options) if needs_reference else None
        self.critic = (
            Critic(
                critic, policy_path=model_path, team=team, dtype=dtype, gradient_checkpointing=gradient_checkpointing,
                offload=offload, compiled=compiled,
            ) if critic is not None else None
        )  # fmt: skip
        self.optimizer = build_optimizer(self.policy, optimizer)
        self.kl_controller = self.loss.kl.start_controller()
        self.policy_version = 0
        self.num_updates = 0
        self.num_skipped_updates = 0
        self._grad_sync = grad_sync
        self._nonfinite_in_a_row = 0
        self._max_nonfinite = max_nonfinite_steps

    @property
    def trains_policy(self) -> bool:
        """False during the critic's warm-up."""
        return self.critic is None or self.policy_version >= self.critic.settings.warmup_steps

    def step(self, batch: StepBatch | None) -> dict[str, float]:
        """Learn from one batch; a collective.

        Args:
            batch: on rank 0; the other ranks pass None.

        Returns:
            Metrics (rank 0; empty elsewhere). ``update/skipped`` is 1 when the policy's weights did not change.

        Raises:
            TrainingDiverged: gradients were not finite ``max_nonfinite_steps`` times in a row.
            DataError: a sequence longer than ``micro_batch_tokens``, or tokens outside the vocabulary.
        """
        started = time.perf_counter()
        timings = _Timings()
        with timings("share"):
            step = self._start(batch)
        with timings("old_log_prob"):
            step.score()
        with timings("adv"):
            step.assign_credit(batch.rows if batch is not None else None)
            step.correct()
        losses: list[dict[str, float]] = []
        with timings("update"):
            for epoch in range(self.loss.num_epochs):
                for trajectories in step.minibatches():
                    losses.append(self._learn_from(step, trajectories, collect=epoch == 0))
            step.collect_over_ranks()
        self._watch_divergence(losses)
        kl_coef = self.kl_controller.value
        averages = _averages(losses)
        self._steer_kl(step, averages)
        self.policy_version += 1
        if batch is None or not self.team.is_main:
            return {}
        metrics = averages | step.metrics() | batch_metrics(batch)
        if self.loss.kl.coef > 0:
            metrics["actor/kl_coef"] = kl_coef
        seconds = time.perf_counter() - started
        num_tokens = step.arrays.num_trained_tokens
        return metrics | timings.metrics | {
            "step": self.policy_version,
            "policy_version": self.policy_version,
            "training/global_step": self.policy_version,
            "update/skipped": float(not any(entry["update/applied"] for entry in losses)),
            "update/skipped_total": self.num_skipped_updates,
            "timing_s/step": seconds,
            "perf/total_num_tokens": num_tokens,
            "perf/throughput": num_tokens / seconds / self.team.world_size,
        }  # fmt: skip

    def export(self, directory: Path) -> None:
        """Write the weights as a Hugging Face directory (rank 0 writes); a collective. Not durable until synced."""
        state = full_state(self.policy)
        if self.team.is_main:
            source = self.model_path if self.model_path.is_dir() else None
            write_hf_directory(directory, state, self.policy, source=source, dtype=self.dtype)

    def counters(self) -> dict[str, Any]:
        """What a checkpoint must carry besides weights and moments, as JSON values."""
        return {
            "policy_version": self.policy_version,
            "num_updates": self.num_updates,
            "num_skipped_updates": self.num_skipped_updates,
            "critic_updates": self.critic.num_updates if self.critic is not None else 0,
            "kl_coef": self.kl_controller.value,
        }

    def restore_counters(self, saved: Mapping[str, Any]) -> None:
        """Take up where `counters` were written."""
        self.policy_version = int(saved["policy_version"])
        self.num_updates = int(saved["num_updates"])
        self.num_skipped_updates = int(saved["num_skipped_updates"])
        if self.critic is not None:
            self.critic.num_updates = int(saved.get("critic_updates", 0))
        if self.loss.kl.controller == "adaptive":  # a fixed coefficient is this run's setting
            self.kl_controller.value = float(saved.get("kl_coef", self.kl_controller.value))

    def _start(self, batch: StepBatch | None) -> Step:
        arrays = None
        if self.team.is_main:
            if batch is None:
                raise ValueError("rank 0 must pass the batch")
            check_rows(
                batch.rows, vocab_size=int(self.policy.hf.config.get_text_config().vocab_size),
                budget_tokens=self.micro_batch_tokens, may_part_segments=self.loss.may_part_segments,
            )  # fmt: skip
            arrays = flatten(batch.rows).as_mapping()
        models = Models(policy=self.policy, reference=self.reference, critic=self.critic)
        return Step(
            StepArrays.from_mapping(self.team.broadcast_arrays(arrays)), self.loss, models, team=self.team,
            micro_batch_tokens=self.micro_batch_tokens, version=self.policy_version, kl_coef=self.kl_controller.value,
        )  # fmt: skip

    def _learn_from(self, step: Step, trajectories: NDArray[np.int64], *, collect: bool) -> dict[str, float]:
        """One update of the critic, where there is one, and one of the policy, from some of the step's trajectories."""
        metrics: dict[str, float] = {}
        if self.critic is not None:
            metrics |= self._update_critic(self.critic, step, trajectories)
        if self.trains_policy:
            return metrics | self._update_policy(step, trajectories, collect=collect)
        return metrics | {"update/applied": 0.0}

    def _update_policy(self, step: Step, trajectories: NDArray[np.int64], *, collect: bool) -> dict[str, float]:
        metrics = self._accumulate(self.policy, step, trajectories, lambda micro: step.policy_loss(micro, collect=collect))
        if step.num_tokens(trajectories) == 0:
            self.optimizer.zero_grad(set_to_none=True)
            return metrics | {"update/applied": 0.0}
        learning_rate = self.optimizer_settings.lr_at(self.num_updates)
        norm, was_applied = update(self.policy, self.optimizer, self.optimizer_settings, self.num_updates)
        self.num_updates += 1
        if not was_applied:
            self.num_skipped_updates += 1
            logger.warning("update skipped: gradient norm %s is not finite, version=%d", norm, self.policy_version)
        return metrics | {
            "actor/grad_norm": norm, "actor/lr": learning_rate, "update/applied": float(was_applied),
            "update/nonfinite": float(not was_applied),
        }  # fmt: skip

    def _update_critic(self, critic: Critic, step: Step, trajectories: NDArray[np.int64]) -> dict[str, float]:
        metrics = self._accumulate(critic.model, step, trajectories, step.value_loss)
        if step.num_tokens(trajectories) == 0:
            critic.optimizer.zero_grad(set_to_none=True)
            return metrics
        learning_rate = critic.optimizer_settings.lr_at(critic.num_updates)
        norm, was_applied = update(critic.model, critic.optimizer, critic.optimizer_settings, critic.num_updates)
        critic.num_updates += 1
        if not was_applied:
            logger.warning("critic update skipped: gradient norm %s is not finite, version=%d", norm, self.policy_version)
        return metrics | {"critic/grad_norm": norm, "critic/lr": learning_rate, "critic/nonfinite": float(not was_applied)}

    def _accumulate(
        self,
        model: nn.Module,
        step: Step,
        trajectories: NDArray[np.int64],
        loss_of: Callable[[MicroBatch], tuple[Tensor, dict[str, Tensor]]],
    ) -> dict[str, float]:
        """Gradients of all micro-batches; returns the metrics' sums over them and over ranks."""
        totals: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        micro_batches = step.micro_batches(trajectories)
        sharded: Any = model
        for number, micro in enumerate(micro_batches, start=1):
            sharded.set_requires_gradient_sync(self._grad_sync == "each" or number == len(micro_batches))
            loss, parts = loss_of(micro)
            # FSDP averages gradients over ranks; the loss is already divided by the global count, so the mean is undone. Ranks that
            # share a row have the same loss, and each only its own part of the gradient.
            (loss * self.team.world_size).backward()
            for name, value in parts.items() if self.team.speaks_for_rows else ():
                totals[name] += value.detach().double().cpu()
        return self._summed(totals)

    def _summed(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """Add up over ranks; a rank that had only empty rows, or does not speak for its rows, knows no names."""
        if self.team.world_size == 1:
            return {name: float(value) for name, value in totals.items()}
        names = self.team.all_names(sorted(totals))
        if not names:
            return {}
        summed = self.team.sum_(torch.stack([totals.get(name, _ZERO) for name in names]))
        return {name: float(value) for name, value in zip(names, summed, strict=True)}

    def _steer_kl(self, step: Step, averages: Mapping[str, float]) -> None:
        """Move the adaptive coefficient by the KL that this step measured; the same numbers on every rank."""
        measured = step.measured_kl if self.loss.kl.place == "reward" else averages.get("actor/kl_loss")
        if measured is not None and math.isfinite(measured):
            self.kl_controller.update(measured, len(step.trained))

    def _watch_divergence(self, losses: Sequence[Mapping[str, float]]) -> None:
        for entry in losses:
            if "update/nonfinite" in entry:
                self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if entry["update/nonfinite"] else 0
        if self._nonfinite_in_a_row >= self._max_nonfinite:
            raise TrainingDiverged(
                f"gradients were not finite in {self._nonfinite_in_a_row} updates in a row (policy version "
                f"{self.policy_version}, lr {self.optimizer_settings.lr_at(self.num_updates):g}): the weights are those of the "
                f"last finite update. Lower the learning rate, or resume from an earlier checkpoint."
            )


_ZERO = torch.zeros((), dtype=torch.float64)


class _Timings:
    """Wall seconds by name."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def __call__(self, name: str) -> "_Timings":
        self._name = name
        return self

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.metrics[f"timing_s/{self._name}"] = time.perf_counter() - self._started


def batch_metrics(batch: StepBatch) -> dict[str, float]:
    """What a batch says about the rollouts, over its finished trajectories (all consumed ones, trained or not)."""
    trajectories = [t for group in batch.groups for t in group]
    metrics = {f"agentrl/{name}" if name != "frac_reward_zero_std" else name: float(v) for name, v in batch.counts.items()}
    metrics |= _spread_of("critic/rewards", [t.reward for t in trajectories])
    metrics |= _spread_of("response_length", [t.num_sampled for t in trajectories])
    metrics |= _spread_of("prompt_length", [t.segments[0].prompt_length for t in trajectories if t.segments])
    metrics |= _spread_of("num_turns", [sum(turn.kind == "model" for turn in t.turns) for t in trajectories])
    tools = [[turn for turn in t.turns if turn.kind == "tool"] for t in trajectories]
    metrics |= _spread_of("tool_call_counts", [len(calls) for calls in tools])
    if any(tools):
        metrics["tools/failure_frequency"] = float(np.mean([not turn.ok for calls in tools for turn in calls]))
    metrics |= _spread_of("training/off_policy/trajectory_staleness", [row.staleness for row in batch.rows])
    if trajectories:
        metrics["reward/mean"] = metrics["critic/rewards/mean"]
        stops = Counter(t.stop for t in trajectories)
        metrics |= {f"agentrl/stop/{stop}": count / len(trajectories) for stop, count in sorted(stops.items())}
        metrics["response_length/clip_ratio"] = stops["max_tokens"] / len(trajectories)
    terms = sorted({name for t in trajectories for name in t.reward_terms})
    for name in terms:
        values = [t.reward_terms[name] for t in trajectories if name in t.reward_terms]
        metrics[f"reward/{name}/mean"] = float(np.mean(values))
    return metrics


def _spread_of(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"{name}/mean": float(np.mean(values)), f"{name}/max": float(max(values)), f"{name}/min": float(min(values))}


def _averages(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over updates of each metric, of those that have it."""
    names = {name for entry in entries for name in entry}
    return {name: float(np.mean([e[name] for e in entries if name in e])) for name in sorted(names)}
