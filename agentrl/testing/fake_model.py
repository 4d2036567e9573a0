"""A language model without weights: logits are a pure function of a label and the whole context.

Sampling from it is real sampling, and what a server reports can be checked token by token against the function.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPREAD = 2.0
"""Standard deviation of the logits: some tokens are likely, none is certain."""

SAMPLING_FIELDS = frozenset(
    (
        "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "stop_regex", "ignore_eos",
        "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "n", "frequency_penalty", "presence_penalty",
        "repetition_penalty", "json_schema", "regex", "ebnf", "structural_tag", "logit_bias", "custom_params", "sampling_seed",
        "stream_interval",
    )
)  # fmt: skip
"""``sampling_params`` that SGLang knows."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the model heeds of ``sampling_params``."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> "Sampling":
        """Of checked parameters; see `sampling_fault`."""
        return cls(
            float(params.get("temperature", 1.0)), float(params.get("top_p", 1.0)),
            int(params.get("top_k", -1)), float(params.get("min_p", 0.0)),
        )  # fmt: skip


def sampling_fault(params: Mapping[str, Any]) -> str | None:
    """What SGLang would refuse of ``sampling_params``; None when it would take them."""
    for name in params:
        if name not in SAMPLING_FIELDS:
            return f"Object contains unknown field `{name}` - at `$.sampling_params`"
    if not params.get("temperature", 1.0) >= 0:
        return f"temperature must be non-negative, got {params['temperature']}."
    if not 0 < params.get("top_p", 1.0) <= 1:
        return f"top_p must be in (0, 1], got {params['top_p']}."
    if not 0 <= params.get("min_p", 0.0) <= 1:
        return f"min_p must be in [0, 1], got {params['min_p']}."
    if params.get("top_k", -1) < 1 and params.get("top_k", -1) != -1:
        return f"top_k must be -1 (disable), or at least 1, got {params['top_k']}."
    if params.get("max_new_tokens", 128) < 0:
        return f"max_new_tokens must be at least 0, got {params['max_new_tokens']}."
    return None


class FakeModel:
    """Logits of any context under any label.

    Args:
        vocab_size: number of tokens.
        seed: of the function.
    """

    def __init__(self, vocab_size: int, *, seed: int = 0) -> None:
        self.vocab_size, self._seed = vocab_size, seed

    def logits(self, label: str, context: Sequence[int]) -> NDArray[np.float64]:
        """[vocab] of the token after ``context``."""
        text = f"{self._seed} {label} ".encode() + np.asarray(context, dtype=np.int64).tobytes()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        return np.random.default_rng(key).standard_normal(self.vocab_size) * SPREAD

    def draw(self, label: str, context: Sequence[int], sampling: Sampling, rng: random.Random) -> tuple[int, float]:
        """A token, and its logprob at the temperature over the whole vocabulary (unscaled at temperature 0), as SGLang reports it."""
        logits = self.logits(label, context)
        if sampling.temperature == 0:
            token = int(logits.argmax())
            return token, float(log_softmax(logits)[token])
        logprobs = log_softmax(logits / sampling.temperature)
        order = np.argsort(-logprobs)
        probs = np.exp(logprobs[order])
        kept = (np.cumsum(probs) - probs < sampling.top_p) & (probs >= sampling.min_p * probs[0])
        if sampling.top_k > 0:
            kept[sampling.top_k :] = False
        shares = np.cumsum(np.where(kept, probs, 0.0))
        place = min(int(np.searchsorted(shares, rng.random() * shares[-1], side="right")), int(kept.sum()) - 1)
        token = int(order[place])
        return token, float(logprobs[token])

    def logprobs(self, label: str, context: Sequence[int], tokens: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        """Of each of ``tokens`` after ``context`` and those before it."""
        ids = [*context, *tokens]
        return [
            float(log_softmax(self.logits(label, ids[: len(context) + i]) / temperature)[token]) for i, token in enumerate(tokens)
        ]


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """[vocab] -> [vocab]."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
