"""How a row is cut for the ranks that share it, and what is refused. (That they learn the same: tests/integration.)"""

from pathlib import Path

import pytest
import torch

from agentrl.errors import ConfigError
from agentrl.learner.distributed import start_team
from agentrl.learner.model import load_causal_lm
from agentrl.learner.sequence_parallel import SequenceGroup, cut


def test_stretches_are_equal_cover_the_row_once_and_know_its_boundaries() -> None:
    ids, position_ids = torch.arange(100, 107), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    boundaries = torch.tensor([0, 4, 7], dtype=torch.int32)
    stretches = [cut(ids, position_ids, boundaries, 4, SequenceGroup(None, rank, 3)) for rank in range(3)]
    assert [s.ids.tolist() for s in stretches] == [[100, 101, 102], [103, 104, 105], [106, 0, 0]]
    assert [s.position_ids.tolist() for s in stretches] == [[0, 1, 2], [3, 0, 1], [2, 0, 1]]
    assert [s.start for s in stretches] == [0, 3, 6]
    for s in stretches:  # the filler is a sequence of its own, which nothing else attends to
        assert (s.cu_seqlens.tolist(), s.cu_seqlens.dtype, s.max_length) == ([0, 4, 7, 9], torch.int32, 4)
    wanted = torch.tensor([0, 2, 3, 6])
    assert [s.holds(wanted).tolist() for s in stretches] == [
        [True, True, False, False], [False, False, True, False], [False, False, False, True],
    ]  # fmt: skip


def test_heads_that_cannot_be_dealt_out_are_refused(model_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"sequence_parallel=3 does not divide the 4 attention heads of .*: use 1 or one of \[2, 4\]"
    ):
        load_causal_lm(model_dir, sequence=SequenceGroup(None, 0, 3))


def test_ranks_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"sequence_parallel=2 does not divide the learner's 1 ranks: use one of \[1\], or start 2 ranks"
    ):
        start_team(device="cpu", sequence_parallel=2)
