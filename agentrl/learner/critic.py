"""PPO's critic: what a trajectory's reward-to-go is expected to be before each sampled token.

The same model family as the policy, with a linear head in place of the LM head. The value of token ``t`` is read at ``t - 1``:
it knows everything before the token and not the token itself.
"""

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from agentrl.learner.compiled import compile_layers
from agentrl.learner.distributed import Team
from agentrl.learner.logprobs import predictor_index
from agentrl.learner.model import disable_dropout, load_causal_lm, place, predictor_states, row_arguments, shard
from agentrl.learner.optim import OptimizerSettings, build_optimizer
from agentrl.learner.packing import PackedRow, pack_row
from agentrl.learner.sequence_parallel import SequenceGroup, joined
from agentrl.learner.settings import CriticSettings

logger = logging.getLogger(__name__)


class ValueModel(nn.Module):
    """A transformer with one number per token. (Letters: N tokens in a row, M asked for.)"""

    def __init__(self, hf: Any, *, sequence: SequenceGroup | None = None) -> None:
        super().__init__()
        self.sequence = sequence
        # Only the backbone becomes a submodule: the LM head would be dead weight in every checkpoint.
        self.base_model = hf.base_model
        self.config = hf.config
        self.value_head = nn.Linear(int(hf.config.get_text_config().hidden_size), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @property
    def layers(self) -> Any:
        return getattr(self.base_model, "layers", ())

    def forward(
        self,
        ids: Tensor,  # [N] int64
        position_ids: Tensor,  # [N] int64, restarting at 0 for each sequence
        cu_seqlens: Tensor,  # [S + 1] int32
        max_length: int,
        value_positions: Tensor,  # [M] int64, never a sequence's first
    ) -> Tensor:  # [M] fp32
        wanted = predictor_index(value_positions, position_ids)
        hidden, own = predictor_states(self, ids, position_ids, cu_seqlens, max_length, wanted, self.sequence)
        # A sum over the head's one column, not an index: FSDP hooks the output, which must not be a view.
        values = self.value_head(hidden).float().sum(dim=-1)
        return values if self.sequence is None or own is None else joined(values, own, len(wanted), self.sequence)


class Critic:
    """The value model, its optimizer and its count of updates."""

    def __init__(
        self,
        settings: CriticSettings,
        *,
        policy_path: str | Path,
        team: Team,
        dtype: Literal["fp32", "bf16"] = "fp32",
        gradient_checkpointing: bool = False,
        offload: bool = False,
        compiled: bool = False,
    ) -> None:
        self.settings = settings
        hf = load_causal_lm(settings.path or policy_path, sequence=team.sequence)
        if gradient_checkpointing:
            hf.activation_checkpointing_enable({"use_reentrant": False})
        disable_dropout(hf)
        self.model = ValueModel(hf, sequence=team.sequence)
        place(self.model, team, offload=offload)
        self.model.train()
        if compiled:
            compile_layers(self.model.layers, team.device)
        shard(self.model, self.model.layers, team, dtype=dtype, offload=offload)
        self.optimizer_settings: OptimizerSettings = settings.optimizer
        self.optimizer = build_optimizer(self.model, settings.optimizer)
        self.num_updates = 0

    def values(self, ids: Tensor, row: PackedRow, positions: Tensor) -> Tensor:
        """[M] of a packed row's tokens at ``positions`` [M]."""
        return self.model(*row_arguments(ids, row), positions)

    def empty_pass(self, team: Team) -> Tensor:
        """A pass that adds zero to the loss, as `model.empty_pass`."""
        ids = torch.zeros(2, dtype=torch.int64, device=team.device)
        row = pack_row(np.array([0, 2]), [0])
        return self.values(ids, row, torch.ones(1, dtype=torch.int64, device=team.device)).sum() * 0.0
