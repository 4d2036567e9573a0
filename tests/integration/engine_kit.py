"""Real embedded engines in tests: a model that never stops by itself, and who has heard tokens of it."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from agentrl.testing.tiny_model import make_tiny_model
from agentrl.types import SampledTokens


def make_endless_model(path: Path, *, seed: int) -> Path:
    """A small model without an end token: a generation is as long as it was asked to be, whatever is drawn."""
    make_tiny_model(path, seed=seed, num_layers=1)
    for file in (path / "config.json", path / "generation_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))
    return path


class Ears:
    """Count the tokens that each of several generations has been told."""

    def __init__(self) -> None:
        self._counts: defaultdict[int, int] = defaultdict(int)

    def __getitem__(self, index: int) -> Callable[[SampledTokens], None]:
        """The listener of one generation."""

        def listen(tokens: SampledTokens) -> None:
            self._counts[index] += len(tokens.ids)

        return listen

    def forget(self) -> None:
        self._counts.clear()

    def heard(self, num_generations: int) -> bool:
        """Whether so many generations have begun."""
        return len(self._counts) == num_generations
