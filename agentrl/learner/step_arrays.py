"""A step batch as flat arrays: what every rank needs of it, and the views that the mathematics wants.

Rank 0 makes it and every rank gets all of it as raw buffers (13 bytes per token), so that planning, off-policy weights and
metrics are the same pure functions of the same numbers everywhere. Only the model runs on a rank's own share.

Letters: N tokens of all sequences, S sequences (segments), B trajectories, M sampled tokens (in token order).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentrl.errors import DataError
from agentrl.learner.batching import BatchRow


class UntrainableError(DataError):
    """Some trajectories of a batch cannot be trained on; ``trajectory_ids`` are the ones to blame."""

    def __init__(self, message: str, *, trajectory_ids: Sequence[str]) -> None:
        super().__init__(message)
        self.trajectory_ids = tuple(trajectory_ids)


@dataclass(frozen=True, slots=True, eq=False)
class StepArrays:
    """A batch's trajectories, segments end to end: the trained ones, and those that only count in group statistics."""

    ids: NDArray[np.int32]
    """[N]"""
    sampled: NDArray[np.bool_]
    """[N] the response mask: tokens the policy sampled."""
    rollout_logprobs: NDArray[np.float32]
    """[N] as the servers reported; 0 where the mask is False."""
    versions: NDArray[np.int32]
    """[N] policy version that sampled the token; -1 where the mask is False."""
    offsets: NDArray[np.int64]
    """[S + 1] where each sequence starts, and the end."""
    trajectory: NDArray[np.int64]
    """[S] the trajectory each sequence belongs to, 0 .. B - 1, ascending."""
    group: NDArray[np.int64]
    """[B] the group each trajectory belongs to, ascending."""
    is_trained: NDArray[np.bool_]
    """[B] whether its tokens are in the loss."""

    def as_mapping(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_mapping(cls, arrays: Mapping[str, NDArray[Any]]) -> "StepArrays":
        return cls(**arrays)

    @property
    def num_trajectories(self) -> int:
        return len(self.group)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens of all kinds in trained trajectories."""
        lengths = np.diff(self.offsets)
        return int(lengths[self.is_trained[self.trajectory]].sum()) if len(lengths) else 0


def flatten(rows: Sequence[BatchRow]) -> StepArrays:
    """Lay a batch's rows out flat."""
    segments = [(b, segment) for b, row in enumerate(rows) for segment in row.trajectory.segments]
    offsets = np.zeros(len(segments) + 1, dtype=np.int64)
    np.cumsum([len(s.ids) for _, s in segments], out=offsets[1:])

    def joined(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
        return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)

    sampled: NDArray[np.bool_] = joined([s.mask for _, s in segments], np.bool_)
    # Whatever a server reported for tokens it did not sample stays out of every sum from here on.
    return StepArrays(
        ids=joined([s.ids for _, s in segments], np.int32),
        sampled=sampled,
        rollout_logprobs=np.where(sampled, joined([s.logprobs for _, s in segments], np.float32), np.float32(0)),
        versions=np.where(sampled, joined([s.versions for _, s in segments], np.int32), np.int32(-1)),
        offsets=offsets,
        trajectory=np.asarray([b for b, _ in segments], dtype=np.int64),
        group=np.asarray([row.group for row in rows], dtype=np.int64),
        is_trained=np.asarray([row.is_trained for row in rows], dtype=np.bool_),
    )


def check_rows(rows: Sequence[BatchRow], *, vocab_size: int, budget_tokens: int, may_part_segments: bool) -> None:
    """Refuse what would fail deep inside the model or the packing, while it still has a name.

    Args:
        vocab_size: token ids must lie below it.
        budget_tokens: most tokens of one trajectory, or of one segment where segments may be parted.

    Raises:
        UntrainableError: naming the trajectories.
    """
    foreign: list[str] = []
    too_long: list[tuple[str, str, int]] = []
    for b, row in enumerate(rows):
        segments = row.trajectory.segments
        if any(len(s.ids) and (int(s.ids.min()) < 0 or int(s.ids.max()) >= vocab_size) for s in segments):
            foreign.append(row.trajectory.id)
        lengths = [len(s.ids) for s in segments]
        length = max(lengths, default=0) if may_part_segments else sum(lengths)
        if length > budget_tokens:
            too_long.append((row.trajectory.id, f"trajectory {b} of the batch ({row.trajectory.id})", length))
    if foreign:
        raise UntrainableError(
            f"{len(foreign)} trajectories hold token ids outside the model's vocabulary of {vocab_size}, first {foreign[0]}: serve "
            f"and learn use different models or tokenizers.",
            trajectory_ids=foreign,
        )
    if too_long:
        _, name, length = too_long[0]
        raise UntrainableError(
            f"{name} has {length} tokens{' in one segment' if may_part_segments else ''} but a micro-batch holds "
            f"micro_batch_tokens={budget_tokens}: raise micro_batch_tokens to at least {length} or lower the rollout's token limit.",
            trajectory_ids=[identity for identity, _, _ in too_long],
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
