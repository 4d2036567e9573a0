"""What a rank says when the others are gone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentrl.process import ClaimedPort

ROOT = Path(__file__).parents[2]
PATIENCE_S = 250.0


RANK = """
import os, signal, sys, time
from agentrl.errors import RankLost
from agentrl.learner.distributed import start_team, stop_team
from agentrl.learner.lost_ranks import explaining_lost_ranks

print("ready", flush=True)
sys.stdin.readline()
team = start_team(device="cpu", timeout_s=float(sys.argv[2]))
assert team.broadcast_json({"do": "idle"} if team.is_main else None) == {"do": "idle"}
if team.rank == 1:
    if sys.argv[1] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.readline()
try:
    with explaining_lost_ranks(team, timeout_s=float(sys.argv[2])):
        team.barrier()
except RankLost as error:
    print(error, flush=True)
    os._exit(3)
"""


def start(rank: int, port: int, *, behaviour: str, timeout_s: float) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", RANK, behaviour, str(timeout_s)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize(("behaviour", "timeout_s", "code"), [("dies", 100.0, -signal.SIGKILL), ("does not come", 15.0, None)])
def test_a_rank_whose_sibling_is_gone_says_so_with_the_limit_and_what_to_do(
    behaviour: str, timeout_s: float, code: int | None
) -> None:
    with ClaimedPort("127.0.0.1") as port:
        check_what_rank_0_says(port, behaviour, timeout_s, code)


def check_what_rank_0_says(port: int, behaviour: str, timeout_s: float, code: int | None) -> None:
    ranks = [start(rank, port, behaviour=behaviour, timeout_s=timeout_s) for rank in (0, 1)]
    try:
        for rank in ranks:  # the limit is for collectives; how long each takes to import torch is another matter
            assert rank.stdout is not None
            assert any(line == "ready\n" for line in rank.stdout), "it ended while starting"
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("go\n")
            rank.stdin.flush()
        said, _ = ranks[0].communicate(timeout=PATIENCE_S)
        assert ranks[0].returncode == 3, said
        assert "rank 0 of 2 lost the others" in said
        assert f"learn.rank_timeout_s={timeout_s:g}" in said
        if code is not None:
            assert ranks[1].wait(PATIENCE_S) == code
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


LAST_EXCHANGE = """
import sys, threading, time
import torch
import torch.distributed as dist
from agentrl.learner.distributed import start_team, stop_team
from agentrl.process import end_process

class Sent(bytearray):
    def __del__(self):
        if threading.get_ident() == threading.main_thread().ident:
            return  # the group's thread was done with it before this one
        released.set()
        while True:
            time.sleep(0.001)

released = threading.Event()
start_team(device="cpu")
kept = dist.group.WORLD  # as parameters, meshes and torch's own caches keep it
while not released.wait(0.1):  # until the group's thread is the last that holds what was sent
    dist.all_reduce(torch.frombuffer(Sent(8), dtype=torch.uint8), async_op=True)
stop_team()
print("done")
end_process(3)
"""


def test_a_rank_whose_work_is_done_ends_with_its_own_exit_code_whatever_torchs_threads_still_hold() -> None:
    """`sys.exit` ends it by SIGABRT: "terminate called without an active exception"."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LAST_EXCHANGE], env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout) == (3, "done\n"), done.stderr
