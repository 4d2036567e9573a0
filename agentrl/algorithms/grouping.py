"""Statistics of the siblings of one task: rows that carry the same group label."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Labels: TypeAlias = Tensor | Sequence[Hashable]
"""One label per row: a long tensor [B], or any hashables (group ids as strings)."""

GroupOfOne: TypeAlias = Literal["raw", "zero"]
"""What a lonely row's advantage is. ``raw``: its reward, with baseline 0, as the reference does; that rewards or punishes
a task for its difficulty, since nothing is compared. ``zero``: no signal, which is what a group without spread gives."""


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Rows by group."""

    ids: Tensor
    """[B] long in 0..G-1."""
    sizes: Tensor
    """[G] long."""

    @classmethod
    def of(cls, labels: Labels, *, num_rows: int, device: torch.device) -> "Groups":
        """Number the labels.

        Raises:
            ValueError: not one label per row.
        """
        if len(labels) != num_rows:
            raise ValueError(f"got {len(labels)} group labels for {num_rows} rows; give one label per row")
        if isinstance(labels, Tensor):
            ids = torch.unique(labels, return_inverse=True)[1]
        else:
            numbers: dict[Hashable, int] = {}
            ids = torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels], dtype=torch.long)
        ids = ids.to(device)
        return cls(ids, torch.bincount(ids))

    def sum(self, values: Tensor) -> Tensor:
        """[B, ...] -> [G, ...]."""
        return values.new_zeros((len(self.sizes), *values.shape[1:])).index_add(0, self.ids, values)

    def size_of_row(self, dtype: torch.dtype) -> Tensor:
        """[B] number of siblings including the row itself."""
        return self.sizes[self.ids].to(dtype)

    def alone(self) -> Tensor:
        """[B] bool: the row has no sibling."""
        return (self.sizes == 1)[self.ids]

    def mean(self, values: Tensor) -> Tensor:
        """[B] -> [B], each row's group mean."""
        return (self.sum(values) / self.sizes.to(values.dtype))[self.ids]

    def std(self, values: Tensor) -> Tensor:
        """[B] -> [B], each row's unbiased group standard deviation; 0 for a group of one."""
        squares = self.sum((values - self.mean(values)).square())
        return (squares / (self.sizes - 1).clamp(min=1).to(values.dtype)).sqrt()[self.ids]

    def settle_alone(self, advantage: Tensor, raw: Tensor, rule: GroupOfOne) -> Tensor:
        """``advantage`` [B], with the rule applied to rows without siblings.

        Raises:
            ValueError: an unknown rule.
        """
        if rule not in ("raw", "zero"):
            raise ValueError(f"group_of_one={rule!r} is not a rule; use 'raw' or 'zero'")
        return torch.where(self.alone(), raw if rule == "raw" else torch.zeros_like(raw), advantage)
