"""The policy: packed equals separate, shards gather, and the directory it writes is one that plain transformers loads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_rig import VOCAB, plain_logprobs

from agentrl.errors import ConfigError
from agentrl.learner.distributed import Team
from agentrl.learner.model import check_packing, full_state, load_policy, run_row, write_hf_directory
from agentrl.learner.packing import pack_row


def packed_logprobs(policy: Any, sequences: list[list[int]]) -> list[np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
    row = pack_row(offsets, list(range(len(sequences))))
    wanted = torch.from_numpy(np.flatnonzero(row.position_ids > 0))
    with torch.no_grad():
        found = run_row(policy, torch.tensor([t for s in sequences for t in s]), row, wanted)[0].numpy()
    return np.split(found, np.cumsum([len(s) - 1 for s in sequences])[:-1])


@pytest.fixture
def sequences() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).tolist() for n in (5, 40, 2, 17)]


@pytest.mark.parametrize("attention", ["agentrl_packed", "sdpa"])
def test_packed_logprobs_equal_those_of_separate_forwards(
    model_dir: Path, team: Team, sequences: list[list[int]], attention: str
) -> None:
    policy = load_policy(model_dir, team)
    policy.hf.set_attn_implementation(attention)
    for found, sequence in zip(packed_logprobs(policy, sequences), sequences, strict=True):
        np.testing.assert_allclose(found, plain_logprobs(model_dir, sequence)[1:], atol=1e-5)


def test_the_order_within_a_row_does_not_matter(model_dir: Path, team: Team, sequences: list[list[int]]) -> None:
    policy = load_policy(model_dir, team)
    forward, backward = packed_logprobs(policy, sequences), packed_logprobs(policy, sequences[::-1])[::-1]
    for a, b in zip(forward, backward, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bf16_computes_near_fp32_and_keeps_fp32_master_weights(model_dir: Path, team: Team, sequences: list[list[int]]) -> None:
    policy = load_policy(model_dir, team, dtype="bf16")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    for found, sequence in zip(packed_logprobs(policy, sequences), sequences, strict=True):
        np.testing.assert_allclose(found, plain_logprobs(model_dir, sequence)[1:], atol=0.2)


def test_an_architecture_that_looks_across_sequences_is_refused(model_dir: Path, team: Team) -> None:
    policy = load_policy(model_dir, team)
    layer = policy.hf.base_model.layers[0]
    layer.register_forward_hook(lambda _m, _i, out: out + out.mean(dim=1, keepdim=True))
    with pytest.raises(ConfigError, match="look across sequence boundaries"):
        check_packing(policy, team)


def test_a_model_that_transforms_logits_is_refused(model_dir: Path, team: Team, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text()) | {"final_logit_softcapping": 30.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"final_logit_softcapping=30\.0"):
        load_policy(tmp_path, team)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_written_directory_loads_in_plain_transformers_with_the_same_outputs(
    model_dir: Path, team: Team, tmp_path: Path, dtype: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = load_policy(model_dir, team)
    state = full_state(policy)
    assert "lm_head.weight" not in state  # tied
    write_hf_directory(tmp_path / "out", state, policy, source=model_dir, dtype=dtype)
    ids = list(range(8, 20))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    np.testing.assert_allclose(
        plain_logprobs(tmp_path / "out", ids), plain_logprobs(model_dir, ids), atol=1e-6 if dtype == "fp32" else 0.1
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (model_dir / name).read_bytes()
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith("<|im_start|>user")


def test_large_weights_are_split_with_an_index(
    model_dir: Path, team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentrl.learner.model.MAX_SHARD_BYTES", 40_000)
    policy = load_policy(model_dir, team)
    write_hf_directory(tmp_path, full_state(policy), policy, source=model_dir, dtype="fp32")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    np.testing.assert_allclose(plain_logprobs(tmp_path, [9, 10, 11]), plain_logprobs(model_dir, [9, 10, 11]), atol=1e-6)
