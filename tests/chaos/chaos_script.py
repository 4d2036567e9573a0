"""What a scripted policy says; apart from the rig so that an engine process starts without torch."""

import json
from collections.abc import Sequence
from pathlib import Path


class Script:
    """What the policy says in its k-th turn, token by token: a pure function of the context, so that a broken-off generation
    continues as it would have gone on."""

    def __init__(self, header: Sequence[int], replies: Sequence[Sequence[int]], end: int) -> None:
        self._header, self._replies, self._end = list(header), [list(r) for r in replies], end

    def __call__(self, context: Sequence[int]) -> int:
        ids, size = list(context), len(self._header)
        starts = [i + size for i in range(len(ids) - size + 1) if ids[i : i + size] == self._header]
        reply = self._replies[min(len(starts), len(self._replies)) - 1] if starts else [self._end]
        position = len(ids) - starts[-1] if starts else 0
        return reply[position] if position < len(reply) else self._end

    @classmethod
    def load(cls, path: Path) -> "Script":
        return cls(**json.loads(path.read_text()))
