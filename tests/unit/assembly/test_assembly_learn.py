"""The learner as the config describes it: shorthands, sections, and refusals that name the nearest valid name."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from agentrl.assembly.best import keep_best
from agentrl.assembly.doctor import diagnose_machine
from agentrl.assembly.learn import check_learning, critic_settings, lora_settings, loss_settings
from agentrl.assembly.run import run
from agentrl.config import Config, load_config, parse_config
from agentrl.errors import ConfigError
from agentrl.learner.settings import KLSettings, Overlong
from agentrl.telemetry.run_dir import RunDir

ROOT = Path(__file__).parents[3]


def config(learn: dict[str, Any] | None = None, **sections: Any) -> Config:
    return parse_config({"learn": learn or {}} | sections, place="test")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_describes_a_learner_that_can_work(path: Path) -> None:
    check_learning(load_config(path))


def test_the_quickstarts_loss_is_what_it_was() -> None:
    loss = loss_settings(load_config(ROOT / "configs" / "quickstart.yaml"))
    assert (loss.advantage, loss.advantage_params) == ("grpo", {"epsilon": 1e-4})
    assert (loss.policy_loss, loss.policy_params) == ("ppo", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28})
    assert (loss.old_logprobs, loss.is_level, loss.rejection_rules, loss.overlong) == ("rollout", None, None, None)
    assert (loss.kl, loss.num_epochs, loss.num_minibatches) == (KLSettings(), 1, 1)


def test_decoupled_mode_and_its_shorthand_are_the_same() -> None:
    short = loss_settings(config({"old_logprobs": "recompute", "tis_cap": 3.0}))
    full = loss_settings(config({"correction": {"mode": "decoupled", "weights": "token", "threshold": 3.0}}))
    assert short == full
    assert (full.old_logprobs, full.is_level, full.is_threshold, full.is_pure) == ("recompute", "token", 3.0, False)


def test_pure_mode_is_reinforce_with_weights_on_the_rollouts_logprobs() -> None:
    correction = {"mode": "pure", "weights": "sequence", "threshold": "0.5_5.0", "batch_normalize": True}
    loss = loss_settings(config({"loss": "reinforce", "correction": correction}))
    assert (loss.is_pure, loss.old_logprobs, loss.is_threshold) == (True, "rollout", "0.5_5.0")
    check_learning(config({"loss": "reinforce", "correction": correction}))


def test_sections_reach_the_learner() -> None:
    given = config(
        {
            "advantage": "gae", "kl_coef": 0.01, "minibatches": 4, "epochs": 2, "turn_rewards": True,
            "kl": {"place": "reward", "controller": "adaptive", "target": 0.2},
            "overlong": {"buffer": 64}, "critic": {"lr": 3e-5, "warmup_steps": 5, "clip": None}, "lora": {"rank": 8},
            "correction": {"reject": "seq_mean_k3", "reject_threshold": 0.01},
        },
        serve={"tokens": 512},
    )  # fmt: skip
    loss, critic, lora = loss_settings(given), critic_settings(given), lora_settings(given)
    assert loss.kl == KLSettings(coef=0.01, place="reward", controller="adaptive", target=0.2)
    assert loss.overlong == Overlong(max_length=512, buffer=64)
    assert (loss.num_minibatches, loss.num_epochs, loss.use_turn_rewards) == (4, 2, True)
    assert (loss.rejection_rules, loss.rejection_thresholds) == ("seq_mean_k3", 0.01)
    assert critic is not None
    assert (critic.optimizer.lr, critic.warmup_steps, critic.cliprange_value) == (3e-5, 5, None)
    assert lora is not None
    assert (lora.rank, lora.scale) == (8, 2.0)
    check_learning(given)


def test_dropping_groups_that_the_estimator_could_learn_from_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check_learning(config({"advantage": "reinforce_plus_plus", "zero_spread": "keep"}))
    assert caplog.text == ""
    check_learning(config({"advantage": "reinforce_plus_plus"}))
    assert "learn.zero_spread=drop" in caplog.text


@pytest.mark.parametrize(
    ("learn", "words"),
    [
        ({"advantage": "rlo"}, ["'rlo'", "Did you mean rloo"]),
        ({"loss": "pp0"}, ["'pp0'", "Did you mean ppo"]),
        ({"loss": "sapo", "loss_params": {"tau_positive": 1.0}}, ["tau_positive", "Did you mean tau_pos"]),
        ({"loss_params": {"clip_ratio_c": 1.0}}, ["clip_ratio_c=1 must exceed 1"]),
        ({"kl": {"estimator": "k33"}, "kl_coef": 0.1}, ["k33", "Did you mean k3"]),
        ({"correction": {"reject": "seq_max", "reject_threshold": 1.0}}, ["seq_max", "Did you mean seq_max_k"]),
        ({"overlong": {"buffer": 4096}}, ["buffer=4096", "max_length=1024"]),
    ],
)
def test_a_name_or_value_that_cannot_work_is_refused_before_anything_starts(learn: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_learning(config(learn))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("learn", "message"),
    [
        ({"advantage": "gae"}, "add a `critic:` section"),
        ({"critic": {}}, "of use to learn.advantage=gae only"),
        ({"correction": {"mode": "pure"}}, "set learn.loss=reinforce"),
        ({"correction": {"mode": "bypass"}, "old_logprobs": "recompute"}, "contradicts"),
        ({"correction": {"weights": "token"}}, "count the ratio twice"),
        ({"correction": {"reject": "token_k1"}}, "go together"),
        ({"correction": {"mode": "decoupled", "weights": "token"}, "tis_cap": 2.0}, "keep one of them"),
        ({"correction": {"treshold": 2.0}}, "Did you mean `learn.correction.threshold`"),
        ({"lora": {"alpha": 4.0}}, "`learn.lora.rank`"),
    ],
)
def test_sections_that_contradict_each_other_are_refused_by_the_schema(learn: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(learn)


def test_a_learner_that_cannot_work_is_refused_before_a_run_starts_anything(tmp_path: Path) -> None:
    broken = config({"loss": "ppoo"}, run={"dir": str(tmp_path), "name": "r"})
    with pytest.raises(ConfigError, match="ppoo"):
        run(broken, [])
    assert list(tmp_path.iterdir()) == []


def test_doctor_checks_the_learner_of_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for slow in ("_stream_server", "_sandbox"):
        monkeypatch.setattr(f"agentrl.assembly.doctor.{slow}", lambda: None)
    findings = {f.subject: f for f in diagnose_machine(config({"loss": "ppoo"}, run={"dir": str(tmp_path)})) if f}
    assert findings["learner"].level == "fail"
    assert "ppoo" in findings["learner"].text
    findings = {f.subject: f for f in diagnose_machine(config(run={"dir": str(tmp_path)})) if f}
    assert findings["learner"].level == "ok"


def test_ranks_that_cannot_be_grouped_are_refused() -> None:
    check_learning(config({"ranks": 4, "sequence_parallel": 2}))
    with pytest.raises(ConfigError, match=r"sequence_parallel=3 does not divide the learner's 4 ranks: use one of \[1, 2, 4\]"):
        check_learning(config({"ranks": 4, "sequence_parallel": 3}))


def test_the_best_is_kept_by_metrics_that_exist() -> None:
    for metric in ("reward/mean", "reward/correct/mean", "eval/success"):
        check_learning(config({"keep_best": {"metric": metric}}))
    with pytest.raises(ConfigError, match=r"learn.keep_best.metric='eval/sucess' is no metric .* Did you mean eval/success"):
        check_learning(config({"keep_best": {"metric": "eval/sucess"}}))


def test_an_evaluation_counts_for_the_checkpoint_it_was_made_of(tmp_path: Path) -> None:
    directory = RunDir(tmp_path).create()
    best = keep_best(config({"keep_best": {"metric": "eval/success", "mode": "max"}}), directory)
    assert best is not None
    assert best.measured is not None
    checkpoint = directory.checkpoints / "step_2"
    assert best.measured(checkpoint) is None
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")

    def evaluated(name: str, at_ns: int, **result: Any) -> None:
        file = directory.evals / f"{name}.json"
        file.write_text(json.dumps({"model": str(checkpoint), "temperature": 0.0, "success": 0.5} | result))
        os.utime(file, ns=(at_ns, at_ns))

    written = (checkpoint / "state.json").stat().st_mtime_ns
    evaluated("another-step", written + 9, model=str(directory.checkpoints / "step_4"))
    evaluated("sampled", written + 9, temperature=1.0)
    evaluated("before-it-was-written-anew", written - 9)
    (directory.evals / "torn.json").write_text("{")
    assert best.measured(checkpoint) is None
    evaluated("first", written + 1, success=0.25)
    evaluated("second", written + 2, success=0.75)
    assert best.measured(checkpoint) == 0.75
