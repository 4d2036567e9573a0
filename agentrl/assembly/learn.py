"""``agentrl learn``: trajectories from the stream in, new weights out; one process per FSDP2 rank."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from agentrl.assembly.parts import build_toolbox, fingerprint, load_tokenizer, run_dir_of, stream_url
from agentrl.assembly.run import refuse_if_active
from agentrl.config import Config, dump_config
from agentrl.process import die_with_parent
from agentrl.telemetry.run_dir import RunDir

log = logging.getLogger(__name__)


def main(config: Config, arguments: Sequence[str]) -> None:
    """Learn until ``learn.steps`` or SIGTERM. With ``learn.ranks`` above 1, become the parent of a torchrun."""
    if config.learn.ranks > 1 and "RANK" not in os.environ:
        sys.exit(_torchrun(config.learn.ranks, arguments))
    directory = run_dir_of(config).create()
    if int(os.environ.get("RANK", "0")) == 0:
        refuse_if_active(directory, ("learn",))
        if not directory.config.is_file():
            directory.config.write_text(dump_config(config))
        directory.register("learn")
    try:
        _learn(config, directory)
    finally:
        if int(os.environ.get("RANK", "0")) == 0:
            directory.deregister("learn")


def _torchrun(ranks: int, arguments: Sequence[str]) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen([*command, "-m", "agentrl", "learn", *arguments], preexec_fn=die_with_parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: process.send_signal(n))
    return process.wait()


def _learn(config: Config, directory: RunDir) -> None:
    raise NotImplementedError
