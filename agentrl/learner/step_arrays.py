"""A step batch as flat arrays: what every rank needs of it, and the views that the mathematics wants.

Rank 0 makes it and every rank gets all of it as raw buffers (13 bytes per token), so that planning, off-policy weights and
metrics are the same pure functions of the same numbers everywhere. Only the model runs on a rank's own share.

Letters: N tokens of all sequences, S sequences (segments), B trajectories, M loss tokens (in token order).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentrl.learner.batching import BatchRow


@dataclass(frozen=True, slots=True, eq=False)
class StepArrays:
    """Trained trajectories, segments end to end."""

    ids: NDArray[np.int32]
    """[N]"""
    loss_mask: NDArray[np.bool_]
    """[N] the response mask of trained trajectories: tokens the policy sampled."""
    rollout_logprobs: NDArray[np.float32]
    """[N] as the servers reported; 0 where the mask is False."""
    advantages: NDArray[np.float32]
    """[N] 0 where the mask is False."""
    offsets: NDArray[np.int64]
    """[S + 1] where each sequence starts, and the end."""
    trajectory: NDArray[np.int64]
    """[S] the trajectory each sequence belongs to, 0 .. B - 1, ascending."""
    group: NDArray[np.int64]
    """[B] the group each trajectory belongs to, ascending."""

    def as_mapping(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_mapping(cls, arrays: Mapping[str, NDArray[Any]]) -> "StepArrays":
        return cls(**arrays)

    @property
    def num_trajectories(self) -> int:
        return len(self.group)


def compact_rewards(
    rows: Sequence[BatchRow], *, use_turn_rewards: bool = False
) -> tuple[Tensor, Tensor]:  # [B, L] fp32 rewards, [B, L] bool mask
    """Rewards on sampled tokens only, moved to the front: L is the most that any row sampled.

    The reward lies on the last sampled token. With ``use_turn_rewards`` each per-turn reward lies on the last token sampled
    up to its place, and the rest of the reward on the last one, so that a row always sums to its reward.
    """
    counts = [row.trajectory.num_sampled for row in rows]
    width = max(counts, default=0)
    rewards = np.zeros((len(rows), width), dtype=np.float32)
    mask = np.arange(width) < np.asarray(counts)[:, None] if rows else np.zeros((0, 0), dtype=bool)
    for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
        placed = 0.0
        if use_turn_rewards:
            before = np.cumsum([0, *(s.mask.sum() for s in row.trajectory.segments)])
            for segment, token, value in row.trajectory.turn_rewards:
                sampled = int(before[segment] + row.trajectory.segments[segment].mask[: token + 1].sum())
                rewards[b, max(sampled - 1, 0)] += value
                placed += value
        rewards[b, count - 1] += row.trajectory.reward - placed
    return torch.from_numpy(rewards), torch.from_numpy(mask)


def flatten(rows: Sequence[BatchRow], advantages: NDArray[np.float32]) -> StepArrays:
    """Lay the trained rows out flat.

    Args:
        rows: of a batch; those not trained are left out.
        advantages: [B, L] on sampled tokens moved to the front, as `compact_rewards` lays them out.
    """
    trained = [(row, advantages[b] * np.float32(row.weight)) for b, row in enumerate(rows) if row.is_trained]
    segments = [(t, segment) for t, (row, _) in enumerate(trained) for segment in row.trajectory.segments]
    offsets = np.zeros(len(segments) + 1, dtype=np.int64)
    np.cumsum([len(s.ids) for _, s in segments], out=offsets[1:])

    def joined(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
        return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)

    loss_mask: NDArray[np.bool_] = joined([s.mask for _, s in segments], np.bool_)
    per_token = np.zeros(len(loss_mask), dtype=np.float32)
    per_token[loss_mask] = joined([adv[: row.trajectory.num_sampled] for row, adv in trained], np.float32)
    rollout_logprobs = joined([s.logprobs for _, s in segments], np.float32)
    return StepArrays(
        ids=joined([s.ids for _, s in segments], np.int32),
        loss_mask=loss_mask,
        # Whatever a server reported for tokens it did not sample stays out of every sum from here on.
        rollout_logprobs=np.where(loss_mask, rollout_logprobs, np.float32(0)),
        advantages=per_token,
        offsets=offsets,
        trajectory=np.asarray([t for t, _ in segments], dtype=np.int64),
        group=np.asarray([row.group for row, _ in trained], dtype=np.int64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PaddedView:
    """Places M per-token values into ``[B, L]`` rows, one per trajectory, sampled tokens only."""

    rows: Tensor
    """[M] int64"""
    columns: Tensor
    """[M] int64"""
    shape: tuple[int, int]

    @classmethod
    def of(cls, row_labels: NDArray[np.int64], device: torch.device) -> "PaddedView":
        """Values with one label make one row; their order is kept."""
        _, rows, counts = np.unique(row_labels, return_inverse=True, return_counts=True)
        order = np.argsort(rows, kind="stable")
        columns = np.empty(len(rows), dtype=np.int64)
        columns[order] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = (len(counts), int(counts.max(initial=0)))
        return cls(torch.from_numpy(rows.astype(np.int64)).to(device), torch.from_numpy(columns).to(device), shape)

    def pad(self, values: Tensor) -> Tensor:
        """[M] -> [B, L], zeros (False) in the padding; differentiable."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values)

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, L] -> [M]."""
        return padded[self.rows, self.columns]
