"""The quickstart's tasks and demonstrations keep to the measured recipe."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentrl.data.check import check_rows
from agentrl.data.conversations import read_conversations
from agentrl.data.rows import read_rows
from agentrl.errors import ConfigError
from agentrl.types import Episode, Task
from envs.arithmetic import (
    CONTAINERS,
    KINDS,
    NAMES,
    OBJECTS,
    SYSTEM_PROMPT,
    Arithmetic,
    compute_score,
    generate_sft_conversations,
    generate_tasks,
    prepare,
    problems,
    split_of,
    value_of,
)
from tools.calculator import evaluate

HARD = {"sub", "mul", "div", "muladd", "summul"}


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def test_the_words_are_as_many_as_the_recipe_says() -> None:
    assert (len(KINDS), len(NAMES), len(OBJECTS), len(CONTAINERS)) == (8, 16, 10, 4)
    assert {kind.name for kind in KINDS if kind.hard} == HARD


def test_every_expression_of_the_generator_has_the_calculators_value() -> None:
    stream = problems(1, "train")
    for _ in range(2_000):
        problem = next(stream)
        for expression in (problem.expression, *problem.misconceptions):
            assert value_of(expression) == evaluate(expression)


def test_operands_answers_and_kinds_stay_within_the_recipe() -> None:
    kinds: Counter[str] = Counter()
    for task in generate_tasks(4_000, 0):
        kind, expression = task.extra_info["kind"], task.extra_info["expression"]
        kinds[kind] += 1
        a, b, *rest = numbers(expression)
        c = rest[0] if rest else 0
        assert task.ground_truth == str(evaluate(expression))
        assert 1 <= int(task.ground_truth) <= 120
        assert sorted(numbers(task.prompt[1]["content"])) == sorted(numbers(expression))
        match kind:
            case "add":
                assert 2 <= a <= 30
                assert 2 <= b <= 30
            case "sub" | "subadd":
                assert 5 <= a <= 30
                assert 0 < b < a
                assert c == 0 if kind == "sub" else 2 <= c <= 30
            case "div":
                assert a % b == 0
                assert 2 <= a // b <= 10
                assert 2 <= b <= 9
            case "mulsub":
                assert 2 <= c <= min(a * b - 1, 20)
            case "muladd":
                assert 2 <= c <= 20
            case "summul":
                assert 2 <= a <= 6
                assert 2 <= min(b, c) <= max(b, c) <= 10
            case _:
                assert 2 <= min(a, b) <= max(a, b) <= 10
    assert set(kinds) == {kind.name for kind in KINDS}
    assert max(kinds.values()) - min(kinds.values()) < 200


def test_train_and_validation_share_no_question_whatever_the_seed() -> None:
    train = {task.prompt[1]["content"] for seed in range(3) for task in generate_tasks(1_000, seed, "train")}
    val = {task.prompt[1]["content"] for seed in range(3) for task in generate_tasks(400, seed, "val")}
    taught = {one["messages"][1]["content"] for one in generate_sft_conversations(2_000, 9)}
    assert not val & (train | taught)
    assert {split_of(question) for question in val} == {"val"}


def test_tasks_are_distinct_reproducible_and_a_prefix_of_more_tasks() -> None:
    tasks = generate_tasks(300, 4)
    assert tasks == generate_tasks(600, 4)[:300]
    assert len({task.prompt[1]["content"] for task in tasks}) == 300
    assert [task.id for task in tasks[:2]] == ["arithmetic/train/0", "arithmetic/train/1"]
    assert tasks != generate_tasks(300, 5)
    assert tasks[0].prompt[0] == {"role": "system", "content": SYSTEM_PROMPT}
    with pytest.raises(ConfigError, match="split='test'"):
        generate_tasks(1, 0, "test")


def parts(conversation: dict[str, Any]) -> tuple[str | None, str | None, str]:
    """Expression and tool result (None where the tool was skipped), and the final answer."""
    messages = conversation["messages"]
    final = messages[-1]["content"].removeprefix("#### ")
    if len(messages) == 3:
        return None, None, final
    return messages[2]["tool_calls"][0]["function"]["arguments"]["expression"], messages[3]["content"], final


def test_the_first_hundred_steps_are_free_of_noise() -> None:
    by_question = {problem.question: problem for problem, _ in zip(problems(0, "train"), range(1_600), strict=False)}
    for conversation in generate_sft_conversations(1_600, 0):
        problem = by_question[conversation["messages"][1]["content"]]
        assert parts(conversation) == (problem.expression, str(problem.answer), str(problem.answer))


def test_the_noise_has_the_recipes_shares() -> None:
    n = 20_000
    noisy = generate_sft_conversations(n, 0, clean=0)
    counts: Counter[str] = Counter()
    for problem, conversation in zip(problems(0, "train"), noisy, strict=False):
        assert conversation["messages"][1]["content"] == problem.question
        expression, result, final = parts(conversation)
        if expression is None:
            counts["skipped"] += 1
            assert 2 <= int(final) <= 120
            continue
        group = "hard" if problem.hard else "easy"
        assert result == final
        counts[group] += 1
        counts[f"{group} wrong"] += expression != problem.expression
        counts["first"] += expression == problem.misconceptions[0]
        counts["wrong"] += expression in problem.misconceptions
        counts["other result"] += int(str(result)) != evaluate(expression)
    called = counts["hard"] + counts["easy"]
    assert counts["skipped"] / n == pytest.approx(0.20, abs=0.01)
    assert counts["hard wrong"] / counts["hard"] == pytest.approx(0.60, abs=0.015)
    assert counts["easy wrong"] / counts["easy"] == pytest.approx(0.20, abs=0.015)
    assert counts["other result"] / called == pytest.approx(0.35 * 119 / 120, abs=0.015)
    # 85 % and the first one's part of the other 15 %: all of it for mul, half for the rest.
    assert 0.92 < counts["first"] / counts["wrong"] < 0.96


def test_demonstrations_are_reproducible_and_in_order() -> None:
    assert generate_sft_conversations(50, 3) == generate_sft_conversations(100, 3)[:50]
    assert generate_sft_conversations(50, 3) != generate_sft_conversations(50, 4)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("#### 34", 1.0),
        ("#### 34<|im_end|>", 1.0),
        ("####34\n", 1.0),
        ("#### 034", 1.0),
        ('<tool_call>\n{"name": "calculator", "arguments": {"expression": "2*17"}}\n</tool_call>\n#### 34', 1.0),
        ("#### 33\n#### 34", 1.0),
        ("#### -34", 0.0),
        ("#### 34 apples", 0.0),
        ("#### 34\n#### 33", 0.0),
        ("34", 0.0),
        ("<tool_call>#### 34</tool_call>", 0.0),
        ("<tool_call>#### 34", 0.0),
        ("#### 34<tool_call>\n</tool_call>", 0.0),
        ("#### ٣٤", 0.0),
        ("#### " + "9" * 10_000, 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_scoring_is_exact(text: Any, score: float) -> None:
    assert compute_score("arithmetic", text, "34", {}) == score


@pytest.mark.asyncio
async def test_the_environment_scores_the_assistants_text() -> None:
    task = Task(id="t", prompt=[], data_source="arithmetic", ground_truth="34", extra_info={"kind": "mul"})
    seen = Episode(
        task=task, assistant_text="#### 34", final="#### 34", transcript="#### 35", calls=(), stop="answered", num_turns=1
    )
    score = await Arithmetic().score(seen)
    assert (score.correct, score.reward, score.info) == (1.0, 1.0, {"pred": "34", "kind": "mul"})


def test_prepared_files_hold_tasks_and_demonstrations_in_curriculum_order(tmp_path: Path) -> None:
    report = prepare(tmp_path, sft=True, limit=40, seed=2)
    assert {name: entry["rows"] for name, entry in report.items()} == {"train": 40, "val": 40, "sft": 40}
    back = read_rows(tmp_path / "train.parquet")
    for task, again in zip(generate_tasks(40, 2), back, strict=True):
        assert (task.id, list(task.prompt), task.ground_truth) == (again.id, list(again.prompt), again.ground_truth)
    written = [{"messages": one.messages, "tools": one.tools} for one in read_conversations(tmp_path / "sft.jsonl")]
    assert written == generate_sft_conversations(40, 2)
    assert check_rows(tmp_path)["ok"] is True
    with pytest.raises(ConfigError, match="arithmetic is generated"):
        prepare(tmp_path, source=tmp_path)
