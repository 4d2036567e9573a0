"""Say plainly that another rank is gone, where torch reports sockets and buffers."""

import re
from collections.abc import Generator
from contextlib import contextmanager

import torch.distributed as dist

from agentrl.errors import RankLost
from agentrl.learner.distributed import Team

_COLLECTIVE = re.compile(r"gloo|nccl|c10d|process ?group|connection (closed|reset)|timed out waiting", re.IGNORECASE)
"""Gloo's failures are plain RuntimeErrors; only their text tells."""


@contextmanager
def explaining_lost_ranks(team: Team, *, timeout_s: float) -> Generator[None]:
    """Turn a failed exchange between ranks into `RankLost`; every other error passes.

    Args:
        timeout_s: the process group's limit, for the message.

    Raises:
        RankLost: from torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if team.world_size == 1 or not is_of_a_collective(error):
            raise
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RankLost(
            f"rank {team.rank} of {team.world_size} lost the others: one died, or did not come within "
            f"learn.rank_timeout_s={timeout_s:g} ({said}). Look at the other ranks' output for the first error. Nothing behind the "
            f"last checkpoint was acknowledged, so starting again repeats and loses nothing; raise learn.rank_timeout_s if a rank "
            f"was only slow."
        ) from error


def is_of_a_collective(error: RuntimeError) -> bool:
    """Whether an exchange between ranks failed, rather than the computation."""
    return isinstance(error, dist.DistError) or _COLLECTIVE.search(str(error)) is not None
