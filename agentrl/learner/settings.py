"""What a step minimises, as values; and the check that refuses, before anything is loaded, what could not work.

Names and parameters are those of `agentrl.algorithms`. `check_settings` also runs the chosen functions once on a 2 x 2 example,
so that an option out of range is an error at start-up and not after the first batch.
"""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from agentrl.algorithms import correction
from agentrl.algorithms.advantages import ADVANTAGES, advantage_parameters, compute_advantages
from agentrl.algorithms.kl import ESTIMATORS, AdaptiveKLController, FixedKLController, kl_penalty
from agentrl.algorithms.losses import LOSS_AGG_MODES, POLICY_LOSSES, policy_loss, policy_loss_parameters
from agentrl.algorithms.shaping import overlong_penalty
from agentrl.errors import ConfigError
from agentrl.learner.optim import OptimizerSettings

TURN_ADVANTAGES = frozenset({"turn_grpo", "turn_return", "gigpo"})
"""Estimators that look at turns; per-turn rewards lie at their tokens for them."""

TOKEN_STATISTICS = frozenset({"optimal_token_baseline", "tir_optimal_token_baseline"})
"""Estimators that need each token's logprob and the sum of squared probabilities, hence a forward pass before the step."""

GROUPLESS_ADVANTAGES = frozenset({"gae", "reinforce_plus_plus", "remax"})
"""Estimators that compare nothing within a group: a group of one, or one without spread, teaches them as much as any other."""

BASELINE_ADVANTAGES = frozenset({"remax"})
"""Estimators that take off the reward of a greedy rollout of the same task, which comes with the group's close."""

WHOLE_SEQUENCE_LOSSES = frozenset({"gspo", "geo_mean"})
"""Losses whose tokens depend on their whole row, which must therefore not be cut over micro-batches."""

SUPPLIED = frozenset({
    "old_log_probs", "sum_pi_squared", "rollout_is_weights", "turn_ids", "anchor_ids", "reward_terms", "reward_baselines",
    "covariance_mask", "generator", "proximal_log_probs", "versions", "proximal_version", "is_batch_mean",
})  # fmt: skip
"""Inputs of estimators and losses that come from the batch, not from a configuration."""

DEFAULT_KL_ESTIMATOR = {"loss": "k3", "reward": "k1"}
"""k3 is the usual loss; in the reward only the value counts, and k1's has no bias and the sum over tokens is the log-ratio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlong:
    """DAPO's soft punishment of long answers, added to the reward (arXiv:2503.14476, eq. 13).

    Only sampled tokens count. Whether a group has spread is judged before it, on the env's own reward, as DAPO filters.
    """

    max_length: int
    """Sampled tokens at which the penalty is full."""
    buffer: int
    """Tokens before it over which the penalty grows."""
    penalty: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KLSettings:
    """How the policy is held near the frozen reference."""

    coef: float = 0.0
    """Weight; 0 loads no reference. The adaptive controller starts from it."""
    place: Literal["loss", "reward"] = "loss"
    """A term of the loss, or taken off each token's reward before advantages (then group statistics see it too)."""
    estimator: str | None = None
    """One of `ESTIMATORS`; None: k3 in the loss, k1 in the reward."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    target: float = 0.1
    """KL per token, in nats, that the adaptive controller steers to."""
    horizon: float = 10_000.0
    """Trajectories over which the adaptive controller reacts."""

    @property
    def estimator_name(self) -> str:
        return self.estimator or DEFAULT_KL_ESTIMATOR[self.place]

    def start_controller(self) -> FixedKLController | AdaptiveKLController:
        if self.controller == "fixed":
            return FixedKLController(self.coef)
        return AdaptiveKLController(self.coef, target=self.target, horizon=self.horizon)


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticSettings:
    """The value model of PPO: what ``advantage="gae"`` needs."""

    optimizer: OptimizerSettings
    path: str | Path | None = None
    """Directory to start from; None takes the policy's. The value head starts at zero."""
    warmup_steps: int = 0
    """First steps that train the critic alone; the policy stays as it is."""
    cliprange_value: float | None = 0.5
    """How far a value may move in one step before its loss is clipped; None: not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What is minimised.

    The off-policy modes, for data that came from other weights or other kernels than the learner's:

    * *bypass*: ``old_logprobs="rollout"``. The ratio is current / rollout, so the policy loss itself corrects; rejection may help.
    * *decoupled*: ``old_logprobs="recompute"``. The clip is around the weights before the step; ``is_level`` weights each token
      by old / rollout.
    * *pure*: ``old_logprobs="rollout"``, ``policy_loss="reinforce"`` and ``is_level``: REINFORCE times current / rollout, no clip.
    """

    advantage: str = "grpo"
    advantage_params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    policy_loss: str = "ppo"
    policy_params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loss_agg_mode: str = "token-mean"
    old_logprobs: Literal["rollout", "recompute", "loglinear"] = "rollout"
    """PPO's anchor: the sampler's logprobs, or the weights' own before the update (decoupled; pair it with ``is_level``), or, for
    ``decoupled_ppo`` only, an interpolation by policy version that needs no forward pass."""
    is_level: Literal["token", "sequence"] | None = None
    """Importance weights: rollout -> old policy with ``recompute``, rollout -> current with ``reinforce``; elsewhere the ratio
    itself is that weight."""
    is_threshold: float | str = 2.0
    """One number truncates (TIS); ``"0.5_5.0"`` zeroes what lies outside (IcePop)."""
    is_batch_normalize: bool = False
    """Divide the weights by their mean over the step."""
    rejection_rules: str | None = None
    """Comma-separated rules of `agentrl.algorithms.correction.RULES`; what breaks one is not trained."""
    rejection_thresholds: float | str | None = None
    """One for all rules, or one per rule, comma-separated."""
    kl: KLSettings = KLSettings()
    entropy_coef: float = 0.0
    """Factor of the entropy bonus."""
    use_turn_rewards: bool = False
    """Place per-turn rewards at their tokens; matters to advantages that look at tokens. Turn-level estimators always do."""
    overlong: Overlong | None = None
    horizon: int | None = None
    """Constant length of ``seq-mean-token-sum-norm``: the longest response allowed."""
    num_epochs: int = 1
    """Passes over each batch."""
    num_minibatches: int = 1
    """Optimizer updates per pass; groups stay together."""

    @property
    def is_pure(self) -> bool:
        """Importance weights act inside the loss, from the current policy."""
        return self.is_level is not None and self.policy_loss == "reinforce" and self.old_logprobs == "rollout"

    @property
    def may_part_segments(self) -> bool:
        """Whether a trajectory that is too long for one micro-batch may be parted between its segments."""
        looks_at_sequences = self.policy_loss in WHOLE_SEQUENCE_LOSSES or (self.is_pure and self.is_level == "sequence")
        return self.loss_agg_mode in ("token-mean", "token-sum") and not looks_at_sequences

    @property
    def places_turn_rewards(self) -> bool:
        return self.use_turn_rewards or self.advantage in TURN_ADVANTAGES


def check_settings(loss: LossSettings, *, temperature: float = 1.0, has_critic: bool = False) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: an unknown name (with the nearest known one), a parameter that its function does not have or lacks, a value
            out of range, or settings that contradict each other.
    """
    _check_name("advantage estimator", loss.advantage, ADVANTAGES)
    _check_name("policy loss", loss.policy_loss, POLICY_LOSSES)
    _check_name("loss_agg_mode", loss.loss_agg_mode, LOSS_AGG_MODES)
    _check_parameters("advantage", loss.advantage, loss.advantage_params, advantage_parameters(loss.advantage))
    _check_parameters("policy_loss", loss.policy_loss, loss.policy_params, policy_loss_parameters(loss.policy_loss))
    if loss.advantage == "gae" and not has_critic:
        raise ConfigError("advantage=gae needs a critic: configure one, or use grpo, rloo or reinforce_plus_plus.")
    if has_critic and loss.advantage != "gae":
        raise ConfigError(f"a critic is configured but advantage={loss.advantage} looks at no values: use advantage=gae.")
    _check_correction(loss)
    _check_kl(loss)
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature} must be positive: it divides the logits.")
    if loss.num_epochs < 1 or loss.num_minibatches < 1:
        raise ConfigError(f"num_epochs={loss.num_epochs} and num_minibatches={loss.num_minibatches} must be at least 1.")
    try:
        _rehearse(loss)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the learner's settings cannot work: {error}") from error


def _check_correction(loss: LossSettings) -> None:
    if loss.old_logprobs not in ("rollout", "recompute", "loglinear"):
        raise ConfigError(f"old_logprobs={loss.old_logprobs!r} is not known: use rollout, recompute or loglinear.")
    if loss.old_logprobs == "loglinear" and loss.policy_loss != "decoupled_ppo":
        raise ConfigError(f"old_logprobs=loglinear is decoupled_ppo's approximation, not one of policy_loss={loss.policy_loss}.")
    if loss.is_level is not None and loss.policy_loss == "decoupled_ppo":
        raise ConfigError("decoupled_ppo weighs by proximal / behaviour itself: bound it by behav_weight_cap, not by is_level.")
    if loss.is_level is not None and loss.old_logprobs == "rollout" and not loss.is_pure:
        raise ConfigError(
            f"is_level={loss.is_level} with old_logprobs=rollout would count the off-policy ratio twice: set "
            f"old_logprobs=recompute (decoupled) or policy_loss=reinforce (pure), or is_level=null."
        )
    if "is_level" in loss.policy_params or "is_threshold" in loss.policy_params:
        raise ConfigError("is_level and is_threshold are settings of their own, not parameters of policy_loss=reinforce.")
    if (loss.rejection_rules is None) != (loss.rejection_thresholds is None):
        raise ConfigError(
            f"rejection_rules={loss.rejection_rules!r} and rejection_thresholds={loss.rejection_thresholds!r} go together: give "
            f"both or none."
        )
    for rule in (loss.rejection_rules or "").split(","):
        if rule.strip():
            _check_name("rejection rule", rule.strip(), correction.RULES)


def _check_kl(loss: LossSettings) -> None:
    if loss.kl.place not in ("loss", "reward") or loss.kl.controller not in ("fixed", "adaptive"):
        raise ConfigError(
            f"kl: place={loss.kl.place!r} must be loss or reward, controller={loss.kl.controller!r} fixed or adaptive."
        )
    _check_name("KL estimator", loss.kl.estimator_name, (*ESTIMATORS, "kl", "mse", "low_var_kl"))
    if loss.kl.coef < 0:
        raise ConfigError(f"kl: coef={loss.kl.coef:g} must not be negative.")
    if loss.kl.controller == "adaptive" and not loss.kl.coef:
        raise ConfigError(
            "kl: the adaptive controller multiplies its coefficient, so it cannot start from 0: set coef, say 0.001."
        )
    if loss.kl.coef and loss.kl.place == "reward" and loss.advantage == "gdpo":
        raise ConfigError(
            "kl in the reward has no place among gdpo's reward terms, which are each standardised: put it in the loss."
        )


def _check_name(what: str, name: str, known: Iterable[str]) -> None:
    options = list(known)
    if name not in options:
        raise ConfigError(f"{what} {name!r} is unknown.{_did_you_mean(name, options)} Known: {', '.join(options)}.")


def _check_parameters(what: str, name: str, given: Mapping[str, Any], accepted: Mapping[str, Any]) -> None:
    options = {key: default for key, default in accepted.items() if key not in SUPPLIED}
    for key in given:
        if key not in options:
            listed = ", ".join(options) or "no parameters"
            raise ConfigError(f"{what}={name} has no parameter {key}.{_did_you_mean(key, options)} It has: {listed}.")
    missing = [key for key, default in options.items() if default is inspect.Parameter.empty and key not in given]
    if missing:
        raise ConfigError(f"{what}={name} needs the parameter {', '.join(missing)}, which has no default.")


def _did_you_mean(name: str, options: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def _rehearse(loss: LossSettings) -> None:
    """Run every chosen function on two rows of two tokens."""
    numbers = torch.tensor([[0.0, 1.0], [0.5, 0.0]])
    mask, groups = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    offered: dict[str, Any] = {
        "old_log_probs": -numbers, "sum_pi_squared": numbers, "turn_ids": groups[:, None].expand(2, 2),
        "reward_baselines": numbers[:, 0], "anchor_ids": groups[:, None].expand(2, 2), "reward_terms": dict.fromkeys(loss.advantage_params.get("reward_weights") or ["a"], numbers),
    }  # fmt: skip
    inputs = {key: value for key, value in offered.items() if key in advantage_parameters(loss.advantage)}
    compute_advantages(
        loss.advantage, rewards=numbers, mask=mask, groups=groups, values=numbers, **inputs, **loss.advantage_params
    )
    policy_loss(
        loss.policy_loss, log_probs=-numbers, old_log_probs=-numbers, advantages=numbers, mask=mask,
        loss_agg_mode=loss.loss_agg_mode, num_tokens=4, num_sequences=2, horizon=loss.horizon or 1, **loss.policy_params,
    )  # fmt: skip
    kl_penalty(-numbers, -numbers, loss.kl.estimator_name)
    loss.kl.start_controller()
    correction.correct_rollout(
        -numbers, -numbers, mask, is_level=loss.is_level, is_threshold=loss.is_threshold,
        is_batch_normalize=loss.is_batch_normalize, rules=loss.rejection_rules, thresholds=loss.rejection_thresholds,
    )  # fmt: skip
    if loss.overlong is not None:
        overlong_penalty(
            torch.tensor([1]),
            max_length=loss.overlong.max_length,
            buffer=loss.overlong.buffer,
            penalty_factor=loss.overlong.penalty,
        )
