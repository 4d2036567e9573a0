"""What the numbers must be: plain forward passes of the same checkpoints, or of the fake's function, without cache, batching or server."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentrl.testing.fake_model import FakeModel


class Reference(ABC):
    """Weights by version."""

    @abstractmethod
    def logits(self, version: str, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        """[len(output), vocab]: what each output token was drawn from."""

    def logprobs(self, version: str, prompt: Sequence[int], output: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        """Of each output token, at a temperature, over the whole vocabulary."""
        if not output:
            return []
        scaled = torch.log_softmax(self.logits(version, prompt, output) / temperature, dim=-1)
        return scaled.gather(1, torch.tensor(output)[:, None])[:, 0].tolist()


class FunctionReference(Reference):
    """The fake's model, asked directly."""

    def __init__(self, model: FakeModel) -> None:
        self._model = model

    def logits(self, version: str, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        ids = [*prompt, *output]
        rows = [self._model.logits(version, ids[: len(prompt) + i]) for i in range(len(output))]
        return torch.from_numpy(np.stack(rows))


class CheckpointReference(Reference):
    """The checkpoints, by transformers."""

    def __init__(self, checkpoints: Mapping[str, Path]) -> None:
        from transformers import AutoModelForCausalLM

        self._models: dict[str, Any] = {
            version: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for version, path in checkpoints.items()
        }

    @torch.no_grad()
    def logits(self, version: str, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *output]])
        return self._models[version](ids).logits[0, len(prompt) - 1 : -1]
