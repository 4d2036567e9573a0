"""One step of learning: advantages, off-policy correction, packed micro-batches, one or more optimizer updates, metrics.

The loss is normalised by the step's global counts, so how the batch is cut into micro-batches, minibatch rows and ranks does
not matter (I8). On more than one rank every method named a collective must be called on all of them; rank 0 alone has the
batch and gets the metrics.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentrl.algorithms import correction
from agentrl.algorithms.advantages import compute_advantages
from agentrl.algorithms.aggregation import aggregate
from agentrl.algorithms.kl import kl_penalty
from agentrl.algorithms.losses import NEEDS_WHOLE_BATCH, policy_loss, policy_loss_parameters
from agentrl.errors import ConfigError, TrainingDiverged
from agentrl.learner.batching import StepBatch
from agentrl.learner.distributed import Team
from agentrl.learner.model import (
    PACKING_TOLERANCE,
    PACKING_TOLERANCE_HALF,
    check_packing,
    empty_pass,
    frozen_passes,
    full_state,
    load_policy,
    run_row,
    write_hf_directory,
)
from agentrl.learner.optim import OptimizerSettings, build_optimizer, update
from agentrl.learner.packing import PackedRow, pack_row, plan_rows
from agentrl.learner.step_arrays import PaddedView, StepArrays, compact_rewards, flatten

logger = logging.getLogger(__name__)

NEEDS_MORE = {"gae": "a critic", "remax": "greedy baselines", "optimal_token_baseline": "logprob statistics"}
"""Advantages that this learner cannot feed, and what they lack."""

WHOLE_SEQUENCE_LOSSES = frozenset({"gspo", "geo_mean"})
"""Losses whose tokens depend on their whole row, which must therefore not be cut over micro-batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What is minimised. Names and parameters are those of `agentrl.algorithms`."""

    advantage: str = "grpo"
    advantage_params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    policy_loss: str = "ppo"
    policy_params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loss_agg_mode: str = "token-mean"
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """PPO's anchor: the sampler's logprobs, or the weights' own before the update (decoupled; pair it with ``is_level``)."""
    is_level: Literal["token", "sequence"] | None = None
    """Importance weights rollout -> old policy (TIS); only with ``recompute``, elsewhere the ratio itself is that weight."""
    is_threshold: float | str = 2.0
    is_batch_normalize: bool = False
    rejection_rules: str | None = None
    rejection_thresholds: float | str | None = None
    kl_coef: float = 0.0
    """Factor of the KL loss against the frozen reference; 0 loads no reference."""
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    """Factor of the entropy bonus."""
    use_turn_rewards: bool = False
    """Place per-turn rewards at their tokens; matters to advantages that look at tokens."""
    horizon: int | None = None
    """Constant length of ``seq-mean-token-sum-norm``: the longest response allowed."""
    num_epochs: int = 1
    """Passes over each batch."""
    num_minibatches: int = 1
    """Optimizer updates per pass; groups stay together."""


class Learner:
    """The policy under training, its optimizer and its version.

    ``policy_version`` counts `step` calls: one per published version, whatever ``num_epochs * num_minibatches`` updates it
    took. A step whose gradients were not finite, or that had nothing to train on, counts too and leaves the weights alone.

    Args:
        model_path: Hugging Face directory to start from; also the source of tokenizer files in every snapshot.
        team: this process's ranks (`start_team`).
        optimizer: how gradients become weights.
        loss: what is minimised.
        micro_batch_tokens: most tokens in one forward pass; no trajectory segment may be longer.
        temperature: the sampler's.
        dtype: ``bf16`` computes in bf16 over fp32 master weights and writes bf16 snapshots.
        chunk_size: tokens whose logits exist at a time.
        gradient_checkpointing: compute activations again in backward instead of keeping them.
        reference_path: frozen reference for the KL loss; None takes ``model_path``.
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
        micro_batch_tokens: int = 16384,
        temperature: float = 1.0,
        dtype: Literal["fp32", "bf16"] = "fp32",
        chunk_size: int = 1024,
        gradient_checkpointing: bool = False,
        reference_path: str | Path | None = None,
        max_nonfinite_steps: int = 3,
    ) -> None:
        self.loss = loss or LossSettings()
        _check_settings(self.loss, temperature)
        self.team = team
        self.model_path = Path(model_path)
        self.dtype: Literal["fp32", "bf16"] = dtype
        self.optimizer_settings = optimizer
        self.micro_batch_tokens = micro_batch_tokens
        options: dict[str, Any] = {"dtype": dtype, "temperature": temperature, "chunk_size": chunk_size}
        self.policy = load_policy(model_path, team, gradient_checkpointing=gradient_checkpointing, **options)
        tolerance = PACKING_TOLERANCE if dtype == "fp32" else PACKING_TOLERANCE_HALF
        check_packing(self.policy, team, tolerance=tolerance)
        self.reference = (
            load_policy(reference_path or model_path, team, trainable=False, **options) if self.loss.kl_coef else None
        )
        self.optimizer = build_optimizer(self.policy, optimizer)
        self.policy_version = 0
        self.num_updates = 0
        self.num_skipped_updates = 0
        self._nonfinite_in_a_row = 0
        self._max_nonfinite = max_nonfinite_steps

    def step(self, batch: StepBatch | None) -> dict[str, float]:
        """Learn from one batch; a collective.

        Args:
            batch: on rank 0; the other ranks pass None.

        Returns:
            Metrics (rank 0; empty elsewhere). ``update/skipped`` is 1 when the weights did not change.

        Raises:
            TrainingDiverged: gradients were not finite ``max_nonfinite_steps`` times in a row.
            DataError: a sequence longer than ``micro_batch_tokens``.
        """
        started = time.perf_counter()
        timings = _Timings()
        with timings("adv"):
            arrays = self._share(batch)
        step = _Step(self, arrays)
        losses: list[dict[str, float]] = []
        with timings("old_log_prob"):
            step.prepare()
        with timings("update"):
            for epoch in range(self.loss.num_epochs):
                for trajectories in step.minibatches():
                    losses.append(self._update(step, trajectories, collect=epoch == 0))
            step.collect_over_ranks()
        was_updated = any(entry["update/applied"] for entry in losses)
        self._watch_divergence(losses)
        self.policy_version += 1
        if batch is None or not self.team.is_main:
            return {}
        metrics = _averages(losses) | step.metrics() | batch_metrics(batch)
        seconds = time.perf_counter() - started
        return metrics | timings.metrics | {
            "step": self.policy_version,
            "policy_version": self.policy_version,
            "training/global_step": self.policy_version,
            "update/skipped": float(not was_updated),
            "update/skipped_total": self.num_skipped_updates,
            "timing_s/step": seconds,
            "perf/total_num_tokens": len(arrays.ids),
            "perf/throughput": len(arrays.ids) / seconds / self.team.world_size,
        }  # fmt: skip

    def export(self, directory: Path) -> None:
        """Write the weights as a Hugging Face directory (rank 0 writes); a collective. Not durable until synced."""
        state = full_state(self.policy)
        if self.team.is_main:
            source = self.model_path if self.model_path.is_dir() else None
            write_hf_directory(directory, state, self.policy, source=source, dtype=self.dtype)

    def _share(self, batch: StepBatch | None) -> StepArrays:
        if not self.team.is_main:
            return StepArrays.from_mapping(self.team.broadcast_arrays(None))
        if batch is None:
            raise ValueError("rank 0 must pass the batch")
        arrays = flatten(batch.rows, self._advantages(batch))
        return StepArrays.from_mapping(self.team.broadcast_arrays(arrays.as_mapping()))

    def _advantages(self, batch: StepBatch) -> NDArray[np.float32]:
        """[B, L] over all finished members, trained or not: group statistics use every one of them."""
        rewards, mask = compact_rewards(batch.rows, use_turn_rewards=self.loss.use_turn_rewards)
        if not batch.rows:
            return np.zeros((0, 0), dtype=np.float32)
        groups = torch.tensor([row.group for row in batch.rows])
        advantages, _ = compute_advantages(
            self.loss.advantage, rewards=rewards, mask=mask, groups=groups, **self.loss.advantage_params
        )
        return advantages.float().numpy()

    def _update(self, step: "_Step", trajectories: NDArray[np.int64], *, collect: bool) -> dict[str, float]:
        """One optimizer update from some of the step's trajectories."""
        totals: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        for micro in step.micro_batches(trajectories):
            loss, parts = step.loss(micro, collect=collect)
            # FSDP averages gradients over ranks; the loss is already divided by the global count, so the mean is undone.
            (loss * self.team.world_size).backward()
            for name, value in parts.items():
                totals[name] += value.detach().double().cpu()
        names = sorted(totals)
        summed = self.team.sum_(torch.stack([totals[name] for name in names])) if names else torch.zeros(0)
        metrics = {name: float(value) for name, value in zip(names, summed, strict=True)}
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


@dataclass(frozen=True, slots=True, eq=False)
class _MicroBatch:
    """One packed row of one rank, on the device. m loss tokens, b rows (trajectories) of at most l loss tokens."""

    row: PackedRow
    ids: Tensor
    """[row] int64"""
    loss_positions: Tensor
    """[m] int64 places in the row"""
    slots: Tensor
    """[m] int64 places among the step's loss tokens"""
    view: PaddedView
    num_tokens: int
    """Loss tokens of the whole update: all micro-batches, all ranks."""
    num_sequences: int


class _Step:
    """The per-step state: flat arrays on the device and what was collected from the forward passes."""

    def __init__(self, learner: Learner, arrays: StepArrays) -> None:
        self.learner, self.arrays, self.settings = learner, arrays, learner.loss
        self.device = learner.team.device
        self.loss_tokens = np.flatnonzero(arrays.loss_mask)
        lengths = np.diff(arrays.offsets)
        self.trajectory_of_token = np.repeat(arrays.trajectory, lengths)
        self.slot_of_token = np.full(len(arrays.ids), -1, dtype=np.int64)
        self.slot_of_token[self.loss_tokens] = np.arange(len(self.loss_tokens))
        self.view = PaddedView.of(self.trajectory_of_token[self.loss_tokens], self.device)
        self.rollout_logprobs = self._on_device(arrays.rollout_logprobs[self.loss_tokens])
        self.advantages = self._on_device(arrays.advantages[self.loss_tokens])
        self.old_logprobs = self.rollout_logprobs
        self.is_weights: Tensor | None = None
        self.kept = torch.ones(len(self.loss_tokens), dtype=torch.bool, device=self.device)
        self.correction_metrics: dict[str, float] = {}
        self.seen_logprobs = torch.zeros(len(self.loss_tokens), device=self.device)
        self.seen_entropy = torch.zeros_like(self.seen_logprobs)
        self.reference_logprobs: Tensor | None = None

    def prepare(self) -> None:
        """Compute what is frozen during the step: reference and proximal logprobs, weights, what is rejected."""
        if not len(self.loss_tokens):
            return
        if self.learner.reference is not None:
            self.reference_logprobs = self._logprobs_of(self.learner.reference)
        if self.settings.old_logprobs == "recompute":
            self.old_logprobs = self._logprobs_of(self.learner.policy)
        elif self.settings.rejection_rules is None:
            return
        proximal = self.old_logprobs
        if self.settings.old_logprobs == "rollout":
            proximal = self._logprobs_of(self.learner.policy)
        mask = self.view.pad(self.kept)
        corrected = correction.correct_rollout(
            self.view.pad(proximal),
            self.view.pad(self.rollout_logprobs),
            mask,
            is_level=self.settings.is_level,
            is_threshold=self.settings.is_threshold,
            is_batch_normalize=self.settings.is_batch_normalize,
            rules=self.settings.rejection_rules,
            thresholds=self.settings.rejection_thresholds,
        )
        if corrected.weights is not None:
            self.is_weights = self.view.unpad(corrected.weights)
        self.kept = self.view.unpad(corrected.mask).bool()
        self.correction_metrics = {name: float(value) for name, value in corrected.metrics.items()}

    def minibatches(self) -> Iterator[NDArray[np.int64]]:
        """Trajectories of each update, whole groups together."""
        groups = np.unique(self.arrays.group)
        for chosen in np.array_split(groups, self.settings.num_minibatches):
            if len(chosen) or not len(groups):
                yield np.flatnonzero(np.isin(self.arrays.group, chosen))

    def num_tokens(self, trajectories: NDArray[np.int64]) -> int:
        """Loss tokens of these trajectories, on all ranks, without what was rejected."""
        of_update = np.isin(self.trajectory_of_token[self.loss_tokens], trajectories)
        return int((of_update & self.kept.cpu().numpy()).sum())

    def micro_batches(self, trajectories: NDArray[np.int64]) -> Iterator[_MicroBatch]:
        """This rank's packed rows."""
        if not len(trajectories):
            return
        items, names = self._items(trajectories)
        lengths = [int(sum(self.arrays.offsets[s + 1] - self.arrays.offsets[s] for s in item)) for item in items]
        plan = plan_rows(
            lengths, budget_tokens=self.learner.micro_batch_tokens, num_ranks=self.learner.team.world_size, names=names
        )
        num_tokens = self.num_tokens(trajectories)
        kept_of = self.trajectory_of_token[self.loss_tokens][self.kept.cpu().numpy()]
        num_sequences = int(np.isin(trajectories, kept_of).sum())
        for chosen in plan[self.learner.team.rank]:
            row = pack_row(self.arrays.offsets, [s for i in chosen for s in items[i]])
            loss_positions = np.flatnonzero(self.arrays.loss_mask[row.token_index])
            slots = self.slot_of_token[row.token_index[loss_positions]]
            yield _MicroBatch(
                row=row,
                ids=self._on_device(self.arrays.ids[row.token_index].astype(np.int64)),
                loss_positions=self._on_device(loss_positions),
                slots=self._on_device(slots),
                view=PaddedView.of(self.trajectory_of_token[self.loss_tokens[slots]], self.device),
                num_tokens=num_tokens,
                num_sequences=num_sequences,
            )

    def loss(self, micro: _MicroBatch, *, collect: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the update's loss, and metrics whose sum over all shares is the update's value."""
        if not micro.row.num_tokens:
            return empty_pass(self.learner.policy, self.learner.team), {}
        settings, pad, slots = self.settings, micro.view.pad, micro.slots
        logprobs, entropy = run_row(self.learner.policy, micro.ids, micro.row, micro.loss_positions)
        if collect:
            self.seen_logprobs[slots], self.seen_entropy[slots] = logprobs.detach(), entropy.detach()
        padded, mask = pad(logprobs), pad(self.kept[slots])
        reduction: dict[str, Any] = {
            "loss_agg_mode": settings.loss_agg_mode,
            "num_tokens": micro.num_tokens,
            "num_sequences": micro.num_sequences,
            "horizon": settings.horizon,
        }
        loss, metrics = policy_loss(
            settings.policy_loss,
            log_probs=padded,
            old_log_probs=pad(self.old_logprobs[slots]),
            advantages=pad(self.advantages[slots]),
            mask=mask,
            rollout_is_weights=pad(self.is_weights[slots]) if self.is_weights is not None else None,
            **reduction,
            **settings.policy_params,
        )
        parts: dict[str, Tensor] = {"actor/pg_loss": loss}
        parts |= {_actor_name(name): torch.as_tensor(value) for name, value in metrics.items()}
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * aggregate(pad(entropy), mask, **reduction)
        if self.reference_logprobs is not None:
            penalty = kl_penalty(padded, pad(self.reference_logprobs[slots]), settings.kl_estimator)
            kl = aggregate(penalty, mask, **reduction)
            loss = loss + settings.kl_coef * kl
            parts["actor/kl_loss"] = kl
        return loss, parts | {"actor/loss": loss}

    def metrics(self) -> dict[str, float]:
        """Of the whole batch, from the first pass's logprobs, which on one update per batch are those before it."""
        if not len(self.loss_tokens):
            return {}
        pad = self.view.pad
        mask = pad(torch.ones_like(self.kept))
        measured = correction.offpolicy_metrics(pad(self.seen_logprobs), pad(self.rollout_logprobs), mask)
        gap = (self.seen_logprobs.exp() - self.rollout_logprobs.exp()).abs()
        advantages = self.advantages
        return {
            **{f"rollout_corr/{name}": float(value) for name, value in measured.items()},
            **self.correction_metrics,
            "training/rollout_probs_diff_mean": float(gap.mean()),
            "training/rollout_probs_diff_max": float(gap.max()),
            "training/rollout_probs_diff_std": float(gap.std(correction=0)),
            "actor/entropy": float(self.seen_entropy.mean()),
            "critic/advantages/mean": float(advantages.mean()),
            "critic/advantages/max": float(advantages.max()),
            "critic/advantages/min": float(advantages.min()),
        }

    def collect_over_ranks(self) -> None:
        """Put together what the ranks saw: each token was seen on exactly one of them."""
        self.seen_logprobs = self._summed(self.seen_logprobs)
        self.seen_entropy = self._summed(self.seen_entropy)

    def _logprobs_of(self, policy: Any) -> Tensor:
        """[M] of all loss tokens under frozen weights, on every rank."""
        found = torch.zeros(len(self.loss_tokens), device=self.device)
        with frozen_passes(policy):
            for micro in self.micro_batches(np.arange(self.arrays.num_trajectories)):
                if micro.row.num_tokens:
                    found[micro.slots] = run_row(policy, micro.ids, micro.row, micro.loss_positions, with_entropy=False)[0]
                else:
                    empty_pass(policy, self.learner.team)
        return self._summed(found)

    def _summed(self, values: Tensor) -> Tensor:
        if self.learner.team.world_size == 1:
            return values
        return self.learner.team.sum_(values.cpu()).to(self.device)

    def _items(self, trajectories: NDArray[np.int64]) -> tuple[list[list[int]], list[str]]:
        """What packing must keep together: a trajectory's segments, unless it is too long and the loss allows to part them."""
        budget = self.learner.micro_batch_tokens
        may_part = self.settings.loss_agg_mode in ("token-mean", "token-sum") and (
            self.settings.policy_loss not in WHOLE_SEQUENCE_LOSSES
        )
        items: list[list[int]] = []
        names: list[str] = []
        starts = np.searchsorted(self.arrays.trajectory, trajectories, side="left")
        ends = np.searchsorted(self.arrays.trajectory, trajectories, side="right")
        for trajectory, start, end in zip(trajectories, starts, ends, strict=True):
            whole = list(range(int(start), int(end)))
            length = int(self.arrays.offsets[end] - self.arrays.offsets[start])
            parts = [[s] for s in whole] if may_part and length > budget else [whole]
            items += parts
            names += [f"trajectory {trajectory} of the batch, segment(s) {[s - int(start) for s in part]}," for part in parts]
        return items, names

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


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
    metrics |= _spread_of("training/off_policy/trajectory_staleness", [row.staleness for row in batch.rows])
    if trajectories:
        metrics["reward/mean"] = metrics["critic/rewards/mean"]
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


def _actor_name(name: str) -> str:
    return name if "/" in name else f"actor/{name}"


def _check_settings(loss: LossSettings, temperature: float) -> None:
    for prefix, lacks in NEEDS_MORE.items():
        if loss.advantage.removeprefix("tir_").startswith(prefix):
            raise ConfigError(f"advantage={loss.advantage} needs {lacks}, which this learner does not compute: use grpo, rloo, …")
    if loss.old_logprobs not in ("rollout", "recompute"):
        raise ConfigError(f"old_logprobs={loss.old_logprobs!r} is not known: use rollout or recompute.")
    if loss.is_level is not None and loss.old_logprobs == "rollout":
        raise ConfigError(
            f"is_level={loss.is_level} with old_logprobs=rollout would count the off-policy ratio twice: set "
            f"old_logprobs=recompute or is_level=null."
        )
    try:
        unknown = sorted(set(loss.policy_params) - set(policy_loss_parameters(loss.policy_loss)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if unknown:
        known = ", ".join(policy_loss_parameters(loss.policy_loss))
        raise ConfigError(f"policy_loss={loss.policy_loss} has no parameter {', '.join(unknown)}: it has {known}.")
    if loss.policy_loss in NEEDS_WHOLE_BATCH:
        logger.warning("policy_loss=%s compares tokens within a micro-batch: its result depends on the cut", loss.policy_loss)
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature} must be positive: it divides the logits.")
    if loss.num_epochs < 1 or loss.num_minibatches < 1:
        raise ConfigError(f"num_epochs={loss.num_epochs} and num_minibatches={loss.num_minibatches} must be at least 1.")
