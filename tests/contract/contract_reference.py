"""What the numbers must be: plain forward passes of the same checkpoints, without cache, batching or server."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


class Reference:
    """The checkpoints by weight version."""

    def __init__(self, checkpoints: Mapping[str, Path]) -> None:
        from transformers import AutoModelForCausalLM

        self._models: dict[str, Any] = {
            version: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for version, path in checkpoints.items()
        }

    @torch.no_grad()
    def logits(self, version: str, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        """[len(output), vocab]: what each output token was drawn from."""
        ids = torch.tensor([[*prompt, *output]])
        return self._models[version](ids).logits[0, len(prompt) - 1 : -1]

    def logprobs(self, version: str, prompt: Sequence[int], output: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        """Of each output token, at a temperature, over the whole vocabulary."""
        scaled = torch.log_softmax(self.logits(version, prompt, output) / temperature, dim=-1)
        return scaled.gather(1, torch.tensor(output)[:, None])[:, 0].tolist()
