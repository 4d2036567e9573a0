"""Chunked logprobs and entropies equal the plain formulas, gradients included."""

import pytest
import torch
from torch import Tensor

from agentrl.learner.logprobs import predictor_index, token_logprobs


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_the_plain_ones(chunk_size: int, temperature: float) -> None:
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, 16, generator=gen, requires_grad=True)
    weight = torch.randn(50, 16, generator=gen, requires_grad=True)
    targets = torch.randint(0, 50, (33,), generator=gen)
    mix = torch.randn(2, 33, generator=gen)
    results = []
    for function in (
        lambda: naive(hidden, weight, targets, temperature),
        lambda: token_logprobs(hidden, weight, targets, temperature=temperature, chunk_size=chunk_size),
    ):
        logprobs, entropy = function()
        gradients = torch.autograd.grad((mix[0] * logprobs + mix[1] * entropy).sum(), [hidden, weight])
        results.append((logprobs.detach(), entropy.detach(), *gradients))
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5 if plain.ndim == 2 else 1e-6)


def test_a_token_that_cannot_be_sampled_has_minus_infinity_and_no_nan_entropy() -> None:
    weight = torch.tensor([[0.0], [0.0], [-1e38]], requires_grad=True)
    hidden = torch.tensor([[10.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0]))
    assert logprobs.item() == pytest.approx(-0.693147, abs=1e-5)
    assert entropy.item() == pytest.approx(0.693147, abs=1e-5)
    (logprobs + entropy).sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_half_precision_gives_fp32_results() -> None:
    hidden, weight = torch.randn(4, 8).bfloat16(), torch.randn(9, 8).bfloat16()
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4]))
    assert (logprobs.dtype, entropy.dtype) == (torch.float32, torch.float32)


def test_entropy_is_skipped_when_not_asked_for() -> None:
    assert token_logprobs(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), with_entropy=False)[1].tolist() == [0, 0]


def test_token_t_is_predicted_at_t_minus_one_and_never_across_a_sequence_start() -> None:
    position_ids = torch.tensor([0, 1, 2, 0, 1])
    assert predictor_index(torch.tensor([1, 2, 4]), position_ids).tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="first token of a sequence"):
        predictor_index(torch.tensor([3]), position_ids)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"hidden \[N, H\]"):
        token_logprobs(torch.randn(2, 3), torch.randn(4, 5), torch.tensor([0, 1]))
