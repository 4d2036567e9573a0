"""GSM8K: scoring that a person would agree with, and preparation from the data set's own marks.

The excerpt is from GSM8K (https://github.com/openai/grade-school-math), copyright (c) 2021 OpenAI, MIT licence.
"""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from agentrl.data.conversations import read_conversations
from agentrl.data.rows import read_rows
from agentrl.errors import ConfigError, DataError, ToolError
from agentrl.types import CallRecord, Episode, Task
from envs.gsm8k import CALCULATOR_SCHEMA, PROMPTS, Gsm8k, compute_score, prepare, score_details
from tools.calculator import evaluate, format_number

FULL_DATA = Path(__file__).parents[4] / "shared" / "gsm8k"

CLIPS = {
    "question": (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May?"
    ),
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
}
SITTING = {
    "question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much did she earn?",
    "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10",
}


def source(tmp_path: Path, *extra: dict[str, str]) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (CLIPS, *extra)))
    (folder / "test.jsonl").write_text(json.dumps(SITTING) + "\n")
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "#### 42",
        "#### 42.",
        "#### $42",
        "#### $ 42",
        "#### \\$42",
        "####42",
        "#### **42**",
        "**#### 42**",
        "#### 42.00",
        "#### 42 dollars",
        "#### 42%",
        "#### +42",
        "#### 84/2",
        "#### 84 / 2",
        "#### \\boxed{42}",
        "#### $\\boxed{42}$",
        "#### (42)",
        "####\n42",
        "#### 42 ####",
        "#### 42\n####",
        "#### 42 (6*7)",
        "#### 42, since 6*7 = 42",
        "#### 42\n\n7 more lines",
        "#### 42<|im_end|>",
        "#### 41\nNo wait.\n#### 42",
        "#### 42" + " and that is that." * 100,
        "<tool_call>{}</tool_call>\n#### 42",
    ],
)
def test_every_reasonable_spelling_of_the_answer_scores_strictly(text: str) -> None:
    assert score_details("openai/gsm8k", text, "42") == {"score": 1.0, "strict": 1, "lenient": 1, "pred": "42"}


@pytest.mark.parametrize(
    ("text", "pred"),
    [
        ("#### 43", "43"),
        ("#### -42", "-42"),
        ("#### −42", "-42"),
        ("#### 42.5", "42.5"),
        ("#### 420", "420"),
        ("#### 1/42", "1/42"),
        ("#### 42\n#### 43", "43"),
        ("#### 42/0", None),
        ("#### 42*2", None),
        ("#### 42 + 1", None),
        ("#### 42*(2)", None),
        ("#### 42-44", None),
        ("#### 42:30", None),
        ("#### 42.1.1", None),
        ("#### 42 000", None),
        ("#### 42,0", None),
        ("#### 42e3", None),
        ("#### 42 x 3", None),
        ("#### " + "42" * 100, None),
    ],
)
def test_another_number_or_an_unfinished_calculation_does_not_score(text: str, pred: str | None) -> None:
    details = score_details("openai/gsm8k", text, "42")
    assert (details["score"], details["strict"], details["pred"]) == (0.0, 0, pred)


@pytest.mark.parametrize(
    ("text", "lenient"),
    [
        ("The answer is 42.", 1),
        ("so it is \\boxed{42} and not 7", 1),
        ("Answer: $42 for 3 people", 1),
        ("6 * 7 = 42", 1),
        ("a loss, -42", 0),
        ("6 - 42", 1),
        ("42 then 7", 0),
        ("#### six\nthe answer is 42", 1),
        ("no number", 0),
        ("<tool_call>42</tool_call>", 0),
        ("<tool_response>\n42\n</tool_response>", 0),
        ("<tool_call>\n#### 42", 0),
    ],
)
def test_lenient_scoring_reads_what_a_person_would_and_strict_does_not(text: str, lenient: int) -> None:
    details = score_details("openai/gsm8k", text, "42", method="lenient")
    assert (details["strict"], details["lenient"], details["score"]) == (0, lenient, float(lenient))


def test_a_readable_marker_decides_the_lenient_verdict_too() -> None:
    assert score_details("", "#### 41\nthe answer is 42", "42", method="lenient")["lenient"] == 0


@pytest.mark.parametrize("truth", ["1,042", "1042", "$1042.00", "reasoning\n#### 1,042", 1042, 1042.0, Fraction(1042)])
def test_the_ground_truth_may_be_written_in_many_ways(truth: Any) -> None:
    assert compute_score("openai/gsm8k", "#### 1,042", truth, {"index": 3}) == 1.0
    assert compute_score("openai/gsm8k", "#### 1,043", truth, None) == 0.0


@pytest.mark.parametrize("solution", [None, 42, b"#### 42", ["#### 42"], ""])
def test_what_is_not_text_scores_nothing_and_does_not_raise(solution: Any) -> None:
    assert compute_score("openai/gsm8k", solution, "42") == 0.0


@pytest.mark.parametrize("truth", [None, "", "many", [42], float("nan"), float("inf")])
def test_a_ground_truth_that_is_no_number_is_matched_by_nothing(truth: Any) -> None:
    assert compute_score("openai/gsm8k", "#### 42", truth) == 0.0


def episode(text: str, *calls: CallRecord) -> Episode:
    task = Task(id="t", prompt=[], data_source="openai/gsm8k", ground_truth="42")
    return Episode(
        task=task,
        assistant_text=text,
        final=text,
        transcript=text + "\n#### 42",
        calls=calls,
        stop="answered",
        num_turns=len(calls) + 1,
    )


def call(*, ok: bool) -> CallRecord:
    return CallRecord(name="calculator", arguments={}, ok=ok, error_kind="" if ok else "tool", result="#### 42")


@pytest.mark.asyncio
async def test_the_environment_scores_only_what_the_assistant_wrote() -> None:
    env = Gsm8k()
    right = await env.score(episode("#### 42", call(ok=True)))
    assert (right.correct, right.terms, right.info) == (1.0, {}, {"strict": 1, "lenient": 1, "pred": "42"})
    assert (await env.score(episode("I am done", call(ok=True)))).reward == 0.0
    lenient = await Gsm8k(method="lenient").score(episode("the answer is 42"))
    assert (lenient.correct, lenient.info["strict"]) == (1.0, 0)


@pytest.mark.asyncio
async def test_tool_success_is_a_named_term_paid_once_for_a_call_that_worked() -> None:
    env = Gsm8k(tool_success=0.05)
    both = await env.score(episode("#### 42", call(ok=True), call(ok=True)))
    assert (both.terms, both.reward) == ({"tool_success": 0.05}, 1.05)
    failed = await env.score(episode("<tool_call> #### 1", call(ok=False)))
    assert (failed.terms, failed.reward) == ({"tool_success": 0.0}, 0.0)
    assert (await env.score(episode("#### 42"))).reward == 1.0


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="method='flexible'"):
        Gsm8k(method="flexible")  # pyright: ignore[reportArgumentType]


def test_prepared_rows_are_verls_and_carry_the_prompt(tmp_path: Path) -> None:
    report = prepare(tmp_path / "out", source=source(tmp_path, {**CLIPS, "answer": "#### 1,042"}), prompt="short", seed=5)
    assert {split: entry["rows"] for split, entry in report.items()} == {"train": 2, "test": 1}
    first, second = read_rows(tmp_path / "out" / "train.parquet")
    assert first.id == "openai/gsm8k/train/0"
    assert list(first.prompt) == [{"role": "system", "content": PROMPTS["short"]}, {"role": "user", "content": CLIPS["question"]}]
    assert (first.ground_truth, second.ground_truth) == ("72", "1042")
    assert first.extra_info["answer"] == CLIPS["answer"]
    assert [task.split for task in read_rows(tmp_path / "out" / "test.parquet")] == ["test"]


def test_marks_become_calculator_turns_that_end_in_the_answer(tmp_path: Path) -> None:
    report = prepare(tmp_path / "out", source=source(tmp_path, SITTING), sft=True)
    first, second = read_conversations(tmp_path / "out" / "sft.jsonl")

    def turn(text: str, expression: str, result: str) -> list[dict[str, Any]]:
        function = {"name": "calculator", "arguments": {"expression": expression}}
        asking = {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": function}]}
        return [asking, {"role": "tool", "name": "calculator", "content": result}]

    assert list(first.messages) == [
        {"role": "system", "content": PROMPTS["full"]},
        {"role": "user", "content": CLIPS["question"]},
        *turn("Natalia sold 48/2 =", "48/2", "24"),
        *turn("24 clips in May.\nNatalia sold 48+24 =", "48+24", "72"),
        {"role": "assistant", "content": "72 clips altogether in April and May.\n#### 72"},
    ]
    assert list(second.messages[2:]) == [
        *turn("Weng earns 12/60 =", "12/60", "0.2"),
        *turn("$0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 =", "0.2*50", "10"),
        {"role": "assistant", "content": "$10.\n#### 10"},
    ]
    assert first.tools == [CALCULATOR_SCHEMA]
    sft = report["sft"]
    assert (sft["rows"], sft["calls"], sft["marks"], sft["marks_left_as_text"], sft["skipped"]) == (2, 4, 4, 0, {})


def test_a_mark_that_our_calculator_does_not_confirm_stays_text_and_is_counted(tmp_path: Path) -> None:
    rounded = {"question": "q", "answer": "A third is <<1/3=.33>>.33, twice is <<1/2*2=1>>1, or <<1/0=1>>1.\n#### 1"}
    unmarked = {"question": "q", "answer": "It is one.\n#### 1"}
    report = prepare(tmp_path / "out", source=source(tmp_path, rounded, unmarked), sft=True, max_calls=1)
    (kept,) = read_conversations(tmp_path / "out" / "sft.jsonl")
    written = [message["content"] for message in kept.messages[2:]]
    assert written == ["A third is .33, twice is", "1", "1, or 1.\n#### 1"]
    sft = report["sft"]
    assert (sft["rows"], sft["calls"], sft["marks"], sft["marks_left_as_text"]) == (1, 1, 5, 2)
    assert sft["skipped"] == {"too_many_calls": 1, "no_usable_mark": 1}


def test_the_calculator_is_asked_never_the_data_set(tmp_path: Path) -> None:
    asked: list[str] = []

    def refuse(expression: str) -> str:
        asked.append(expression)
        raise ToolError("no")

    report = prepare(tmp_path / "out", source=source(tmp_path), sft=True, calculate=refuse)
    assert asked == ["48/2", "48+24"]
    assert (report["sft"]["rows"], report["sft"]["skipped"]) == (0, {"no_usable_mark": 1})


def test_a_bad_source_is_named(tmp_path: Path) -> None:
    folder = source(tmp_path, {"question": "q", "answer": "no marker"})
    with pytest.raises(DataError, match=r"train\.jsonl: row 1: column 'answer' does not end"):
        prepare(tmp_path / "out", source=folder)
    assert prepare(tmp_path / "out", source=folder, limit=1)["train"]["rows"] == 1
    (folder / "train.jsonl").write_text('{"question": 3, "answer": "#### 1"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl: row 0: column 'question' is int"):
        prepare(tmp_path / "out", source=folder)
    with pytest.raises(DataError, match=r"train\.jsonl: no such file"):
        prepare(tmp_path / "out", source=tmp_path)


def test_without_a_network_the_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"could not download openai/gsm8k .*source= a directory with train\.jsonl"):
        prepare(tmp_path / "out")


@pytest.mark.skipif(not FULL_DATA.is_dir(), reason="the full data set is not beside the repository")
def test_every_gold_answer_of_the_full_data_set_scores_on_itself(tmp_path: Path) -> None:
    report = prepare(tmp_path, source=FULL_DATA, sft=True)
    assert (report["train"]["rows"], report["test"]["rows"]) == (7473, 1319)
    for split in ("train", "test"):
        for task in read_rows(tmp_path / f"{split}.parquet"):
            answer = task.extra_info["answer"]
            assert compute_score(task.data_source, answer, task.ground_truth) == 1.0, task.id
            assert compute_score(task.data_source, f"#### {int(task.ground_truth) + 1}", task.ground_truth) == 0.0, task.id
    sft = report["sft"]
    assert sft["rows"] == 7473 - sum(sft["skipped"].values())
    assert sft["skipped"]["no_usable_mark"] == 95
    assert (sft["marks"], sft["marks_left_as_text"]) == (23716, 0)
    for conversation in read_conversations(tmp_path / "sft.jsonl"):
        for asking, answering in zip(conversation.messages[2:], conversation.messages[3:], strict=False):
            for asked in asking.get("tool_calls", []):
                expression = asked["function"]["arguments"]["expression"]
                assert answering["content"] == format_number(evaluate(expression))
