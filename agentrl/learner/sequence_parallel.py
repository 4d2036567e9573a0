"""Sequence parallelism: the ranks of a sequence group share the tokens of each packed row, so that one trajectory may be longer than a
rank's memory allows (DeepSpeed-Ulysses, arXiv:2309.14509).

Each rank embeds and transforms its own stretch of the row. Attention alone looks further: one exchange gives every rank all tokens
for its share of the heads, a second one brings the results back. What a token's prediction needs beyond its own stretch is nothing:
the ids of the whole row are on every rank, so the hidden state at ``t - 1`` is scored where it lies, whoever holds token ``t``.
The scored numbers are then joined on all ranks of the group, which compute the same loss from them; a gradient flows back only
into a rank's own part, so the sum over all ranks is the gradient.

Letters: N tokens in a row (padded to a multiple of P), P ranks in a group, n = N / P, H query heads, K key heads, D head size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agentrl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """This rank's place among those that share rows."""

    group: Any
    """torch's process group."""
    rank: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """A rank's part of a row, and the boundaries of the whole row, which attention sees."""

    ids: Tensor
    """[n] int64"""
    position_ids: Tensor
    """[n] int64, as in the row"""
    cu_seqlens: Tensor
    """[S + 1] or [S + 2] int32, of the whole row; what fills it up is a sequence of its own"""
    max_length: int
    start: int
    """Where the stretch begins in the row."""

    def holds(self, places: Tensor) -> Tensor:
        """[M] bool: which places of the row lie here."""
        return (places >= self.start) & (places < self.start + len(self.ids))


def cut(ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_length: int, sequence: SequenceGroup) -> Stretch:
    """This rank's stretch of a row of [N] tokens; all stretches have one length."""
    missing = -len(ids) % sequence.size
    if missing:
        filler = torch.arange(missing, device=ids.device)
        ids, position_ids = torch.cat([ids, torch.zeros_like(filler)]), torch.cat([position_ids, filler])
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + missing])
    length = len(ids) // sequence.size
    start = sequence.rank * length
    here = slice(start, start + length)
    return Stretch(ids[here], position_ids[here], cu_seqlens, max(max_length, missing), start)


def check_heads(config: Any, size: int, *, path: Any) -> None:
    """Refuse a model whose query heads cannot be dealt out evenly.

    Raises:
        ConfigError: naming the sizes that would do.
    """
    num_heads = int(config.get_text_config().num_attention_heads)
    if num_heads % size:
        fitting = [p for p in range(2, num_heads + 1) if num_heads % p == 0]
        raise ConfigError(
            f"sequence_parallel={size} does not divide the {num_heads} attention heads of {path}: use 1 or one of {fitting}."
        )


def to_heads(query: Tensor, key: Tensor, value: Tensor, sequence: SequenceGroup) -> tuple[Tensor, Tensor, Tensor]:
    """From all heads of [n] tokens to this rank's heads of [N]: ``[1, H, n, D]`` to ``[1, H / P, N, D]``, and the same for [K].

    Key heads that are too few, or do not divide, are repeated just as often as needed.
    """
    num_heads, num_key_heads = query.shape[1], key.shape[1]
    per_key = num_heads // num_key_heads
    repeats = next(r for r in range(1, per_key + 1) if per_key % r == 0 and num_key_heads * r % sequence.size == 0)
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # One exchange for all three: [P, n, (H + 2 K) / P, D], the first dimension being who shall have it.
    parts = [x[0].unflatten(0, (sequence.size, -1)).transpose(1, 2) for x in (query, key, value)]
    counts = [part.shape[2] for part in parts]
    found = _Exchange.apply(torch.cat(parts, dim=2), sequence.group)
    return tuple(x.transpose(0, 1)[None] for x in found.flatten(0, 1).split(counts, dim=1))  # pyright: ignore[reportReturnType]


def to_tokens(attended: Tensor, sequence: SequenceGroup) -> Tensor:
    """Back again: this rank's heads of [N] tokens, ``[1, N, H / P, D]``, to all heads of [n], ``[1, n, H, D]``."""
    found = _Exchange.apply(attended[0].unflatten(0, (sequence.size, -1)), sequence.group)
    return found.transpose(0, 1).flatten(1, 2)[None]


def joined(own: Tensor, places: Tensor, num: int, sequence: SequenceGroup) -> Tensor:
    """[num] on every rank, of which this rank has ``own`` at ``places``; every place belongs to exactly one rank."""
    return _Join.apply(own, places, num, sequence.group)


class _Exchange(torch.autograd.Function):
    """[P, ...]: part p goes to rank p of the group, and what comes back at p is from rank p. Its own inverse, hence its gradient."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchange(parts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        return _exchange(grads[0], ctx.group), None


def _exchange(parts: Tensor, group: Any) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor, num: int, group: Any) -> Tensor:
        ctx.save_for_backward(places)
        whole = own.new_zeros(num).index_put((places,), own)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None, None, None]:
        # Every rank of the group computes the same loss, so this gradient is already whole: no sum over the group.
        (places,) = ctx.saved_tensors
        return grads[0][places], None, None, None


def group_ranks(world_size: int, size: int) -> int:
    """How many groups of ``size`` the ranks make.

    Raises:
        ConfigError: they do not come out even.
    """
    if size < 1 or world_size % size:
        fitting = [p for p in range(1, world_size + 1) if world_size % p == 0]
        raise ConfigError(
            f"sequence_parallel={size} does not divide the learner's {world_size} ranks: use one of {fitting}, or start "
            f"{size * math.ceil(world_size / max(1, size))} ranks."
        )
    return world_size // size
