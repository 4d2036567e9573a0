"""The function in place of a model: sampled in the right proportions, within the cuts."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from agentrl.testing.fake_model import FakeModel, Sampling, log_softmax, sampling_fault

CONTEXT = [3, 1, 4, 1, 5]


def test_logits_depend_on_label_and_every_token_of_the_context_and_nothing_else() -> None:
    model = FakeModel(32)
    logits = model.logits("v0", CONTEXT)
    assert np.array_equal(logits, FakeModel(32).logits("v0", tuple(CONTEXT)))
    others = [model.logits("v1", CONTEXT), model.logits("v0", [2, *CONTEXT[1:]]), FakeModel(32, seed=1).logits("v0", CONTEXT)]
    assert all(np.abs(logits - other).max() > 0.1 for other in others)


def test_tokens_come_in_the_proportions_of_the_softmax_and_say_their_logprob() -> None:
    model, rng = FakeModel(8), random.Random(0)
    drawn = [model.draw("v0", CONTEXT, Sampling(temperature=1.5), rng) for _ in range(4000)]
    logprobs = log_softmax(model.logits("v0", CONTEXT) / 1.5)
    counts = Counter(token for token, _ in drawn)
    for token, logprob in enumerate(logprobs):
        share = math.exp(logprob)
        assert counts[token] / 4000 == pytest.approx(share, abs=4 * math.sqrt(share / 4000))
    assert all(logprob == logprobs[token] for token, logprob in drawn)


def test_cuts_keep_the_likeliest_tokens_and_at_least_one() -> None:
    model, rng = FakeModel(64), random.Random(0)
    order = np.argsort(-model.logits("v0", CONTEXT)).tolist()

    def seen(sampling: Sampling) -> set[int]:
        return {model.draw("v0", CONTEXT, sampling, rng)[0] for _ in range(300)}

    assert seen(Sampling(top_k=3)) == set(order[:3])
    assert seen(Sampling(top_p=1e-6)) == seen(Sampling(min_p=1.0)) == seen(Sampling(temperature=0.0)) == {order[0]}


def test_logprobs_of_a_continuation_are_those_of_each_prefix() -> None:
    model = FakeModel(16)
    first, second = model.logprobs("v0", CONTEXT, [7, 2])
    assert first == log_softmax(model.logits("v0", CONTEXT))[7]
    assert second == log_softmax(model.logits("v0", [*CONTEXT, 7]))[2]


def test_parameters_that_sglang_refuses_are_refused() -> None:
    assert sampling_fault({"temperature": 0.0, "top_k": -1, "skip_special_tokens": False}) is None
    refused = [{"bogus": 1}, {"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"min_p": 2}, {"max_new_tokens": -1}]
    for params in refused:
        assert next(iter(params)) in str(sampling_fault(params))
