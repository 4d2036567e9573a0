"""Rank 0 of a process group: reads weights from files and broadcasts their bytes to one engine. A process of its own.

``serve`` starts one per engine (``weight_broadcast``) and speaks JSON lines with it over stdin and stdout: a stuck collective can
only be ended with its process, and torch stays out of the event loop. No tensor is looked into: a bucket is bytes.

    {"port": 4711}                                                      said at the start: the rendezvous listens there
    {"join": "<group>", "world_size": 3}             -> {"done": 0}     when the engine's ranks have joined
    {"send": [["<file>", <first byte>, <bytes>]]}    -> {"done": <bytes>}
    anything that fails                              -> {"error": "<what>"}

It exits when stdin ends, also in the middle of a collective.
"""

import argparse
import json
import os
import queue
import socket
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def join_group(store: dist.Store, *, group: str, rank: int, world_size: int, backend: str, timeout: timedelta) -> Any:
    """A process group beside any default one, over the keys that SGLang's ``init_custom_process_group`` uses.

    Blocks until all ranks are there. torch has no public call for a group of ranks that do not share a default group.

    Raises:
        RuntimeError: the others did not come in time, or went away.
    """
    internals: Any = c10d
    made, _ = internals._new_process_group_helper(
        world_size, rank, [], dist.Backend(backend), dist.PrefixStore(group, store), group_name=group, timeout=timeout
    )
    internals._world.pg_group_ranks[made] = {index: index for index in range(world_size)}
    return made


class Sender:
    """One group with this process as rank 0.

    Args:
        address: of this machine, as the engine reaches it; the rendezvous listens there and nowhere else.
        backend: ``gloo`` sends from host memory, ``nccl`` from the first visible GPU.
        timeout: limit of joining and of each broadcast.
    """

    def __init__(self, *, address: str, backend: str, timeout: timedelta) -> None:
        family = socket.getaddrinfo(address, None)[0][0]
        self._socket = socket.create_server((address, 0), family=family)
        self.port = int(self._socket.getsockname()[1])
        self._backend, self._timeout = backend, timeout
        self._store = dist.TCPStore(
            address, self.port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=self._socket.detach()
        )
        self._group: Any = None
        self._host = torch.empty(0, dtype=torch.uint8)

    def join(self, group: str, world_size: int) -> None:
        """Wait for the engine's ranks."""
        if self._backend == "nccl":
            torch.cuda.set_device(0)
        self._group = join_group(
            self._store, group=group, rank=0, world_size=world_size, backend=self._backend, timeout=self._timeout
        )

    def send(self, pieces: Sequence[tuple[str, int, int]]) -> int:
        """Broadcast the pieces' bytes as one tensor; returns their number."""
        size = sum(piece[2] for piece in pieces)
        if len(self._host) < size:
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=self._backend == "nccl")
        data = self._host[:size]
        view, filled = data.numpy().data, 0
        for path, begin, length in pieces:
            with open(path, "rb") as file:
                file.seek(begin)
                while length:
                    num_read = file.readinto(view[filled : filled + length])
                    if not num_read:
                        raise OSError(f"{path} ends {length} bytes too early: it was cut or replaced")
                    filled, length = filled + num_read, length - num_read
        if self._backend == "nccl":
            data = data.to("cuda", non_blocking=True)
        dist.broadcast(data, src=0, group=self._group)
        if self._backend == "nccl":
            torch.cuda.synchronize()
        return size


def _serve(sender: Sender, commands: "queue.SimpleQueue[str]", replies: TextIO) -> None:
    def say(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    say({"port": sender.port})
    while True:
        command: dict[str, Any] = json.loads(commands.get())
        try:
            if "join" in command:
                sender.join(str(command["join"]), int(command["world_size"]))
                say({"done": 0})
            else:
                say({"done": sender.send(command["send"])})
        except (OSError, RuntimeError) as error:
            say({"error": f"{type(error).__name__}: {error}"})


def _read_commands(commands: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        commands.put(line)
    os._exit(0)


def main() -> None:
    """Serve commands until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m agentrl.serving.weight_sender")
    parser.add_argument("--address", required=True)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="limit of joining and of each broadcast")
    args = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # gloo prints to stdout
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(commands,), name="commands", daemon=True).start()
    _serve(Sender(address=args.address, backend=args.backend, timeout=timedelta(seconds=args.timeout_s)), commands, replies)


if __name__ == "__main__":
    main()
