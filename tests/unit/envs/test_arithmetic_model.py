"""The scratch model's tokenizer, template and shape, on real transformers."""

import hashlib
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from envs.arithmetic import generate_sft_conversations
from envs.arithmetic_model import CONTROL_TOKENS, TOOL_TAGS, make_scratch_model, render
from envs.gsm8k import CALCULATOR_SCHEMA as FULL_SCHEMA

transformers: Any = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scratch")
    make_scratch_model(path, seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(model_dir)


def ids_of(tokenizer: Any, messages: list[Any], tools: list[Any], *, generate: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=generate, return_dict=False)


RECIPE = """\
<|im_start|>system
Use the calculator and end with #### answer.
<tools>
{"name": "calculator", "parameters": {"expression": "string"}}
</tools><|im_end|>
<|im_start|>user
How many?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "calculator", "arguments": {"expression": "2*(8+9)"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
34
</tool_response><|im_end|>
<|im_start|>assistant
#### 34<|im_end|>
"""


def dialogue() -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2*(8+9)"}}}
    return [
        {"role": "system", "content": "Use the calculator and end with #### answer."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": "34"},
        {"role": "assistant", "content": "#### 34"},
    ]


def test_the_dialogue_is_the_recipes_byte_for_byte(tokenizer: Any) -> None:
    for schema in (generate_sft_conversations(1, 0)[0]["tools"][0], FULL_SCHEMA):
        assert render(dialogue(), [schema]) == RECIPE
        assert tokenizer.apply_chat_template(dialogue(), tools=[schema], tokenize=False) == RECIPE


def test_wire_arguments_several_calls_and_results_and_no_tools_render_too() -> None:
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "Two.", "tool_calls": [call, call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    block = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    answer = "<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n"
    user = "<|im_start|>user\nGo.<|im_end|>\n"
    expected = f"{user}<|im_start|>assistant\nTwo.\n{block}\n{block}<|im_end|>\n" + answer.format(1) + answer.format(2)
    assert render(messages, [], add_generation_prompt=True) == expected + "<|im_start|>assistant\n"


def test_schemas_of_any_kind_are_listed_in_one_line_each() -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"type": ["string", "null"]}, "b": {"enum": [1]}, "c": {"type": "integer"}},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}, {"name": "g"}]
    assert render([{"role": "user", "content": "x"}], tools) == (
        '<|im_start|>system\n<tools>\n{"name": "f", "parameters": {"a": "string|null", "b": "any", "c": "integer"}}\n'
        '{"name": "g", "parameters": {}}\n</tools><|im_end|>\n<|im_start|>user\nx<|im_end|>\n'
    )


def test_every_prefix_of_the_messages_is_a_prefix_of_the_ids(tokenizer: Any) -> None:
    for conversation in [
        *generate_sft_conversations(20, 1, clean=0),
        {"messages": [*dialogue(), *dialogue()[1:]], "tools": [FULL_SCHEMA]},
    ]:
        messages, tools = conversation["messages"], conversation["tools"]
        whole = ids_of(tokenizer, messages, tools)
        for k in range(1, len(messages) + 1):
            prefix = ids_of(tokenizer, messages[:k], tools)
            assert whole[: len(prefix)] == prefix
            if k < len(messages) and messages[k]["role"] == "assistant":
                prompt = ids_of(tokenizer, messages[:k], tools, generate=True)
                assert whole[: len(prompt)] == prompt


def test_what_is_appended_as_text_has_the_ids_of_the_whole(tokenizer: Any) -> None:
    tools = [FULL_SCHEMA]
    prompt = ids_of(tokenizer, dialogue()[:2], tools, generate=True)
    sampled = tokenizer.encode(
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2*(8+9)"}}\n</tool_call><|im_end|>'
    )
    observed = tokenizer.encode("\n<|im_start|>user\n<tool_response>\n34\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert prompt + sampled + observed == ids_of(tokenizer, dialogue()[:4], tools, generate=True)


def test_the_assistant_mask_covers_what_the_policy_samples(tokenizer: Any) -> None:
    out = tokenizer.apply_chat_template(dialogue(), tools=[FULL_SCHEMA], return_dict=True, return_assistant_tokens_mask=True)
    sampled = [token for token, own in zip(out["input_ids"], out["assistant_masks"], strict=True) if own]
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2*(8+9)"}}\n</tool_call><|im_end|>'
    assert tokenizer.decode(sampled) == f"{call}#### 34<|im_end|>"


def test_the_parts_of_a_dialogue_are_as_long_as_the_recipe_measured(tokenizer: Any) -> None:
    lengths: list[tuple[int, int, int, int]] = []
    for conversation in generate_sft_conversations(400, 1):
        messages, tools = conversation["messages"], conversation["tools"]
        prompt = len(ids_of(tokenizer, messages[:2], tools, generate=True))
        called = len(ids_of(tokenizer, messages[:3], tools)) - 1  # the line break after the turn is not sampled
        observed = len(ids_of(tokenizer, messages[:4], tools, generate=True))
        whole = len(ids_of(tokenizer, messages, tools)) - 1
        lengths.append((prompt, called - prompt, observed - called, whole - observed))
    prompt, call, observation, answer = (list(column) for column in zip(*lengths, strict=True))
    assert mean(prompt) == pytest.approx(64, abs=1)
    assert mean(call) == pytest.approx(22, abs=0.5)
    assert set(observation) == {14}
    assert set(answer) == {4}
    assert max(map(sum, lengths)) <= 112


def test_numbers_to_two_hundred_are_one_token_wherever_they_stand(tokenizer: Any) -> None:
    for number in range(201):
        (token,) = tokenizer.encode(str(number))
        for text in (f" {number} apples", f'"{number}*', f"({number})", f"#### {number}<|im_end|>"):
            assert tokenizer.encode(text).count(token) == 1
    assert len(tokenizer.encode("201")) == 2


def test_special_tokens_are_one_id_and_tool_tags_survive_decoding(tokenizer: Any) -> None:
    for text in (*CONTROL_TOKENS, *TOOL_TAGS):
        assert len(tokenizer.encode(text)) == 1
    ids = tokenizer.encode("<tool_call>\n34\n</tool_call><|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>\n34\n</tool_call>"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_every_loader_gives_the_same_ids_and_any_text_comes_back(tokenizer: Any, model_dir: Path) -> None:
    plain = transformers.PreTrainedTokenizerFast.from_pretrained(model_dir)
    texts = [render(one["messages"], one["tools"]) for one in generate_sft_conversations(100, 5, clean=0)]
    for text in [*texts, "Unseen: naïve 世界 4711 {}\n\n\t x'll <tool_call"]:
        assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_model_has_the_recipes_shape(model_dir: Path, tokenizer: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (128, 2, 384)
    assert (config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings) == (4, 2, True)
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert 480_000 < model.num_parameters() < 510_000
    assert float(model.get_input_embeddings().weight.detach().std()) == pytest.approx(0.08, rel=0.05)
    assert str(model.dtype) == "torch.float32"


def test_the_seed_decides_the_weights_and_the_callers_generator_is_left_alone(model_dir: Path, tmp_path: Path) -> None:
    import torch

    def digest(path: Path, name: str) -> str:
        return hashlib.sha256((path / name).read_bytes()).hexdigest()

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    make_scratch_model(tmp_path / "same", seed=0)
    assert torch.equal(torch.rand(1), expected)
    make_scratch_model(tmp_path / "other", seed=1)
    assert digest(tmp_path / "same", "model.safetensors") == digest(model_dir, "model.safetensors")
    assert digest(tmp_path / "same", "tokenizer.json") == digest(model_dir, "tokenizer.json")
    assert digest(tmp_path / "other", "model.safetensors") != digest(model_dir, "model.safetensors")
