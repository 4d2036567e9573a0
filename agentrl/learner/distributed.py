"""The learner's ranks: start from torchrun's environment, and move plain bytes between them (nothing is pickled, I10).

Rank 0 talks to the world; the others follow its commands. Control messages are JSON, payloads raw tensors, both over gloo on
the CPU, so they never disturb the accelerator's stream.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from agentrl.errors import ConfigError
from agentrl.learner.sequence_parallel import SequenceGroup, group_ranks


@dataclass(frozen=True, slots=True)
class Team:
    """This process's place among the learner's ranks.

    Weights are sharded over all ranks. Rows are dealt out to sequence groups: without sequence parallelism each rank is one.
    """

    rank: int
    world_size: int
    device: torch.device
    sequence: SequenceGroup | None = None
    """The neighbouring ranks that share this rank's rows; None when it has its rows for itself."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_row_groups(self) -> int:
        """Sequence groups: how many rows are computed at a time."""
        return self.world_size // (self.sequence.size if self.sequence is not None else 1)

    @property
    def row_group(self) -> int:
        """This rank's sequence group."""
        return self.rank // (self.sequence.size if self.sequence is not None else 1)

    @property
    def speaks_for_rows(self) -> bool:
        """Whether this rank's numbers enter sums over ranks: one rank of each sequence group has them counted."""
        return self.sequence is None or self.sequence.rank == 0

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank; the others pass None."""
        if self.world_size == 1:
            if data is None:
                raise ValueError("rank 0 must pass the bytes to broadcast")
            return data
        size = torch.tensor([len(data) if data is not None else 0], dtype=torch.int64)
        dist.broadcast(size, src=0)
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
        if int(size):
            dist.broadcast(buffer, src=0)
        return buffer.numpy().tobytes()

    def broadcast_json(self, message: Mapping[str, Any] | None) -> dict[str, Any]:
        """Rank 0's message on every rank; the others pass None."""
        data = json.dumps(message).encode() if message is not None else None
        return json.loads(self.broadcast_bytes(data))

    def broadcast_arrays(self, arrays: Mapping[str, NDArray[Any]] | None) -> dict[str, NDArray[Any]]:
        """Rank 0's named arrays on every rank, as raw little-endian buffers behind a JSON header."""
        if self.world_size == 1 and arrays is not None:
            return dict(arrays)
        header = None
        if arrays is not None:
            header = {"arrays": [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()]}
        described = self.broadcast_json(header)["arrays"]
        received: dict[str, NDArray[Any]] = {}
        for name, dtype, shape in described:
            data = np.ascontiguousarray(arrays[name]).tobytes() if arrays is not None else None
            received[name] = np.frombuffer(self.broadcast_bytes(data), dtype=np.dtype(dtype)).reshape(shape)
        return received

    def all_names(self, names: Sequence[str]) -> list[str]:
        """The union of every rank's names, sorted; a collective."""
        own = json.dumps(list(names)).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        longest = int(max(sizes))
        padded = torch.frombuffer(bytearray(own.ljust(longest)), dtype=torch.uint8)
        gathered = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded)
        return sorted({name for data in gathered for name in json.loads(data.numpy().tobytes())})

    def sum_(self, values: Tensor) -> Tensor:
        """Add up ``values`` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            # A tiny reduction instead of dist.barrier: on CUDA that would guess a device.
            dist.all_reduce(torch.zeros(1))


def start_team(*, device: str = "auto", timeout_s: float = 1800.0, sequence_parallel: int = 1) -> Team:
    """Join the ranks that torchrun started; without torchrun, a team of one.

    Args:
        device: ``auto | cpu | cuda``; auto takes CUDA where there is one.
        timeout_s: after which a collective that some rank never joined fails.
        sequence_parallel: ranks that share each row's tokens; divides the number of ranks.

    Raises:
        ConfigError: ``cuda`` was asked for and there is none, or the ranks cannot be grouped.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device!r} is not known: use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda but torch sees no CUDA device: use device=auto or check the driver")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Team(
        rank=rank, world_size=world_size, device=place, sequence=_sequence_group(place.type, world_size, sequence_parallel)
    )


def _sequence_group(device_type: str, world_size: int, size: int) -> SequenceGroup | None:
    num_groups = group_ranks(world_size, size)
    if size == 1:
        return None
    # Neighbours share rows: they are the ones with the fastest links, and exchange twice per layer.
    mesh = init_device_mesh(device_type, (num_groups, size), mesh_dim_names=("rows", "sequence"))
    return SequenceGroup(group=mesh.get_group("sequence"), rank=mesh.get_local_rank("sequence"), size=size)


def stop_team() -> None:
    """Leave the process group; safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()
