"""`agentrl eval` with servers that it only attaches to: it says what they serve, not what it was going to serve."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from agentrl.assembly.evaluate import evaluate_from_config
from agentrl.config import Config, parse_config
from agentrl.errors import ConfigError
from agentrl.testing.fake_sglang import VOCAB_SIZE, FakeSGLang
from agentrl.testing.tiny_model import make_tiny_tokenizer

SCORE = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 0.0
"""


def config_of(tmp_path: Path, **serve: Any) -> Config:
    make_tiny_tokenizer(vocab_size=VOCAB_SIZE).save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": VOCAB_SIZE}))
    (tmp_path / "score.py").write_text(SCORE)
    row = {"data_source": "d", "prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "1"}}
    (tmp_path / "val.jsonl").write_text(json.dumps(row) + "\n")
    return parse_config(
        {
            "run": {"name": "r", "dir": str(tmp_path / "runs")},
            "model": {"path": str(tmp_path / "model")},
            "data": {"val": str(tmp_path / "val.jsonl")},
            "reward": {"fn": f"{tmp_path / 'score.py'}:compute_score"},
            "serve": {"agent": "single_turn", "tokens": 16, "tokens_per_turn": 16, **serve},
        },
        place="test",
    )


@pytest.mark.asyncio
async def test_the_result_of_attached_servers_names_their_policy_and_no_checkpoint(tmp_path: Path) -> None:
    async with FakeSGLang(label="e1-v7") as server:
        config = config_of(tmp_path, urls=[server.url])
        checkpoint = tmp_path / "runs/r/checkpoints/step_4"
        checkpoint.mkdir(parents=True)
        path, result = await asyncio.to_thread(evaluate_from_config, config, model=None, name=None)
    assert path.name == "servers-greedy.json"
    written = json.loads(path.read_text())
    assert written["policy_versions"] == result["policy_versions"] == [7]
    assert written["model"] == str(tmp_path / "model")


def test_a_model_cannot_be_named_for_servers_that_serve_their_own(tmp_path: Path) -> None:
    for serve in ({"urls": ["http://127.0.0.1:9"]}, {"router_url": "http://127.0.0.1:9"}):
        with pytest.raises(ConfigError, match=r"serve what they serve.*serve\.urls=\[\] serve\.router_url=null"):
            evaluate_from_config(config_of(tmp_path, **serve), model="checkpoint", name=None)
