"""Attention over packed sequences without an ``[N, N]`` mask: cost grows with each sequence's length, not with the row's.

Registered with transformers under `PACKED`. On CUDA in half precision it is torch's varlen kernel; elsewhere the sequences are
laid out as a right-padded batch, where plain causal attention is already exact (a real token never looks at the padding that
follows it), and gathered back.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from agentrl.learner.sequence_parallel import SequenceGroup, to_heads, to_tokens

PACKED = "agentrl_packed"


def packed_attention(
    module: Any,
    query: Tensor,  # [1, heads, N, D]
    key: Tensor,  # [1, kv heads, N, D]
    value: Tensor,  # [1, kv heads, N, D]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    cu_seqlens: Tensor,  # [S + 1] int32
    max_length: int,
    sequence: SequenceGroup | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:  # [1, N, heads, D]
    """Causal attention within each packed sequence. With a sequence group, the tokens are this rank's and ``cu_seqlens`` all."""
    if sequence is not None:
        query, key, value = to_heads(query, key, value, sequence)
        out = _attend(query, key, value, dropout, scaling, cu_seqlens, max_length)
        return to_tokens(out, sequence), None
    return _attend(query, key, value, dropout, scaling, cu_seqlens, max_length), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, cu_seqlens: Tensor, max_length: int
) -> Tensor:  # [1, N, heads, D]
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        out = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
        )
        return (out if isinstance(out, Tensor) else out[0])[None]
    num_sequences = cu_seqlens.numel() - 1
    if num_sequences == 1:
        out = _causal(query, key, value, dropout, scaling, grouped)
        return out.transpose(1, 2).contiguous()
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    owner = torch.repeat_interleave(torch.arange(num_sequences, device=query.device), lengths)
    column = torch.arange(query.shape[2], device=query.device) - cu_seqlens.long()[owner]

    def padded(packed: Tensor) -> Tensor:  # [1, h, N, D] -> [S, h, max_length, D]
        tokens = packed[0].transpose(0, 1)
        batch = tokens.new_zeros(num_sequences, max_length, *tokens.shape[1:])
        return batch.index_put((owner, column), tokens).transpose(1, 2)

    out = _causal(padded(query), padded(key), padded(value), dropout, scaling, grouped)
    return out.transpose(1, 2)[owner, column][None]


def _causal(query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, grouped: bool) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )


def register_packed_attention(wrap: Callable[[Any], Any] | None = None) -> None:
    """Make it known to transformers, wrapped where compiled code must treat it specially."""
    AttentionInterface.register(PACKED, packed_attention if wrap is None else wrap(packed_attention))


register_packed_attention()
