"""Trajectories' segments -> token-budget rows, balanced over micro-batches and ranks. Pure: numbers in, decisions out.

A row is one micro-batch of one rank: sequences laid end to end, no padding. Nothing here changes the loss (invariant I8):
a plan only decides which tokens are computed together. Every rank gets the same number of rows, because FSDP's collectives
run once per row; a rank without enough work gets empty rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from agentrl.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """Sequences end to end. N tokens, S sequences; every array indexes into the step's flat arrays."""

    sequences: tuple[int, ...]
    """The S sequences, in the order in which they lie here."""
    token_index: NDArray[np.int64]
    """[N] where each token lies in the step's flat arrays (ids, masks, logprobs, advantages)."""
    position_ids: NDArray[np.int64]
    """[N] restarting at 0 for each sequence."""
    sequence_index: NDArray[np.int64]
    """[N] the sequence each token belongs to."""
    cu_seqlens: NDArray[np.int32]
    """[S + 1] where each sequence starts, and the end."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_index)

    @property
    def max_length(self) -> int:
        return int(np.diff(self.cu_seqlens).max(initial=0))


def pack_row(offsets: NDArray[np.int64], sequences: Sequence[int]) -> PackedRow:
    """Lay ``sequences`` end to end.

    Args:
        offsets: [all sequences + 1] where each sequence starts in the flat arrays, and the end.
        sequences: which ones, in order; may be empty.
    """
    chosen = np.asarray(sequences, dtype=np.int64)
    lengths = offsets[chosen + 1] - offsets[chosen]
    cu_seqlens = np.zeros(len(chosen) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    position_ids = np.arange(cu_seqlens[-1], dtype=np.int64) - np.repeat(cu_seqlens[:-1].astype(np.int64), lengths)
    return PackedRow(
        sequences=tuple(int(s) for s in chosen),
        token_index=position_ids + np.repeat(offsets[chosen], lengths),
        position_ids=position_ids,
        sequence_index=np.repeat(chosen, lengths),
        cu_seqlens=cu_seqlens,
    )


def plan_rows(
    lengths: Sequence[int], *, budget_tokens: int, num_ranks: int = 1, names: Sequence[str] | None = None
) -> list[list[list[int]]]:
    """Distribute items over ranks and rows: ``plan[rank][row]`` lists items.

    The number of rows is the least that first-fit-decreasing needs, rounded up to a multiple of ``num_ranks``; the items are
    then spread evenly over that many rows (longest first onto the lightest), unless that breaks the budget where
    first-fit-decreasing does not. Rows of one step ``k`` have similar sizes on all ranks, so no rank waits long for another.

    Args:
        lengths: tokens of each item; an item is never cut.
        budget_tokens: most tokens in a row.
        num_ranks: ranks that each run the same number of rows; some rows may be empty.
        names: how to call the items in an error.

    Raises:
        DataError: one item alone exceeds the budget.
    """
    for item, length in enumerate(lengths):
        if length > budget_tokens:
            name = names[item] if names is not None else f"item {item}"
            raise DataError(
                f"{name} has {length} tokens but a micro-batch holds micro_batch_tokens={budget_tokens}: "
                f"raise micro_batch_tokens to at least {length} or lower the rollout's token limit."
            )
    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
    tight = _first_fit(lengths, order, budget_tokens)
    num_rows = max(1, -(-len(tight) // num_ranks)) * num_ranks
    rows = _spread(lengths, order, num_rows)
    if max((sum(lengths[i] for i in row) for row in rows), default=0) > budget_tokens:
        rows = tight + [[] for _ in range(num_rows - len(tight))]
    return _deal(lengths, rows, num_ranks)


def _first_fit(lengths: Sequence[int], order: Sequence[int], budget: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[int] = []
    for item in order:
        row = next((r for r, room in enumerate(free) if room >= lengths[item]), None)
        if row is None:
            rows.append([item])
            free.append(budget - lengths[item])
        else:
            rows[row].append(item)
            free[row] -= lengths[item]
    return rows


def _spread(lengths: Sequence[int], order: Sequence[int], num_rows: int) -> list[list[int]]:
    """Longest processing time first: within 4/3 of the best possible maximum (Graham 1969)."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = [(0, row) for row in range(num_rows)]
    heapify(loads)
    for item in order:
        load, row = loads[0]
        rows[row].append(item)
        heapreplace(loads, (load + lengths[item], row))
    return rows


def _deal(lengths: Sequence[int], rows: list[list[int]], num_ranks: int) -> list[list[list[int]]]:
    """Largest rows first, back and forth over the ranks, so that both the steps and the ranks are balanced."""
    ordered = sorted(rows, key=lambda row: -sum(lengths[i] for i in row))
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for step in range(0, len(ordered), num_ranks):
        together = ordered[step : step + num_ranks]
        for rank, row in enumerate(together if (step // num_ranks) % 2 == 0 else reversed(together)):
            plan[rank].append(row)
    return plan
