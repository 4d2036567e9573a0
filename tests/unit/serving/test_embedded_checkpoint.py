"""A checkpoint that does not fit is refused before a weight is touched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agentrl.errors import WeightSyncError
from agentrl.serving.embedded.checkpoint import CheckpointReader, copy_into
from agentrl.serving.embedded_engine import eos_token_ids, load_model
from agentrl.testing.tiny_model import make_tiny_model
from agentrl.weights.digest import weights_digest

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("source") / "a")


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return load_model(source, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def reader(model: Any, source: Path) -> CheckpointReader:
    return CheckpointReader(model, source)


@pytest.fixture
def other(source: Path, tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "other", seed=5)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_staged_checkpoint_becomes_the_models_weights(reader: CheckpointReader, other: Path, source: Path) -> None:
    model = load_model(source, device="cpu", dtype="float32")
    staged = CheckpointReader(model, source).stage(other, expected_digest=weights_digest(other))
    copy_into(model, staged)
    wanted = load_model(other, device="cpu", dtype="float32").state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert staged.digest == weights_digest(other)


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, **config}))
    return folder


def test_an_adapter_is_merged_into_the_starting_weights(source: Path, tmp_path: Path) -> None:
    model = load_model(source, device="cpu", dtype="float32")
    name = "model.layers.0.self_attn.q_proj"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    width = before[f"{name}.weight"].shape[1]
    down, up = torch.randn(2, width), torch.randn(before[f"{name}.weight"].shape[0], 2)
    parts = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    reader = CheckpointReader(model, source)
    for _ in range(2):
        copy_into(model, reader.stage(write_adapter(tmp_path / f"a{_}", parts)))
    wanted = before | {f"{name}.weight": before[f"{name}.weight"] + 4.0 * (up @ down)}
    torch.testing.assert_close(dict(model.state_dict()), wanted)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"use_rslora": True}, "sets use_rslora"),
        ({"r": 0}, "r=0"),
        ({"stray": True}, "1 of 3 adapter tensors fit no weight"),
        ({"narrow": True}, "has shapes"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    reader: CheckpointReader, model: Any, tmp_path: Path, change: dict[str, Any], hint: str
) -> None:
    name = "model.layers.0.self_attn.q_proj"
    rows, width = model.state_dict()[f"{name}.weight"].shape
    parts = {
        f"base_model.model.{name}.lora_A.weight": torch.ones(2, width - bool(change.pop("narrow", False))),
        f"base_model.model.{name}.lora_B.weight": torch.ones(rows, 2),
    }
    if change.pop("stray", False):
        parts["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(2, width)
    with pytest.raises(WeightSyncError, match=hint):
        reader.stage(write_adapter(tmp_path / "adapter", parts, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing model\.norm\.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "unknown extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), r"shape \[65\], the model needs \[64\]"),
        (lambda t: t["model.norm.weight"].fill_(float("inf")), r"NaN or infinity in model\.norm\.weight"),
        (lambda t: t.update({HEAD: t[EMBEDDINGS] + 1}), "ties them"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_by_the_tensors_name(
    reader: CheckpointReader, other: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    with pytest.raises(WeightSyncError, match=message):
        reader.stage(rewrite(other, change))


def test_tied_head_may_be_stored_twice_or_under_either_name(reader: CheckpointReader, other: Path, source: Path) -> None:
    twice = reader.stage(rewrite(other, lambda t: t.update({HEAD: t[EMBEDDINGS].clone()})))
    assert set(twice.tensors) == set(load_file(source / "model.safetensors"))


def test_shards_are_read_together_and_a_repeated_tensor_is_refused(reader: CheckpointReader, other: Path) -> None:
    tensors = load_file(other / "model.safetensors")
    names = sorted(tensors)
    (other / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in names[:5]}, other / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[5:]}, other / "model-00002-of-00002.safetensors")
    staged = reader.stage(other)
    assert all(torch.equal(staged.tensors[name], tensors[name]) for name in names)
    save_file({names[0]: tensors[names[0]]}, other / "stale.safetensors")
    with pytest.raises(WeightSyncError, match="repeats tensor"):
        reader.stage(other)


def test_truncated_empty_and_missing_directories_are_refused(reader: CheckpointReader, other: Path, tmp_path: Path) -> None:
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightSyncError, match="not a complete safetensors file"):
        reader.stage(other)
    file.unlink()
    with pytest.raises(WeightSyncError, match=r"no \*\.safetensors file"):
        reader.stage(other)
    with pytest.raises(WeightSyncError, match="is not a directory"):
        reader.stage(tmp_path / "nowhere")


def test_other_architecture_behind_equal_shapes_is_refused(reader: CheckpointReader, other: Path) -> None:
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8, "num_key_value_heads": 4}))
    with pytest.raises(WeightSyncError, match="num_attention_heads=8, the serving model has 4"):
        reader.stage(other)


def test_other_weights_than_announced_are_refused(reader: CheckpointReader, other: Path, source: Path) -> None:
    with pytest.raises(WeightSyncError, match="it holds other weights"):
        reader.stage(other, expected_digest=weights_digest(source))


def test_untied_model_needs_its_head(tmp_path: Path) -> None:
    untied = make_tiny_model(tmp_path / "untied", tie_word_embeddings=False)
    reader = CheckpointReader(load_model(untied, device="cpu", dtype="float32"), untied)
    assert HEAD in reader.stage(untied).tensors
    with pytest.raises(WeightSyncError, match=r"missing lm_head\.weight"):
        reader.stage(rewrite(untied, lambda t: t.pop(HEAD)))


def test_every_end_token_of_both_configs_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert eos_token_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7, 9]}')
    assert eos_token_ids(tmp_path) == (2, 7, 9)
