"""The tiny model is deterministic, complete, and its template extends token by token."""

import json
from pathlib import Path
from typing import Any

import pytest

from agentrl.testing.tiny_model import EOS_TOKEN_ID, PAD_TOKEN_ID, make_tiny_model, make_tiny_tokenizer

TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2*(8+9)"}}}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def test_same_seed_gives_the_same_bytes_and_another_seed_other_weights(model_dir: Path, tmp_path: Path) -> None:
    again = make_tiny_model(tmp_path / "again")
    other = make_tiny_model(tmp_path / "other", seed=1)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (model_dir / name).read_bytes()
    assert (other / "model.safetensors").read_bytes() != (model_dir / "model.safetensors").read_bytes()
    assert (other / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()


def test_every_id_the_model_can_sample_decodes_and_text_survives_a_round_trip(tokenizer: Any, model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] == 1024
    assert all(tokenizer.convert_ids_to_tokens(i) for i in range(1024))
    text = 'naïve 12 + 7 = 19 → {"expression": "2*(8+9)"}\n\n  #### 34'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS_TOKEN_ID, PAD_TOKEN_ID)


def test_every_number_to_200_is_one_token_in_prose_and_in_json(tokenizer: Any) -> None:
    for number in range(201):
        (alone,) = tokenizer.encode(str(number))
        assert alone in tokenizer.encode(f"has {number} apples")
        assert alone in tokenizer.encode(f'"expression": "{number}*7"')


def test_template_lists_tools_renders_calls_and_wraps_tool_results_in_one_user_message(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2*(8+9)?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "34"},
        {"role": "tool", "content": "35"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    system, rest = text.split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\nBe brief.\n\n")
    assert json.dumps(TOOL) in system
    assert rest == (
        "<|im_start|>user\n2*(8+9)?<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "calculator", "arguments": {"expression": "2*(8+9)"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n34\n</tool_response>\n<tool_response>\n35\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_template_only_extends_ids_when_a_turn_is_appended(tokenizer: Any) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": "thinking", "tool_calls": [CALL]},
        {"role": "tool", "content": "34"},
        {"role": "assistant", "content": "#### 34"},
        {"role": "user", "content": "more"},
    ]
    render: Any = lambda: tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=True, return_dict=False)  # noqa: E731
    before = render()
    for turn in turns:
        messages.append(turn)
        after = render()
        assert after[: len(before)] == before
        before = after


def test_a_small_corpus_still_fills_the_vocabulary_and_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    assert len(make_tiny_tokenizer(vocab_size=300, corpus=["abc abc"])) == 300
    with pytest.raises(ValueError, match="at least 263"):
        make_tiny_tokenizer(vocab_size=100)
