"""Rows in five shapes become tasks, tasks become verl's rows, and a malformed row says where it is."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentrl.data.rows import RowError, raw_rows, read_rows, row_from_task, write_rows
from agentrl.errors import DataError
from agentrl.types import Task

USER = [{"role": "user", "content": "How many?"}]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verl_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "data_source": "openai/gsm8k",
        "prompt": USER,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "42"},
        "extra_info": {"split": "test", "index": 7, "question": "How many?"},
    }
    return row | changes


def test_a_verl_row_becomes_a_task_with_its_lifted_fields(tmp_path: Path) -> None:
    kwargs = {"calculator": {"create_kwargs": {"digits": 3}}}
    extra = {"split": "test", "index": 7, "tools_kwargs": kwargs, "tool_selection": ["calculator"], "question": "How many?"}
    path = jsonl(tmp_path / "rows.jsonl", verl_row(agent_name="tool_agent", extra_info=extra))
    (task,) = read_rows(path)
    assert task.id == "openai/gsm8k/test/7"
    assert list(task.prompt) == USER
    assert task.ground_truth == "42"
    assert (task.split, task.agent, task.data_source) == ("test", "tool_agent", "openai/gsm8k")
    assert task.tools_kwargs == kwargs
    assert task.tool_selection == ("calculator",)
    assert task.extra_info == {"ability": "math", "split": "test", "index": 7, "question": "How many?"}


@pytest.mark.parametrize(
    ("row", "source", "truth"),
    [
        ({"prompt": USER, "env_class": "gsm8k", "reward_spec": {"method": "rule", "ground_truth": "42"}}, "gsm8k", "42"),
        ({"prompt": USER, "solution": "42", "environment": "calc", "tools": ["calculator"]}, "calc", "42"),
        ({"prompt": "How many?", "answer": 42}, "rows", 42),
        ({"prompt": "How many?"}, "rows", None),
        ({"question": "How many?", "answer": "so\n#### 42"}, "rows", "so\n#### 42"),
        ({"problem": "How many?", "solution": "42"}, "rows", "42"),
        ({"messages": USER, "answer": "42"}, "rows", "42"),
    ],
    ids=["skyrl", "trl", "trl text prompt", "trl without an answer", "question and answer", "problem and solution", "messages"],
)
def test_other_shapes_become_the_same_prompt(tmp_path: Path, row: dict[str, Any], source: str, truth: Any) -> None:
    (task,) = read_rows(jsonl(tmp_path / "rows.jsonl", row))
    assert list(task.prompt) == USER
    assert (task.data_source, task.ground_truth, task.split) == (source, truth, "train")
    assert task.id == f"{source}/train/0"
    assert task.tool_selection == (("calculator",) if "tools" in row else None)


def test_keys_that_arrow_filled_with_null_are_gone(tmp_path: Path) -> None:
    rows = [
        verl_row(extra_info={"index": 0, "tools_kwargs": {"search": {"create_kwargs": {"k": 3}}}}),
        verl_row(extra_info={"index": 1, "tools_kwargs": {"code": {"create_kwargs": {"mb": 64}}}, "note": "x"}),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = read_rows(tmp_path / "rows.parquet")
    assert first.tools_kwargs == {"search": {"create_kwargs": {"k": 3}}}
    assert first.extra_info == {"ability": "math", "index": 0}
    assert second.tools_kwargs == {"code": {"create_kwargs": {"mb": 64}}}
    assert second.extra_info == {"ability": "math", "index": 1, "note": "x"}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_written_tasks_read_back_equal(tmp_path: Path, suffix: str) -> None:
    tasks = [
        Task(
            id="calc/val/0",
            prompt=({"role": "system", "content": "Be brief."}, *USER),
            data_source="calc",
            ground_truth="42",
            split="val",
            agent="tool_agent",
            extra_info={"split": "val", "index": 0, "ability": "math", "naïve": "ünïcode"},
            tools_kwargs={"calculator": {"create_kwargs": {"digits": 3}}},
            tool_selection=("calculator",),
        ),
        Task(
            id="calc/val/1",
            prompt=USER,
            data_source="calc",
            ground_truth="-7",
            split="val",
            extra_info={"split": "val", "index": 1, "ability": "math"},
        ),
        Task(
            id="mine",
            prompt=USER,
            data_source="calc",
            ground_truth="0",
            extra_info={"split": "train", "index": 1, "ability": "math"},
        ),
    ]
    path = tmp_path / "deep" / f"rows.{suffix}"
    assert write_rows(tasks, path) == 3
    back = read_rows(path)
    for task, again in zip(tasks, back, strict=True):
        extra = {key: value for key, value in again.extra_info.items() if key != "need_tools_kwargs"}
        assert (again.id, list(again.prompt), again.ground_truth) == (task.id, list(task.prompt), task.ground_truth)
        assert (again.agent, again.tools_kwargs, again.tool_selection) == (task.agent, task.tools_kwargs, task.tool_selection)
        assert extra == task.extra_info
    assert list(path.parent.iterdir()) == [path]


def test_a_written_parquet_has_verls_columns(tmp_path: Path) -> None:
    task = Task(id="s/train/3", prompt=USER, data_source="s", ground_truth="1", extra_info={"index": 3})
    write_rows([task], tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == [
        {
            "data_source": "s",
            "prompt": USER,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "1"},
            "extra_info": {"split": "train", "index": 3},
        }
    ]
    assert "id" not in row_from_task(task)


def test_values_that_fit_no_parquet_schema_are_refused_with_a_way_out(tmp_path: Path) -> None:
    tasks = [Task(id=str(i), prompt=USER, data_source="s", ground_truth=truth) for i, truth in enumerate(["1", 2])]
    with pytest.raises(DataError, match=r"2 rows do not fit one parquet schema .*\.jsonl"):
        write_rows(tasks, tmp_path / "rows.parquet")


def test_several_files_are_one_list_and_repeated_ids_stay_apart(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", verl_row(), verl_row())
    b = jsonl(tmp_path / "b.jsonl", verl_row())
    ids = [task.id for task in read_rows([a, b])]
    assert ids == ["openai/gsm8k/test/7", "openai/gsm8k/test/7#2", "openai/gsm8k/test/7#3"]
    assert [task.id for task in read_rows([a, b], limit=2)] == ids[:2]


@pytest.mark.parametrize(
    ("row", "column", "problem"),
    [
        (verl_row(prompt=[]), "prompt", "is empty, expected a list of chat messages"),
        (verl_row(prompt=5), "prompt", "is int, expected a list"),
        (verl_row(prompt=["hi"]), "prompt", "message 0 is str"),
        (verl_row(prompt=[{"role": "robot", "content": "x"}]), "prompt", "message 0 has role 'robot'"),
        (verl_row(prompt=[*USER, {"role": "user"}]), "prompt", "message 1 (user) has content of type NoneType"),
        (verl_row(reward_model={"style": "rule"}), "reward_model.ground_truth", "is missing"),
        (verl_row(reward_model="42"), "reward_model", "is str, expected dict"),
        (verl_row(data_source=3), "data_source", "is int, expected str"),
        (verl_row(extra_info=[1]), "extra_info", "is list, expected dict"),
        (verl_row(extra_info={"tools_kwargs": "x"}), "extra_info.tools_kwargs", "is str, expected dict"),
        ({"question": "How many?"}, "answer", "is missing"),
        ({"text": "How many?"}, "prompt", "is missing, and so are messages and question; the row has text"),
    ],
)
def test_a_malformed_row_names_file_row_and_column(tmp_path: Path, row: dict[str, Any], column: str, problem: str) -> None:
    path = jsonl(tmp_path / "rows.jsonl", verl_row(), row)
    with pytest.raises(RowError, match=re.escape(f"{path}: row 1: column {column!r}: {problem}")):
        read_rows(path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "q", "answer": "1"}\n\n{"question": \n')
    with pytest.raises(DataError, match=r"broken\.jsonl:3: row 1: not JSON"):
        read_rows(broken)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: row 0: a list, expected an object"):
        read_rows(jsonl(tmp_path / "rows.jsonl", [1]))
    not_parquet = tmp_path / "rows.parquet"
    not_parquet.write_bytes(b"PAR?")
    with pytest.raises(DataError, match="not readable as parquet"):
        read_rows(not_parquet)
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "missing.parquet")
    (tmp_path / "rows.csv").touch()
    with pytest.raises(DataError, match=r"\.csv suffix; rows are read from \.parquet"):
        read_rows(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="no rows in"):
        read_rows(jsonl(tmp_path / "empty.jsonl"))


def test_raw_rows_of_jsonl_keep_their_nulls(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"a": None, "b": 1})
    assert list(raw_rows(path)) == [(0, {"a": None, "b": 1})]
