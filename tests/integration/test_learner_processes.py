"""The learner as real processes: SIGKILL in the middle of a checkpoint, and two ranks under torchrun."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RIG = Path(__file__).parents[1] / "unit" / "learner"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(RIG))

from learner_rig import tiny_dir  # noqa: E402

ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{RIG}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

LEARN = '''
"""Learn from the groups in memory; kill this process (SIGKILL) at the given stage of the given save."""
import json, os, signal, sys
from pathlib import Path
from learner_rig import MemorySource, make_learner, random_group
from agentrl.learner.batching import BatchBuilder
from agentrl.learner.checkpoint import Checkpoints
from agentrl.learner.distributed import start_team, stop_team
from agentrl.learner.loop import run_learning
from agentrl.learner.lora import LoraSettings
from agentrl.learner.optim import OptimizerSettings
from agentrl.learner.settings import CriticSettings, KLSettings, LossSettings
from agentrl.learner.weight_publisher import WeightPublisher
from agentrl.process import end_process

model_dir, run_dir, num_steps, stage, nth, mode = sys.argv[1:7]
seen = 0
def on_stage(name):
    global seen
    seen += name == stage
    if name == stage and seen == int(nth):
        os.kill(os.getpid(), signal.SIGKILL)
team = start_team(device="cpu", timeout_s=600)
def on_step(metrics):
    with open(Path(run_dir) / "metrics.jsonl", "a") as f:
        f.write(json.dumps(metrics) + "\\n")
source = MemorySource([random_group(g, size=2) for g in range(int(num_steps) * 2)]) if team.is_main else None
options = {}
if mode == "everything":
    # A critic, adapters whose absence is the reference, a steered KL, recomputed anchors; rows too few for two ranks.
    loss = LossSettings(
        advantage="gae", old_logprobs="recompute", is_level="token", is_batch_normalize=True,
        kl=KLSettings(coef=0.1, place="reward", controller="adaptive", target=1e-4, horizon=10), num_minibatches=2,
    )
    options = {"loss": loss, "lora": LoraSettings(rank=4), "critic": CriticSettings(optimizer=OptimizerSettings(lr=1e-2))}
learner = make_learner(Path(model_dir), team, lr=1e-3, micro_batch_tokens=100 if options else 40, **options)
run_learning(
    source, BatchBuilder(groups_per_step=2, max_staleness=100), learner,
    Checkpoints(Path(run_dir) / "checkpoints", on_stage=on_stage), WeightPublisher(Path(run_dir) / "weights"),
    lambda record, consumed: None, num_steps=int(num_steps), save_every=2, on_step=on_step, stall_timeout_s=300,
    async_save=mode == "async",
)
stop_team()
end_process(0)
'''


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dir(tmp_path_factory.mktemp("model"))


def learn(
    model_dir: Path,
    run_dir: Path,
    *,
    num_steps: int,
    stage: str = "-",
    nth: int = 0,
    ranks: int = 1,
    mode: str = "plain",
) -> subprocess.CompletedProcess[str]:
    run_dir.mkdir(exist_ok=True)
    script = run_dir / "learn.py"
    script.write_text(LEARN)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, str(script), str(model_dir), str(run_dir), str(num_steps), stage, str(nth)]
    command.append(mode)
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)


def metrics_by_step(run_dir: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {int(row["step"]): row for row in rows}


def trained_ids(run_dir: Path) -> list[str]:
    lines = (run_dir / "checkpoints" / "latest" / "trained_ids.jsonl").read_text().splitlines()
    return [json.loads(line)["id"] for line in lines]


@pytest.fixture(scope="module")
def calm(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without a kill."""
    directory = tmp_path_factory.mktemp("runs") / "calm"
    assert learn(model_dir, directory, num_steps=6).returncode == 0
    return directory


@pytest.mark.slow
def test_a_learner_killed_in_the_middle_of_saving_comes_back_as_if_it_had_not_been(
    model_dir: Path, calm: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    for stage, nth in (("rename", 2), ("prune", 1)):
        dead = learn(model_dir, killed, num_steps=6, stage=stage, nth=nth)
        assert dead.returncode == -signal.SIGKILL, dead.stderr[-2000:]
    done = learn(model_dir, killed, num_steps=6)
    assert done.returncode == 0, done.stderr[-2000:]
    expected, found = metrics_by_step(calm), metrics_by_step(killed)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    for step, row in expected.items():
        assert found[step]["actor/pg_loss"] == row["actor/pg_loss"]
        assert found[step]["actor/grad_norm"] == row["actor/grad_norm"]
    assert len(trained_ids(killed)) == len(set(trained_ids(killed))) == 24
    assert sorted(trained_ids(killed)) == sorted(trained_ids(calm))


@pytest.mark.slow
def test_a_learner_killed_while_a_checkpoint_is_written_behind_its_back_comes_back_as_if_it_had_not_been(
    model_dir: Path, calm: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    for stage, nth in (("shards", 2), ("latest", 1)):  # in the thread, while the main one trains or waits
        dead = learn(model_dir, killed, num_steps=6, stage=stage, nth=nth, mode="async")
        assert dead.returncode == -signal.SIGKILL, dead.stderr[-2000:]
    done = learn(model_dir, killed, num_steps=6, ranks=2, mode="async")  # two ranks' threads write together
    assert done.returncode == 0, done.stderr[-2000:]
    expected, found = metrics_by_step(calm), metrics_by_step(killed)
    for step in (1, 2, 3, 4, 5, 6):
        assert found[step]["actor/pg_loss"] == pytest.approx(expected[step]["actor/pg_loss"], abs=1e-5)
    assert sorted(trained_ids(killed)) == sorted(trained_ids(calm))


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns_and_three_and_one_can_continue_their_checkpoint(
    model_dir: Path, calm: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    two = tmp_path / "two"
    for num_steps, ranks in ((2, 2), (3, 3), (6, 1)):  # each from the checkpoint of the ranks before
        done = learn(model_dir, two, num_steps=num_steps, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, found = metrics_by_step(calm), metrics_by_step(two)
    for step in (1, 2, 3, 4, 5, 6):
        turn_gaps = ("rollout_corr/turn_logprob_diff_mean", "rollout_corr/turn_logprob_diff_max")
        for name in ("actor/pg_loss", "actor/grad_norm", "actor/entropy", "actor/ppo_kl", "rollout_corr/k3_kl", *turn_gaps):
            assert found[step][name] == pytest.approx(expected[step][name], abs=1e-5), (step, name)
    weights_one = load_file(calm / "checkpoints" / "latest" / "model.safetensors")
    weights_two = load_file(two / "checkpoints" / "latest" / "model.safetensors")
    assert weights_one.keys() == weights_two.keys()
    for name, value in weights_one.items():
        assert (value - weights_two[name]).abs().max() < 1e-4, name
    assert sorted(trained_ids(calm)) == sorted(trained_ids(two))


@pytest.mark.slow
def test_two_ranks_agree_with_one_on_critic_adapters_and_steered_kl_though_one_of_them_has_no_work(
    model_dir: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    done = learn(model_dir, one, num_steps=3, mode="everything")
    assert done.returncode == 0, done.stderr[-3000:]
    done = learn(model_dir, two, num_steps=2, ranks=2, mode="everything")
    assert done.returncode == 0, done.stderr[-3000:]
    done = learn(model_dir, two, num_steps=3, mode="everything")  # on one rank, from the two ranks' checkpoint
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = metrics_by_step(one), metrics_by_step(two)
    names = (
        "actor/pg_loss", "actor/grad_norm", "actor/kl_coef", "actor/reward_kl_penalty", "critic/vf_loss", "critic/grad_norm",
        "critic/values/mean", "rollout_corr/rollout_is_mean",
    )  # fmt: skip
    for step in (1, 2, 3):
        for name in names:
            assert found[step][name] == pytest.approx(expected[step][name], abs=2e-5, rel=1e-4), (step, name)
    assert expected[2]["actor/kl_coef"] != expected[3]["actor/kl_coef"]
