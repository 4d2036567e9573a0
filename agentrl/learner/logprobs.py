"""Logprobs and entropy of given tokens from hidden states, in chunks, and the one place where the shift happens.

Everywhere in agentrl entry ``t`` of a per-token array describes token ``t``. A model's hidden state at ``t - 1`` predicts
token ``t``: `predictor_index` makes that step and nothing else does.

Letters: N tokens whose logprob is wanted, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor


def predictor_index(token_positions: Tensor, position_ids: Tensor) -> Tensor:
    """Where in a packed row the hidden states lie that predict the given tokens.

    Args:
        token_positions: [N] int64, places of the predicted tokens in the row.
        position_ids: [row] int64, restarting at 0 for each packed sequence.

    Raises:
        ValueError: a sequence's first token is asked for; nothing predicts it.
    """
    if token_positions.numel() and bool((position_ids[token_positions] == 0).any()):
        raise ValueError("the first token of a sequence has no prediction; its loss mask must be False")
    return token_positions - 1


def token_logprobs(
    hidden: Tensor,  # [N, H], carries grad
    weight: Tensor,  # [V, H], the LM head, may carry grad
    targets: Tensor,  # [N] int64
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:  # [N] fp32 logprobs, [N] fp32 entropies in nats (zeros when not asked for)
    """Log-probabilities of ``targets`` under ``softmax(hidden @ weight.T / temperature)``.

    At most ``[chunk_size, V]`` logits exist at any time, in the backward pass too: it computes them again. The division by
    the temperature matches what samplers report, so that ratios are between like and like.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"expected hidden [N, H], weight [V, H], targets [N]; got {tuple(hidden.shape)}, {tuple(weight.shape)}, "
            f"{tuple(targets.shape)}"
        )
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, 1.0 / temperature, chunk_size, with_entropy)  # pyright: ignore[reportGeneralTypeIssues, reportUnknownMemberType]  # untyped autograd API
    return logprobs, entropy


@torch.no_grad()
def token_squares(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] int64
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:  # [N] fp32 logprobs, [N] fp32 sums over the vocabulary of squared probabilities
    """What the optimal token baseline knows of a token, without a gradient; chunked as `token_logprobs`."""
    logprobs = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    squares = torch.zeros_like(logprobs)
    for start in range(0, hidden.shape[0], chunk_size):
        chunk = slice(start, start + chunk_size)
        log_p = ((hidden[chunk] @ weight.T).float() / temperature).log_softmax(-1)
        logprobs[chunk] = log_p.gather(-1, targets[chunk, None])[:, 0]
        squares[chunk] = (2 * log_p).exp().sum(-1)
    return logprobs, squares


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk_size: int, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        num = hidden.shape[0]
        logprobs = torch.zeros(num, dtype=torch.float32, device=hidden.device)
        log_normalizers = torch.zeros_like(logprobs)
        entropy = torch.zeros_like(logprobs)
        for start in range(0, num, chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = (hidden[chunk] @ weight.T).float() * scale
            log_z = logits.logsumexp(-1)
            log_normalizers[chunk] = log_z
            logprobs[chunk] = logits.gather(-1, targets[chunk, None])[:, 0] - log_z
            if with_entropy:
                # Sum of p * log p; a logit of -inf has p = 0 and contributes nothing.
                log_p = logits - log_z[:, None]
                entropy[chunk] = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, log_normalizers, entropy)
        ctx.scale, ctx.chunk_size = scale, chunk_size
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad_logprobs, grad_entropy = grads
        hidden, weight, targets, log_normalizers, entropy = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None, None
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        # fp32 whatever the weights are: many chunks add up here.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            log_p = (hidden[chunk] @ weight.T).float() * ctx.scale - log_normalizers[chunk, None]
            p = log_p.exp()
            grad_logits = torch.zeros_like(p)
            if grad_logprobs is not None:
                grad_logits -= p * grad_logprobs[chunk, None]
                grad_logits.scatter_add_(-1, targets[chunk, None], grad_logprobs[chunk, None])
            if grad_entropy is not None:
                surprise = torch.where(p > 0, log_p, 0.0) + entropy[chunk, None]
                grad_logits -= p * surprise * grad_entropy[chunk, None]
            grad_logits = (grad_logits * ctx.scale).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += (grad_logits.T @ hidden[chunk]).float()
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None
