"""The check reads everything and reports everything that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from agentrl.data.check import check_rows
from agentrl.data.rows import write_rows
from agentrl.errors import DataError
from agentrl.types import Task


def task(question: str, *, split: str = "train", index: int = 0, truth: Any = "1") -> Task:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    return Task(
        id=f"s/{split}/{index}",
        prompt=prompt,
        data_source="s",
        ground_truth=truth,
        split=split,
        extra_info={"split": split, "index": index},
    )


def test_sound_files_pass_with_their_numbers(tmp_path: Path) -> None:
    write_rows([task("one", index=0), task("three", index=1)], tmp_path / "train.parquet")
    write_rows([task("four", split="test")], tmp_path / "test.parquet")
    report = check_rows(tmp_path)
    assert report["ok"] is True
    train = report["files"][str(tmp_path / "train.parquet")]
    assert (train["rows"], train["malformed"], train["duplicate_ids"], train["duplicate_prompts"]) == (2, 0, 0, 0)
    assert train["data_sources"] == {"s": 2}
    assert train["prompt_length"] == {"unit": "characters", "mean": 13.0, "max": 14}
    assert list(report["overlap"].values()) == [0]


def test_a_prompt_in_both_splits_is_a_leak_whatever_its_spaces_and_system_text(tmp_path: Path) -> None:
    write_rows([task("How  many?")], tmp_path / "train.parquet")
    other = Task(id="x", prompt=[{"role": "user", "content": "how many? "}], data_source="s", ground_truth="1", split="test")
    write_rows([other], tmp_path / "test.parquet")
    report = check_rows(tmp_path)
    assert list(report["overlap"].values()) == [1]
    assert report["ok"] is False


def test_repeats_and_missing_truths_are_counted(tmp_path: Path) -> None:
    write_rows([task("a"), task("a"), task("b", index=2)], tmp_path / "rows.jsonl")
    report = check_rows(tmp_path / "rows.jsonl")
    (file,) = report["files"].values()
    assert (file["duplicate_ids"], file["duplicate_prompts"]) == (1, 1)
    assert report["ok"] is False
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "q"}\n')
    assert check_rows(bare)["files"][str(bare)]["without_ground_truth"] == 1


def test_every_malformed_row_is_reported_and_the_rest_still_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "q", "answer": "1"}, {"question": 5, "answer": "1"}, {"answer": "1"}, {"question": "r", "answer": "1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    report = check_rows([path])
    file = report["files"][str(path)]
    assert (file["rows"], file["malformed"]) == (5, 3)
    assert [problem.split(": ")[1] for problem in file["problems"]] == ["row 1", "row 2", "row 4"]
    assert report["ok"] is False


def test_lengths_can_be_counted_in_tokens(tmp_path: Path) -> None:
    write_rows([task("one two three")], tmp_path / "rows.jsonl")
    report = check_rows(tmp_path / "rows.jsonl", count_tokens=lambda messages: len(str(messages[-1]["content"]).split()))
    (file,) = report["files"].values()
    assert file["prompt_length"] == {"unit": "tokens", "mean": 3.0, "max": 3}


def test_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.parquet files"):
        check_rows(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        check_rows(tmp_path / "missing.jsonl")
