"""Adapters: only they are trained, they travel merged, peft reads them back, and without them the model is its own reference."""

from pathlib import Path

import numpy as np
import pytest
import torch
from learner_rig import assert_same_weights, batch_of, make_learner, plain_logprobs, random_group, weights_of

from agentrl.errors import ConfigError, WeightSyncError
from agentrl.learner.batching import StepBatch
from agentrl.learner.checkpoint import Checkpoints
from agentrl.learner.distributed import Team
from agentrl.learner.lora import LoraSettings
from agentrl.learner.settings import KLSettings, LossSettings
from agentrl.learner.weight_publisher import WeightPublisher

pytest.importorskip("peft")
LORA = LoraSettings(rank=4)
IDS = [9, 10, 11, 12, 13, 14]


@pytest.fixture
def batch() -> StepBatch:
    return batch_of([random_group(g, size=4) for g in range(2)])


def test_only_adapters_are_trained_and_optimised(model_dir: Path, team: Team, batch: StepBatch) -> None:
    learner = make_learner(model_dir, team, lora=LORA)
    before = weights_of(learner)
    learner.step(batch)
    learner.step(batch)
    after = weights_of(learner)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed == {name for name in before if ".lora_" in name}
    num_optimised = sum(len(group["params"]) for group in learner.optimizer.param_groups)
    assert num_optimised == len(changed) == 2 * 7 * 2


def test_before_training_the_merged_weights_are_the_starting_policy(model_dir: Path, team: Team, tmp_path: Path) -> None:
    learner = make_learner(model_dir, team, lora=LORA)
    learner.export(tmp_path)
    np.testing.assert_array_equal(plain_logprobs(tmp_path, IDS), plain_logprobs(model_dir, IDS))


def test_engines_get_merged_weights_and_peft_reads_the_adapters(
    model_dir: Path, team: Team, batch: StepBatch, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    learner = make_learner(model_dir, team, lora=LORA)
    learner.step(batch)
    learner.step(batch)
    learner.export(tmp_path)
    merged = plain_logprobs(tmp_path, IDS)
    assert np.abs(merged - plain_logprobs(model_dir, IDS)).max() > 1e-4
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    with torch.no_grad():
        logits = adapted(torch.tensor([IDS])).logits[0, :-1]
    picked = torch.log_softmax(logits, -1).gather(-1, torch.tensor(IDS)[1:, None])[:, 0]
    np.testing.assert_allclose(merged[1:], picked.numpy(), atol=1e-5)


def test_a_published_adapter_gives_an_engine_the_merged_weights(
    model_dir: Path, team: Team, batch: StepBatch, tmp_path: Path
) -> None:
    from agentrl.serving.embedded.checkpoint import CheckpointReader, copy_into
    from agentrl.serving.embedded_engine import load_model

    learner = make_learner(model_dir, team, lora=LORA)
    publisher = WeightPublisher(tmp_path / "weights", adapters_only=True)
    serving = load_model(model_dir, device="cpu", dtype="float32")
    reader = CheckpointReader(serving, model_dir)
    for _ in range(2):  # the second replaces the first, it is not added to it
        learner.step(batch)
        record = publisher.publish(learner, run_epoch=1)
        assert publisher.publish(learner, run_epoch=1) == record
        assert record.kind == "lora"
        assert sorted(f.name for f in Path(record.path).iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        copy_into(serving, reader.stage(record.path, expected_digest=record.digest))
        assert publisher.full_snapshot is not None
        merged = load_model(publisher.full_snapshot, device="cpu", dtype="float32").state_dict()
        assert all(torch.equal(value, merged[name]) for name, value in serving.state_dict().items())
    path = Checkpoints(tmp_path / "checkpoints").save(learner, step=2, state={}, weights_from=publisher.full_snapshot)
    assert (path / "model.safetensors").is_file()
    with pytest.raises(WeightSyncError, match="has digest"):
        reader.stage(record.path, expected_digest="sha256:0")


def test_the_policy_without_its_adapters_is_the_reference_and_no_second_model_is_loaded(
    model_dir: Path, team: Team, batch: StepBatch
) -> None:
    loss = LossSettings(kl=KLSettings(coef=0.1))
    adapted = make_learner(model_dir, team, lora=LORA, loss=loss)
    assert adapted.reference is None
    assert adapted.step(batch)["actor/kl_loss"] == pytest.approx(0, abs=1e-7)
    beside = make_learner(model_dir, team, lora=LORA, loss=loss, reference_path=model_dir)
    assert beside.reference is not None
    beside.step(batch)
    expected = beside.step(batch)["actor/kl_loss"]
    assert adapted.step(batch)["actor/kl_loss"] == pytest.approx(expected, abs=1e-7)
    assert expected > 0


def test_a_loaded_checkpoint_continues_exactly(model_dir: Path, team: Team, batch: StepBatch, tmp_path: Path) -> None:
    learner = make_learner(model_dir, team, lora=LORA)
    learner.step(batch)
    path = Checkpoints(tmp_path).save(learner, step=1, state={})
    assert (path / "adapter" / "adapter_model.safetensors").is_file()
    expected = learner.step(batch)
    fresh = make_learner(model_dir, team, lora=LORA)
    Checkpoints(tmp_path).load(fresh)
    metrics = fresh.step(batch)
    assert (metrics["actor/pg_loss"], metrics["actor/grad_norm"]) == (expected["actor/pg_loss"], expected["actor/grad_norm"])
    assert_same_weights(weights_of(fresh), weights_of(learner), atol=0)


def test_layers_that_do_not_exist_are_named(model_dir: Path, team: Team) -> None:
    with pytest.raises(ConfigError, match=r"targets=\['qproj'\] fit no layer of Qwen2ForCausalLM"):
        make_learner(model_dir, team, lora=LoraSettings(rank=2, targets=("qproj",)))
    with pytest.raises(ConfigError, match="rank=0"):
        LoraSettings(rank=0)
