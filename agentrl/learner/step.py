"""The state of one step: flat arrays on the device, what frozen passes found, and the losses of its micro-batches.

Every rank holds all of a batch's numbers (they are small) and computes the same decisions from them; only models run on a rank's
own share. M is the number of sampled tokens of all rows; a *slot* is a place among them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agentrl.algorithms import correction
from agentrl.algorithms.aggregation import aggregate
from agentrl.algorithms.kl import kl_penalty
from agentrl.algorithms.losses import NEEDS_WHOLE_BATCH, policy_loss, policy_loss_parameters, value_loss
from agentrl.algorithms.trust_region_losses import random_covariance_mask, token_covariance, top_covariance_mask
from agentrl.learner.batching import BatchRow
from agentrl.learner.credit import Credit, TokenStatistics, assign_credit
from agentrl.learner.critic import Critic
from agentrl.learner.distributed import Team
from agentrl.learner.lora import adapters_off
from agentrl.learner.model import PolicyModel, empty_pass, frozen_passes, run_row
from agentrl.learner.packing import PackedRow, pack_row, plan_rows
from agentrl.learner.settings import TOKEN_STATISTICS, LossSettings
from agentrl.learner.step_arrays import PaddedView, StepArrays
from agentrl.learner.turn_mismatch import turn_mismatch, turns_of_slots


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Models:
    """What a step runs tokens through."""

    policy: PolicyModel
    reference: PolicyModel | None = None
    """A frozen model of its own; None with LoRA, where the policy without its adapters is the reference."""
    critic: Critic | None = None


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One packed row of one rank, on the device: m sampled tokens, in b rows (trajectories) of at most l of them."""

    row: PackedRow
    ids: Tensor
    """[row] int64"""
    positions: Tensor
    """[m] int64 places of the sampled tokens in the row"""
    slots: Tensor
    """[m] int64 places among the step's sampled tokens"""
    view: PaddedView
    num_tokens: int
    """Trained tokens of the whole update: all micro-batches, all ranks."""
    num_sequences: int


class Step:
    """One step's numbers. Methods that run a model are collectives."""

    def __init__(
        self,
        arrays: StepArrays,
        settings: LossSettings,
        models: Models,
        *,
        team: Team,
        micro_batch_tokens: int,
        version: int,
        kl_coef: float,
    ) -> None:
        self.arrays, self.settings, self.models, self.team = arrays, settings, models, team
        self.device = team.device
        self.version, self.kl_coef = version, kl_coef
        self._budget = micro_batch_tokens
        sampled = np.flatnonzero(arrays.sampled)
        lengths = np.diff(arrays.offsets)
        self._trajectory_of_slot = np.repeat(arrays.trajectory, lengths)[sampled]
        self._slot_of_token = np.full(len(arrays.ids), -1, dtype=np.int64)
        self._slot_of_token[sampled] = np.arange(len(sampled))
        self._turns = self._on_device(turns_of_slots(arrays.sampled, arrays.offsets))
        is_trained = arrays.is_trained[self._trajectory_of_slot]
        self.trained_slots = self._on_device(np.flatnonzero(is_trained))
        self._trained_view = PaddedView.of(self._trajectory_of_slot[is_trained], self.device)
        self.kept = self._on_device(is_trained)
        """[M] bool: trained and not rejected."""
        self.rollout_logprobs = self._on_device(arrays.rollout_logprobs[sampled])
        self._versions = self._on_device(arrays.versions[sampled])
        self.old_logprobs = self.rollout_logprobs
        self.advantages = torch.zeros_like(self.rollout_logprobs)
        self.returns = torch.zeros_like(self.rollout_logprobs)
        self.is_weights: Tensor | None = None
        self.reference_logprobs: Tensor | None = None
        self.values: Tensor | None = None
        self._is_batch_mean: float | None = None
        self._covariance_mask: Tensor | None = None
        self._proximal: Tensor | None = None
        self._squares: Tensor | None = None
        self._correction_metrics: dict[str, float] = {}
        self.credit_metrics: dict[str, float] = {}
        self.measured_kl: float | None = None
        self._seen_logprobs: Tensor | None = None
        self._seen_entropy = torch.zeros_like(self.rollout_logprobs)

    @property
    def num_slots(self) -> int:
        return len(self.kept)

    @property
    def everyone(self) -> NDArray[np.int64]:
        return np.arange(self.arrays.num_trajectories)

    @property
    def trained(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.arrays.is_trained)

    # -- what is frozen during the step -------------------------------------------------------------------------------

    def score(self) -> None:
        """Forward passes of reference, policy and critic over tokens whose numbers credit or losses need."""
        if not self.num_slots:
            return
        settings = self.settings
        in_reward = settings.kl.coef > 0 and settings.kl.place == "reward"
        if settings.kl.coef > 0:
            self.reference_logprobs = self._reference_logprobs(self.everyone if in_reward else self.trained)
        if settings.advantage in TOKEN_STATISTICS:
            self._proximal, self._squares = self._policy_pass(self.models.policy, self.everyone, with_squares=True)
        elif settings.old_logprobs == "recompute" or self._corrects_before_the_step:
            self._proximal, _ = self._policy_pass(self.models.policy, self.everyone if in_reward else self.trained)
        if settings.old_logprobs == "recompute" and settings.policy_loss != "decoupled_ppo":
            assert self._proximal is not None
            self.old_logprobs = self._proximal
        if self.models.critic is not None:
            self.values = self._values(self.models.critic)

    def assign_credit(self, rows: Sequence[BatchRow] | None) -> None:
        """Advantages and returns, computed on rank 0 and given to all. ``rows`` is None on the other ranks."""
        found = None
        if self.team.is_main:
            credit = self._credit(rows or ())
            numbers = {"kl": np.asarray([np.nan if credit.kl is None else credit.kl], dtype=np.float64)}
            found = {"advantages": credit.advantages.numpy(), "returns": credit.returns.numpy(), **numbers}
            self.credit_metrics = credit.metrics
        shared = self.team.broadcast_arrays(found)
        self.advantages, self.returns = self._on_device(shared["advantages"]), self._on_device(shared["returns"])
        self.measured_kl = None if np.isnan(shared["kl"][0]) else float(shared["kl"][0])

    def correct(self) -> None:
        """Importance weights, what is rejected, and which tokens a covariance loss treats: decided once, over the whole step."""
        settings = self.settings
        if not len(self.trained_slots):
            return
        if settings.policy_loss in NEEDS_WHOLE_BATCH:
            self._covariance_mask = self._choose_by_covariance()
        if settings.old_logprobs != "recompute" and not self._corrects_before_the_step:
            return
        proximal = self._proximal
        assert proximal is not None
        weighs = settings.is_level is not None
        corrected = correction.correct_rollout(
            self._trained_rows(proximal),
            self._trained_rows(self.rollout_logprobs),
            self._trained_rows(self.kept),
            is_level=settings.is_level,
            is_threshold=settings.is_threshold,
            is_batch_normalize=settings.is_batch_normalize,
            rules=settings.rejection_rules,
            thresholds=settings.rejection_thresholds,
        )
        self._correction_metrics = {name: float(value) for name, value in corrected.metrics.items()}
        if weighs and settings.is_pure:
            if settings.is_batch_normalize:
                # Before the first update the current policy is the one that was just measured.
                self._is_batch_mean = self._correction_metrics["rollout_corr/rollout_is_batch_norm_factor"]
        elif corrected.weights is not None:
            self.is_weights = self._over_slots(self._trained_view.unpad(corrected.weights))
        self.kept = self._over_slots(self._trained_view.unpad(corrected.mask)).bool()

    # -- how it is cut ------------------------------------------------------------------------------------------------

    def minibatches(self) -> Iterator[NDArray[np.int64]]:
        """Trained trajectories of each update, whole groups together."""
        trained = self.trained
        groups = np.unique(self.arrays.group[trained])
        for chosen in np.array_split(groups, self.settings.num_minibatches):
            if len(chosen) or not len(groups):
                yield trained[np.isin(self.arrays.group[trained], chosen)]

    def num_tokens(self, trajectories: NDArray[np.int64]) -> int:
        """Trained tokens of these trajectories, on all ranks, without what was rejected."""
        of_update = np.isin(self._trajectory_of_slot, trajectories)
        return int((of_update & self.kept.cpu().numpy()).sum())

    def micro_batches(self, trajectories: NDArray[np.int64]) -> list[MicroBatch]:
        """This rank's packed rows, which it may share with others of its sequence group."""
        if not len(trajectories):
            return []
        items, names = self._items(trajectories)
        lengths = [int(sum(self.arrays.offsets[s + 1] - self.arrays.offsets[s] for s in item)) for item in items]
        plan = plan_rows(lengths, budget_tokens=self._budget, num_ranks=self.team.num_row_groups, names=names)
        num_tokens = self.num_tokens(trajectories)
        num_sequences = int(np.isin(trajectories, self._trajectory_of_slot[self.kept.cpu().numpy()]).sum())
        return [
            self._micro_batch([s for i in chosen for s in items[i]], num_tokens, num_sequences)
            for chosen in plan[self.team.row_group]
        ]

    # -- losses -------------------------------------------------------------------------------------------------------

    def policy_loss(self, micro: MicroBatch, *, collect: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the update's loss, and metrics whose sum over all shares is the update's value."""
        if not micro.row.num_tokens:
            return empty_pass(self.models.policy, self.team), {}
        settings, pad, slots = self.settings, micro.view.pad, micro.slots
        logprobs, entropy = run_row(self.models.policy, micro.ids, micro.row, micro.positions)
        if collect:
            if self._seen_logprobs is None:
                self._seen_logprobs = torch.zeros_like(self.rollout_logprobs)
            if self.team.speaks_for_rows:
                self._seen_logprobs[slots], self._seen_entropy[slots] = logprobs.detach(), entropy.detach()
        padded, mask = pad(logprobs), pad(self.kept[slots])
        reduction = self._reduction(micro)
        loss, metrics = policy_loss(
            settings.policy_loss,
            log_probs=padded,
            old_log_probs=pad(self.old_logprobs[slots]),
            advantages=pad(self.advantages[slots]),
            mask=mask,
            rollout_is_weights=pad(self.is_weights[slots]) if self.is_weights is not None else None,
            **reduction,
            **settings.policy_params,
            **self._loss_inputs(micro),
        )
        parts: dict[str, Tensor] = {"actor/pg_loss": loss}
        parts |= {f"actor/{name}": torch.as_tensor(value) for name, value in metrics.items()}
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * aggregate(pad(entropy), mask, **reduction)
        if self.reference_logprobs is not None and settings.kl.place == "loss":
            penalty = kl_penalty(padded, pad(self.reference_logprobs[slots]), settings.kl.estimator_name, mask=mask)
            kl = aggregate(penalty, mask, **reduction)
            loss = loss + self.kl_coef * kl
            parts["actor/kl_loss"] = kl
        return loss, parts | {"actor/loss": loss}

    def value_loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `policy_loss`, for the critic."""
        critic = self.models.critic
        assert critic is not None
        if not micro.row.num_tokens:
            return critic.empty_pass(self.team), {}
        assert self.values is not None
        pad, slots = micro.view.pad, micro.slots
        loss, clipfrac = value_loss(
            vpreds=pad(critic.values(micro.ids, micro.row, micro.positions)),
            returns=pad(self.returns[slots]),
            values=pad(self.values[slots]),
            mask=pad(self.kept[slots]),
            cliprange_value=critic.settings.cliprange_value,
            **self._reduction(micro),
        )
        return loss, {"critic/vf_loss": loss, "critic/vf_clipfrac": clipfrac}

    # -- what to report -----------------------------------------------------------------------------------------------

    def collect_over_ranks(self) -> None:
        """Put together what the ranks saw: each token was seen by exactly one of those that speak for their rows."""
        if self._seen_logprobs is not None:
            self._seen_logprobs = self._summed(self._seen_logprobs)
            self._seen_entropy = self._summed(self._seen_entropy)

    def metrics(self) -> dict[str, float]:
        """Of the trained tokens, from the first pass's logprobs, which on one update per batch are those before it."""
        slots = self.trained_slots
        if not len(slots):
            return dict(self.credit_metrics)
        return {
            **self._gap_metrics(slots),
            **self._correction_metrics,
            **self.credit_metrics,
            **_spread("critic/advantages", self.advantages[slots]),
            **_spread("critic/returns", self.returns[slots]),
            **self._value_metrics(slots),
        }

    def _gap_metrics(self, slots: Tensor) -> dict[str, float]:
        if self._seen_logprobs is None:  # the critic's warm-up: the policy did not run
            return {}
        seen, rollout = self._seen_logprobs, self.rollout_logprobs
        mask = self._trained_rows(torch.ones_like(self.kept))
        measured = correction.offpolicy_metrics(self._trained_rows(seen), self._trained_rows(rollout), mask)
        gap = (seen[slots].exp() - rollout[slots].exp()).abs()
        return {
            **{f"rollout_corr/{name}": float(value) for name, value in measured.items()},
            "training/rollout_probs_diff_mean": float(gap.mean()),
            "training/rollout_probs_diff_max": float(gap.max()),
            "training/rollout_probs_diff_std": float(gap.std(correction=0)),
            **turn_mismatch(seen[slots], rollout[slots], self._turns[slots]),
            "actor/entropy": float(self._seen_entropy[slots].mean()),
        }

    def _value_metrics(self, slots: Tensor) -> dict[str, float]:
        if self.values is None:
            return {}
        values, returns = self.values[slots], self.returns[slots]
        unexplained, spread = float((returns - values).var(correction=0)), float(returns.var(correction=0))
        return {
            **_spread("critic/values", values),
            "critic/vf_explained_var": 1.0 - unexplained / spread if spread > 0 else 0.0,
        }

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _corrects_before_the_step(self) -> bool:
        """Whether weights or rejection need the current policy's logprobs although nothing is anchored at them."""
        settings = self.settings
        return settings.rejection_rules is not None or (settings.is_pure and settings.is_batch_normalize)

    def _credit(self, rows: Sequence[BatchRow]) -> Credit:
        logprobs = self._proximal if self._proximal is not None else self.rollout_logprobs
        found = TokenStatistics(
            logprobs=logprobs.cpu(),
            reference=None if self.reference_logprobs is None else self.reference_logprobs.cpu(),
            sum_pi_squared=None if self._squares is None else self._squares.cpu(),
            values=None if self.values is None else self.values.cpu(),
        )
        return assign_credit(rows, self.settings, kl_coef=self.kl_coef, found=found)

    def _loss_inputs(self, micro: MicroBatch) -> dict[str, Any]:
        """What single losses take besides the common inputs."""
        settings, pad, slots = self.settings, micro.view.pad, micro.slots
        inputs: dict[str, Any] = {}
        if settings.is_pure:
            inputs |= {
                "is_level": settings.is_level, "is_threshold": settings.is_threshold, "is_batch_mean": self._is_batch_mean,
            }  # fmt: skip
        if self._covariance_mask is not None:
            inputs["covariance_mask"] = pad(self._covariance_mask[slots])
        if settings.policy_loss == "decoupled_ppo":
            if settings.old_logprobs == "recompute":
                assert self._proximal is not None
                inputs["proximal_log_probs"] = pad(self._proximal[slots])
            elif settings.old_logprobs == "loglinear":
                inputs |= {"versions": pad(self._versions[slots]), "proximal_version": self.version}
        return inputs

    def _choose_by_covariance(self) -> Tensor:
        """[M] bool, from the logprobs before the step, where no ratio is clipped yet."""
        defaults = policy_loss_parameters(self.settings.policy_loss) | dict(self.settings.policy_params)
        mask = self._trained_rows(self.kept)
        covariance = token_covariance(self._trained_rows(self.advantages), self._trained_rows(self.old_logprobs), mask)
        if self.settings.policy_loss == "kl_cov":
            chosen = top_covariance_mask(covariance, mask, share=defaults["kl_cov_ratio"])
        else:
            chosen = random_covariance_mask(
                covariance, mask, count=max(int(defaults["clip_cov_ratio"] * int(mask.sum())), 1),
                lower=defaults["clip_cov_lb"], upper=defaults["clip_cov_ub"],
                generator=torch.Generator().manual_seed(self.version),  # the same choice on every rank
            )  # fmt: skip
        return self._over_slots(self._trained_view.unpad(chosen))

    def _reduction(self, micro: MicroBatch) -> dict[str, Any]:
        return {
            "loss_agg_mode": self.settings.loss_agg_mode, "num_tokens": micro.num_tokens, "num_sequences": micro.num_sequences,
            "horizon": self.settings.horizon,
        }  # fmt: skip

    def _reference_logprobs(self, trajectories: NDArray[np.int64]) -> Tensor:
        if self.models.reference is not None:
            return self._policy_pass(self.models.reference, trajectories)[0]
        return self._policy_pass(self.models.policy, trajectories, around=adapters_off(self.models.policy))[0]

    def _policy_pass(
        self,
        policy: PolicyModel,
        trajectories: NDArray[np.int64],
        *,
        with_squares: bool = False,
        around: AbstractContextManager[None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[M] logprobs and sums of squared probabilities (or zeros) under frozen weights, on every rank."""
        also = "squares" if with_squares else None

        def run(micro: MicroBatch) -> tuple[Tensor, ...]:
            return run_row(policy, micro.ids, micro.row, micro.positions, also=also)

        with around or nullcontext():
            logprobs, squares = self._frozen(policy, trajectories, run, lambda: empty_pass(policy, self.team), count=2)
        return logprobs, squares

    def _values(self, critic: Critic) -> Tensor:
        """[M] of all rows: whitening looks at every one."""

        def run(micro: MicroBatch) -> tuple[Tensor, ...]:
            return (critic.values(micro.ids, micro.row, micro.positions),)

        return self._frozen(critic.model, self.everyone, run, lambda: critic.empty_pass(self.team), count=1)[0]

    def _frozen(
        self,
        model: nn.Module,
        trajectories: NDArray[np.int64],
        run: Callable[[MicroBatch], tuple[Tensor, ...]],
        run_empty: Callable[[], Tensor],
        *,
        count: int,
    ) -> list[Tensor]:
        found = [torch.zeros_like(self.rollout_logprobs) for _ in range(count)]
        with frozen_passes(model):
            for micro in self.micro_batches(trajectories):
                if not micro.row.num_tokens:
                    run_empty()
                    continue
                for target, values in zip(found, run(micro), strict=True):
                    if self.team.speaks_for_rows:
                        target[micro.slots] = values
        return [self._summed(values) for values in found]

    def _micro_batch(self, sequences: Sequence[int], num_tokens: int, num_sequences: int) -> MicroBatch:
        row = pack_row(self.arrays.offsets, sequences)
        positions = np.flatnonzero(self.arrays.sampled[row.token_index])
        slots = self._slot_of_token[row.token_index[positions]]
        return MicroBatch(
            row=row,
            ids=self._on_device(self.arrays.ids[row.token_index].astype(np.int64)),
            positions=self._on_device(positions),
            slots=self._on_device(slots),
            view=PaddedView.of(self._trajectory_of_slot[slots], self.device),
            num_tokens=num_tokens,
            num_sequences=num_sequences,
        )

    def _items(self, trajectories: NDArray[np.int64]) -> tuple[list[list[int]], list[str]]:
        """What packing must keep together: a trajectory's segments, unless it is too long and the loss allows to part them."""
        may_part = self.settings.may_part_segments
        items: list[list[int]] = []
        names: list[str] = []
        starts = np.searchsorted(self.arrays.trajectory, trajectories, side="left")
        ends = np.searchsorted(self.arrays.trajectory, trajectories, side="right")
        for trajectory, start, end in zip(trajectories, starts, ends, strict=True):
            whole = list(range(int(start), int(end)))
            length = int(self.arrays.offsets[end] - self.arrays.offsets[start])
            parts = [[s] for s in whole] if may_part and length > self._budget else [whole]
            items += parts
            names += [f"trajectory {trajectory} of the batch, segment(s) {[s - int(start) for s in part]}," for part in parts]
        return items, names

    def _trained_rows(self, values: Tensor) -> Tensor:
        """[M] -> [b, l], one row per trained trajectory."""
        return self._trained_view.pad(values[self.trained_slots])

    def _over_slots(self, of_trained: Tensor) -> Tensor:
        """[trained tokens] -> [M], zeros (False) elsewhere."""
        return of_trained.new_zeros(self.num_slots).index_put((self.trained_slots,), of_trained)

    def _summed(self, values: Tensor) -> Tensor:
        if self.team.world_size == 1:
            return values
        return self.team.sum_(values.cpu()).to(self.device)

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _spread(name: str, values: Tensor) -> dict[str, float]:
    return {f"{name}/mean": float(values.mean()), f"{name}/max": float(values.max()), f"{name}/min": float(values.min())}
