"""The optimizer, the learning-rate schedule and gradient clipping: shared by RL steps and supervised fine-tuning."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agentrl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """How gradients become weights."""

    lr: float
    kind: Literal["adamw", "adam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from lr / warmup_steps."""
    num_steps: int | None = None
    """Steps after which the schedule has reached its end; needed unless it is constant."""
    decay_fraction: float = 1.0
    """Last share of the steps after the warm-up over which the rate falls; 0.3 keeps it flat before."""
    min_lr_ratio: float = 0.0
    """The rate at the end, as a share of lr."""
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "adam"):
            raise ConfigError(f"optimizer={self.kind!r} is not known: use adamw or adam.")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ConfigError(f"lr_schedule={self.schedule!r} is not known: use constant, linear or cosine.")
        if self.schedule != "constant" and not self.num_steps:
            raise ConfigError(f"lr_schedule={self.schedule} needs num_steps: the step at which the rate reaches its end.")
        if not 0 < self.decay_fraction <= 1:
            raise ConfigError(f"decay_fraction={self.decay_fraction} must lie in (0, 1].")

    def lr_at(self, step: int) -> float:
        """Learning rate of the ``step``-th update, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant" or self.num_steps is None:
            return self.lr
        total = max(1, self.num_steps - self.warmup_steps)
        decay = max(1.0, total * self.decay_fraction)
        progress = min(1.0, max(0.0, (step - self.warmup_steps - (total - decay)) / decay))
        falling = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * falling)


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Adam or AdamW over the trainable parameters; no decay on vectors (norms and biases), where it has no meaning."""
    if not all(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError(
            "the optimizer must be built on sharded parameters: shard the model, and reshard it after a bare forward"
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    make = torch.optim.AdamW if settings.kind == "adamw" else torch.optim.Adam
    # fused: on sharded parameters the plain loop costs a sixth of a small model's step.
    return make([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
    """Scale gradients to ``max_norm`` (None: only measure); returns the norm before, over all ranks. Nan or inf pass through."""
    norm: Any = torch.nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
    full: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(full)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int) -> tuple[float, bool]:
    """Clip, and apply the gradients if they are finite; gradients are cleared either way.

    Returns:
        The gradient norm before clipping, and whether the weights were updated.
    """
    norm = clip_gradients(model.parameters(), settings.max_grad_norm)
    is_finite = math.isfinite(norm)
    if is_finite:
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, is_finite
