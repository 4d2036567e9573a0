"""Supervised fine-tuning: the loss lies on exactly what a policy would sample, and a tiny model learns from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_rig import plain_logprobs, tiny_dir

from agentrl.errors import DataError
from agentrl.learner.distributed import Team
from agentrl.learner.sft import render_example, run_sft
from agentrl.types import Message

CALCULATOR = {
    "type": "function",
    "function": {"name": "calculator", "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}}},
}


@dataclass
class Talk:
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = field(default_factory=list)


def sum_dialogue(a: int, b: int) -> Talk:
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": f"{a}+{b}"}}}
    return Talk(
        [
            {"role": "user", "content": f"{a} and {b}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": str(a + b)},
            {"role": "assistant", "content": f"#### {a + b}"},
            {"role": "user", "content": "never reached"},
        ],
        [CALCULATOR],
    )


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def spans(tokenizer: Any, ids: np.ndarray, mask: np.ndarray) -> list[tuple[bool, str]]:
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(mask)]
    return [(bool(mask[a]), tokenizer.decode(ids[a:b])) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def test_the_loss_covers_what_the_policy_samples_and_nothing_else(tokenizer: Any) -> None:
    example = render_example(tokenizer, sum_dialogue(7, 8))
    prompt, call, observation, answer = spans(tokenizer, example.ids, example.mask)
    assert [s[0] for s in (prompt, call, observation, answer)] == [False, True, False, True]
    assert prompt[1].endswith("<|im_start|>user\n7 and 8?<|im_end|>\n<|im_start|>assistant\n")
    assert call[1] == '<tool_call>\n{"name": "calculator", "arguments": {"expression": "7+8"}}\n</tool_call><|im_end|>'
    assert observation[1] == "\n<|im_start|>user\n<tool_response>\n15\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert answer[1] == "#### 15<|im_end|>"


def test_the_ids_are_those_that_a_rollout_would_build(tokenizer: Any) -> None:
    # Prompt by the template, sampled text by itself, then the observation: pieces are never merged across the line.
    example = render_example(tokenizer, sum_dialogue(7, 8))
    dialogue = sum_dialogue(7, 8)
    prompt = tokenizer.apply_chat_template(
        dialogue.messages[:1], tools=dialogue.tools, add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert example.ids[: len(prompt_ids)].tolist() == prompt_ids
    assert not example.mask[: len(prompt_ids)].any()
    assert example.mask[len(prompt_ids)]
    assert example.ids[-1] == tokenizer.eos_token_id


def test_a_template_that_rewrites_the_past_is_refused_with_the_place(tokenizer: Any) -> None:
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}{% if loop.last %}!{% endif %}:{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}assistant!:{% endif %}"
        )
        talk = Talk([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}])
        with pytest.raises(DataError, match="not prefix-preserving at message 1"):
            render_example(tokenizer, talk)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(DataError, match=r"ends message 1 without any of \['<\|im_end\|>'\]"):
            render_example(tokenizer, talk)
    finally:
        tokenizer.chat_template = template


def test_a_conversation_without_an_assistant_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no assistant message"):
        render_example(tokenizer, Talk([{"role": "user", "content": "hi"}]))


def test_a_tiny_model_learns_the_dialogues_and_is_saved_whole(team: Team, tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_dir(tmp_path, hidden_size=64)
    talks = [Talk(sum_dialogue(a, b).messages) for a in range(3) for b in range(3)]
    seen: list[dict[str, float]] = []
    last = run_sft(
        model, talks, out_dir=tmp_path / "out", steps=40, batch_size=9, lr=1e-2, warmup_steps=4, team=team, on_step=seen.append
    )
    assert [m["step"] for m in seen] == list(range(1, 41))
    assert seen[0]["sft/loss"] > 4
    assert last["sft/loss"] < 0.2
    assert last["actor/lr"] == pytest.approx(1e-2 / 10.8, rel=0.01)
    example = render_example(tokenizer, talks[4])
    logprobs = plain_logprobs(tmp_path / "out", example.ids.tolist())
    assert logprobs[example.mask].mean() > -0.2
    assert logprobs[~example.mask][1:].mean() < -1.0  # what was masked was not learned
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny"]


def test_the_cut_into_micro_batches_does_not_change_what_is_learned(team: Team, model_dir: Path, tmp_path: Path) -> None:
    talks = [sum_dialogue(a, a + 1) for a in range(6)]
    losses = []
    for budget in (4096, 400):
        seen: list[dict[str, float]] = []
        run_sft(
            model_dir, talks, out_dir=tmp_path / str(budget), steps=3, batch_size=6, warmup_steps=0, micro_batch_tokens=budget,
            team=team, on_step=seen.append,
        )  # fmt: skip
        losses.append([m["sft/loss"] for m in seen])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_dialogue_longer_than_the_budget_is_named(team: Team, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="conversation 0 of the batch has"):
        run_sft(model_dir, [sum_dialogue(1, 2)], out_dir=tmp_path / "x", steps=1, batch_size=1, micro_batch_tokens=20, team=team)
