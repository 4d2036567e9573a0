"""Checkpoints restore everything, ignore what is torn, and keep what `latest` names. Snapshots are whole and described."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_rig import assert_same_weights, batch_of, make_learner, plain_logprobs, random_group, tiny_dir, weights_of
from torch.distributed.tensor import DTensor

from agentrl.errors import CheckpointError
from agentrl.learner.checkpoint import Checkpoints, Consumed, damage, read_jsonl
from agentrl.learner.distributed import Team
from agentrl.learner.learner import Learner
from agentrl.learner.weight_publisher import WeightPublisher
from agentrl.serving.snapshot_store import SnapshotStore
from agentrl.weights.digest import weights_digest


@pytest.fixture
def learner(model_dir: Path, team: Team) -> Learner:
    learner = make_learner(model_dir, team)
    learner.step(batch_of([random_group(0)]))
    return learner


def test_a_loaded_checkpoint_continues_exactly_as_if_nothing_had_happened(
    model_dir: Path, team: Team, learner: Learner, tmp_path: Path
) -> None:
    Checkpoints(tmp_path).save(learner, step=1, state={"consumed_groups": 3})
    expected = learner.step(batch_of([random_group(1)]))
    expected_random = torch.rand(3)
    fresh = make_learner(model_dir, team)
    loaded = Checkpoints(tmp_path).load(fresh, "auto")
    assert loaded is not None
    assert (loaded.step, loaded.state["consumed_groups"], fresh.policy_version, fresh.num_updates) == (1, 3, 1, 1)
    metrics = fresh.step(batch_of([random_group(1)]))
    assert torch.equal(torch.rand(3), expected_random)
    assert metrics["actor/pg_loss"] == expected["actor/pg_loss"]
    assert metrics["actor/grad_norm"] == expected["actor/grad_norm"]
    assert_same_weights(weights_of(fresh), weights_of(learner), atol=0)


def test_its_root_is_a_directory_that_plain_transformers_loads(learner: Learner, tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(learner, step=1, state={})
    learner.export(tmp_path / "plain")
    np.testing.assert_array_equal(plain_logprobs(path, [9, 10, 11, 12]), plain_logprobs(tmp_path / "plain", [9, 10, 11, 12]))
    assert (tmp_path / "latest" / "chat_template.jinja").is_file()


def test_records_accumulate_over_checkpoints(learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    first = [Consumed(id="a", step=1, outcome="trained", digest="d1"), Consumed(id="b", step=1, outcome="stale")]
    checkpoints.save(learner, step=1, state={}, consumed=first)
    checkpoints.save(learner, step=2, state={}, consumed=[Consumed(id="c", step=2, outcome="trained", digest="d2")])
    path = checkpoints.save(learner, step=3, state={})
    assert read_jsonl(path / "trained_ids.jsonl") == [
        {"step": 1, "id": "a", "digest": "d1"},
        {"step": 2, "id": "c", "digest": "d2"},
    ]
    assert [(e["id"], e["outcome"]) for e in read_jsonl(path / "ledger.jsonl")] == [
        ("a", "trained"),
        ("b", "stale"),
        ("c", "trained"),
    ]
    loaded = checkpoints.load(learner, "auto")
    assert loaded is not None
    assert loaded.outcomes == {"a": "trained", "b": "stale", "c": "trained"}


def test_only_the_last_k_stay_and_latest_names_the_newest(learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(learner, step=step, state={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_2", "step_3"]
    assert os.readlink(tmp_path / "latest") == "step_3"


def test_one_that_is_cleared_away_is_gone_under_its_name_before_its_files_are(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an audit that reads it meanwhile takes what is left for all that was trained."""
    removed, remove = list[tuple[str, list[str]]](), shutil.rmtree

    def watched(path: Path, **options: bool) -> None:
        if path.exists():
            removed.append((path.name, sorted(p.name for p in tmp_path.glob("step_*"))))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(learner, step=step, state={})
    ((name, left),) = removed
    assert (name.startswith("."), left) == (True, ["step_2", "step_3"])


def test_torn_and_partial_directories_are_ignored_and_named(
    model_dir: Path, team: Team, learner: Learner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(learner, step=1, state={})
    newest = checkpoints.save(learner, step=2, state={})
    (tmp_path / ".step_3.tmp").mkdir()
    with (newest / "model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    loaded = Checkpoints(tmp_path).load(make_learner(model_dir, team), "auto")
    assert loaded is not None
    assert loaded.path.name == "step_1"
    assert "damaged checkpoint ignored" in caplog.text
    assert "model.safetensors has 100 bytes" in caplog.text
    assert ".step_3.tmp" in caplog.text
    checkpoints.save(learner, step=4, state={})
    assert not (tmp_path / ".step_3.tmp").exists()


def test_a_directory_that_latest_never_named_does_not_win(model_dir: Path, team: Team, learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(learner, step=1, state={})
    checkpoints.save(learner, step=2, state={})
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step_1")
    loaded = Checkpoints(tmp_path).load(make_learner(model_dir, team), "auto")
    assert loaded is not None
    assert loaded.step == 1


def test_resuming_from_an_older_one_replaces_what_followed_it(
    model_dir: Path, team: Team, learner: Learner, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.save(learner, step=1, state={}, consumed=[Consumed(id="a", step=1, outcome="trained")])
    checkpoints.save(learner, step=2, state={}, consumed=[Consumed(id="lost", step=2, outcome="trained")])
    again = Checkpoints(tmp_path)
    again.load(make_learner(model_dir, team), first)
    assert os.readlink(tmp_path / "latest") == "step_1"
    path = again.save(learner, step=2, state={}, consumed=[Consumed(id="b", step=2, outcome="trained")])
    assert [e["id"] for e in read_jsonl(path / "trained_ids.jsonl")] == ["a", "b"]


def test_what_cannot_be_loaded_is_said(model_dir: Path, team: Team, learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    fresh = make_learner(model_dir, team)
    assert checkpoints.load(fresh, "auto") is None
    path = checkpoints.save(learner, step=1, state={})
    assert checkpoints.load(fresh, "disable") is None
    assert fresh.policy_version == 0
    with pytest.raises(CheckpointError, match="there is no such directory"):
        checkpoints.load(fresh, tmp_path / "nowhere")
    wider = make_learner(tiny_dir(tmp_path, hidden_size=64), team)
    with pytest.raises(CheckpointError, match=r"is of another model: hf\.model.* is \[320, 32\] there and \[320, 64\] here"):
        checkpoints.load(wider, path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"schema": 99}))
    with pytest.raises(CheckpointError, match="schema 99, this version reads 1"):
        checkpoints.load(fresh, path)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoints.load(fresh, "auto")
    shutil.rmtree(path / "dcp")
    assert damage(path) is not None


def test_this_runs_optimizer_settings_win_over_the_checkpoints(
    model_dir: Path, team: Team, learner: Learner, tmp_path: Path
) -> None:
    Checkpoints(tmp_path).save(learner, step=1, state={})
    fresh = make_learner(model_dir, team, optimizer={"weight_decay": 0.5})
    Checkpoints(tmp_path).load(fresh, "auto")
    assert [g["weight_decay"] for g in fresh.optimizer.param_groups] == [0.5, 0.0]


def test_a_published_snapshot_is_what_its_record_says(learner: Learner, tmp_path: Path) -> None:
    record = WeightPublisher(tmp_path).publish(learner, run_epoch=2)
    path = Path(record.path)
    assert (record.run_epoch, record.version, record.label, path.name) == (2, 1, "e2-v1", "e2-v00000001")
    assert record.digest == f"sha256:{hashlib.sha256((path / 'model.safetensors').read_bytes()).hexdigest()}"
    learner.export(tmp_path / "again")
    assert weights_digest(tmp_path / "again") == record.digest


def test_publishing_twice_changes_nothing_and_old_snapshots_go(learner: Learner, tmp_path: Path) -> None:
    publisher = WeightPublisher(tmp_path, keep=2)
    first = publisher.publish(learner, run_epoch=1)
    inode = (Path(first.path) / "model.safetensors").stat().st_ino
    assert publisher.publish(learner, run_epoch=1) == first
    assert (Path(first.path) / "model.safetensors").stat().st_ino == inode
    publisher.publish(learner, run_epoch=2)
    publisher.publish(learner, run_epoch=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e2-v00000001", "e3-v00000001"]


def nudge(learner: Learner, *, every: int) -> None:
    """A step that changes one element in ``every``."""
    learner.policy_version += 1
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.view(-1)[::every] += 0.5


def test_deltas_are_published_where_they_pay_and_give_the_full_weights(learner: Learner, tmp_path: Path) -> None:
    publisher = WeightPublisher(tmp_path / "weights", full_every=4, scratch=tmp_path / "scratch")
    store = SnapshotStore(tmp_path / "cache")
    kinds: list[str] = []
    for every in (1, 50, 50, 50, 50, 1, 50):
        nudge(learner, every=every)
        record = publisher.publish(learner, run_epoch=1)
        kinds.append(record.kind)
        assert publisher.full_snapshot is not None
        learner.export(tmp_path / "wanted")
        wanted = (tmp_path / "wanted" / "model.safetensors").read_bytes()
        assert (publisher.full_snapshot / "model.safetensors").read_bytes() == wanted
        assert (Path(store.full(record).path) / "model.safetensors").read_bytes() == wanted
        assert publisher.publish(learner, run_epoch=1) == record, "publishing twice changes nothing"
    # The first is full, then every fourth; a step that changes everything is one too.
    assert kinds == ["full", "delta", "delta", "delta", "full", "full", "delta"]
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    assert WeightPublisher(tmp_path / "weights", full_every=4).publish(learner, run_epoch=2).kind == "full"


def test_what_a_kept_delta_builds_on_is_kept(learner: Learner, tmp_path: Path) -> None:
    publisher = WeightPublisher(tmp_path, keep=2, full_every=5)
    names: list[list[str]] = []
    for _ in range(7):
        nudge(learner, every=50)
        publisher.publish(learner, run_epoch=1)
        names.append(sorted(p.name[-1] for p in tmp_path.glob("e*")))
    first = int(names[0][0])
    assert names[4] == [str(first + i) for i in range(5)], "four deltas and their full start"
    assert names[6] == [str(first + 5), str(first + 6)], "the old chain went with its last kept delta"


def test_a_checkpoint_links_the_weights_that_were_published(learner: Learner, tmp_path: Path) -> None:
    record = WeightPublisher(tmp_path / "weights").publish(learner, run_epoch=1)
    path = Checkpoints(tmp_path / "checkpoints").save(learner, step=1, state={}, weights_from=record.path)
    assert (path / "model.safetensors").samefile(Path(record.path) / "model.safetensors")
    assert damage(path) is None
