"""Which errors mean that another rank is gone."""

import pytest
import torch

from agentrl.errors import RankLost
from agentrl.learner.distributed import Team
from agentrl.learner.lost_ranks import explaining_lost_ranks

PAIR = Team(rank=1, world_size=2, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation",
        "NCCL communicator was aborted on rank 0",
    ],
)
def test_a_collectives_failure_becomes_a_lost_rank(text: str) -> None:
    with (
        pytest.raises(RankLost, match=r"rank 1 of 2 .*learn\.rank_timeout_s=7") as caught,
        explaining_lost_ranks(PAIR, timeout_s=7),
    ):
        raise RuntimeError(text)
    assert text in str(caught.value)


def test_other_errors_and_teams_of_one_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), explaining_lost_ranks(PAIR, timeout_s=7):
        raise RuntimeError("shape mismatch")
    alone = Team(rank=0, world_size=1, device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="gloo"), explaining_lost_ranks(alone, timeout_s=7):
        raise RuntimeError("gloo")
