"""Ranks that share the tokens of each row learn what one rank learns, alone and beside other such groups."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RIG = Path(__file__).parents[1] / "unit" / "learner"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(RIG))

from learner_rig import tiny_dir  # noqa: E402

STEPS = '''
"""Two steps of each named case on each number of ranks; metrics and weights into one file per run. Ranks are forked: one import."""
import json, os, sys
import torch
from learner_rig import batch_of, make_learner, random_group, weights_of
from agentrl.learner.distributed import start_team, stop_team
from agentrl.learner.lora import LoraSettings
from agentrl.learner.optim import OptimizerSettings
from agentrl.learner.settings import CriticSettings, KLSettings, LossSettings
from agentrl.process import ClaimedPort
import transformers.models.llama.modeling_llama, transformers.models.qwen2.modeling_qwen2, peft  # before the fork
import torch.distributed.checkpoint.state_dict, torch.distributed.fsdp

model_dir, out_dir = sys.argv[1:3]
CASES = {
    # Rows of odd lengths, trajectories of two segments.
    "plain": lambda: {"micro_batch_tokens": 75, "loss": LossSettings(entropy_coef=0.01)},
    # Squared probabilities, a reference of its own, sequence-level ratios, activations computed again in the backward pass.
    "sequence": lambda: {"gradient_checkpointing": True, "loss": LossSettings(
        advantage="optimal_token_baseline", policy_loss="gspo", loss_agg_mode="seq-mean-token-mean", kl=KLSettings(coef=0.1),
        policy_params={"clip_ratio_low": 0.2, "clip_ratio_high": 0.28})},
    # A critic, adapters whose absence is the reference, a KL in the reward, recomputed anchors and their weights.
    "critic": lambda: {"lora": LoraSettings(rank=4), "critic": CriticSettings(optimizer=OptimizerSettings(lr=1e-2)),
        "micro_batch_tokens": 90, "loss": LossSettings(advantage="gae", old_logprobs="recompute", is_level="token",
        is_batch_normalize=True, kl=KLSettings(coef=0.1, place="reward", controller="adaptive", target=1e-4, horizon=10))},
}

def work(rank, world, size, case, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    team = start_team(device="cpu", timeout_s=500, sequence_parallel=size)
    learner = make_learner(model_dir, team, lr=1e-3, **CASES[case]())
    rows = []
    for step in range(2):
        batch = batch_of([random_group(3 * step + g, size=3, num_segments=2) for g in range(2)], version=step)
        rows.append(learner.step(batch if team.is_main else None))
    weights = weights_of(learner)
    if team.is_main:
        torch.save({"metrics": rows, "weights": weights}, f"{out_dir}/{case}-{world}-{size}.pt")
    stop_team()

for case, world, size in json.loads(sys.argv[3]):
    with ClaimedPort("127.0.0.1") as port:
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                try:
                    work(rank, world, size, case, port)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            pids.append(pid)
        if any(os.waitpid(pid, 0)[1] for pid in pids):
            sys.exit(f"a rank of {case} on {world} ranks failed")
'''

RUNS = [
    ("plain", 1, 1), ("plain", 2, 2), ("plain", 4, 2), ("sequence", 1, 1), ("sequence", 2, 2), ("critic", 1, 1), ("critic", 4, 4),
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    script = directory / "steps.py"
    script.write_text(STEPS)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{RIG}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    model_dir = tiny_dir(tmp_path_factory.mktemp("model"))
    command = [sys.executable, str(script), str(model_dir), str(directory), json.dumps(RUNS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


@pytest.mark.parametrize(("case", "world", "size"), [run for run in RUNS if run[1] > 1])
def test_ranks_that_share_rows_learn_what_one_rank_learns(results: Path, case: str, world: int, size: int) -> None:
    import torch

    one = torch.load(results / f"{case}-1-1.pt")
    shared = torch.load(results / f"{case}-{world}-{size}.pt")
    for step, (expected, found) in enumerate(zip(one["metrics"], shared["metrics"], strict=True)):
        assert expected["update/applied"] == 1
        for name, value in expected.items():
            if not name.startswith(("timing_s", "perf/")):
                assert found[name] == pytest.approx(value, abs=1e-5, rel=1e-4), (step, name)
    assert one["weights"].keys() == shared["weights"].keys()
    for name, value in one["weights"].items():
        torch.testing.assert_close(shared["weights"][name], value, rtol=0, atol=5e-5)
