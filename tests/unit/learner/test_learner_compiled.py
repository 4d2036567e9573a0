"""Compiled layers compute what the plain ones compute; without a compiler the error says so."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from learner_rig import assert_same_weights, batch_of, make_learner, random_group, weights_of

from agentrl.learner.attention import register_packed_attention
from agentrl.learner.distributed import Team

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_compiled_layers_learn_what_plain_ones_learn(model_dir: Path, team: Team) -> None:
    learned: list[Any] = []
    for compiled in (False, True):
        learner = make_learner(model_dir, team, lr=1e-3, compiled=compiled, micro_batch_tokens=90)
        try:
            batches = [batch_of([random_group(3 * step + g) for g in range(3)]) for step in range(2)]
            learned.append(([learner.step(batch) for batch in batches], weights_of(learner)))
        finally:
            register_packed_attention()
    (plain, plain_weights), (found, weights) = learned
    for step in range(2):
        for name in ("actor/pg_loss", "actor/grad_norm", "actor/entropy", "rollout_corr/k3_kl"):
            assert found[step][name] == pytest.approx(plain[step][name], abs=1e-4), (step, name)
    assert_same_weights(weights, plain_weights, atol=5e-5)


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    code = "import torch; from agentrl.learner.compiled import check_compiler; check_compiler(torch.device('cpu'))"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 1
    assert "ConfigError: learn.compile=true but nothing can be compiled for cpu here" in done.stderr, done.stderr[-2000:]
    assert "or set learn.compile=false" in done.stderr
