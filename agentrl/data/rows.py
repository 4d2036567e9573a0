"""Rows of a parquet or JSONL file <-> ``Task``.

Five shapes are read: verl's (``prompt``, ``reward_model``), SkyRL's (``prompt``, ``reward_spec``), TRL's (``prompt`` and free columns),
``{question, answer}`` and ``{messages, answer}``. Written is verl's. Rows count from 0.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from agentrl.errors import DataError
from agentrl.types import Message, Task

_QUESTION_COLUMNS = ("question", "problem", "query")
_ANSWER_COLUMNS = ("ground_truth", "answer", "solution")
_ROLES = ("system", "user", "assistant", "tool", "developer")
_LIFTED = ("tools_kwargs", "tool_selection")
"""Keys of ``extra_info`` that have a field of their own in ``Task``."""


class RowError(DataError):
    """One row is malformed. ``file``, ``row`` and ``column`` say where."""

    def __init__(self, file: Path, row: int, column: str, problem: str) -> None:
        super().__init__(f"{file}: row {row}: column {column!r}: {problem}")
        self.file, self.row, self.column, self.problem = file, row, column, problem


def read_rows(paths: Path | str | Sequence[Path | str], *, split: str = "train", limit: int | None = None) -> list[Task]:
    """The tasks of one file or of several, in order, each with an id of its own: the second row of one id gets ``#2`` appended, and so on.

    Args:
        paths: ``.parquet``, ``.jsonl`` or ``.ndjson`` files.
        split: for rows that do not say theirs.
        limit: at most this many tasks in all.

    Raises:
        DataError: a file is missing or empty, or a row is malformed; names file, row and column.
    """
    tasks: list[Task] = []
    seen: Counter[str] = Counter()
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    for file in files:
        for number, row in raw_rows(file):
            if limit is not None and len(tasks) >= limit:
                return tasks
            task = task_from_row(row, file=file, number=number, split=split)
            seen[task.id] += 1
            if seen[task.id] > 1:  # some public data sets repeat every row many times; ``check_rows`` counts them
                task = replace(task, id=f"{task.id}#{seen[task.id]}")
            tasks.append(task)
    if not tasks:
        raise DataError(
            f"no rows in {', '.join(map(str, files)) or 'an empty list of files'}: there is nothing to train or evaluate on"
        )
    return tasks


def raw_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows as plain Python values. Keys that Arrow filled with null to unify structs are left out.

    Raises:
        DataError: no such file, not a known format, or not readable; names file and row.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from _read_jsonl(path)
    else:
        raise DataError(f"{path}: {path.suffix or 'no'} suffix; rows are read from .parquet, .jsonl and .ndjson")


def task_from_row(row: Mapping[str, Any], *, file: Path, number: int, split: str = "train") -> Task:
    """One row, whatever its shape, as a Task.

    Raises:
        RowError: a needed column is missing or has the wrong type.
    """
    row = _without_nulls(dict(row))
    cells = _Row(row, file, number)
    extra = cells.mapping("extra_info")
    data_source = cells.text("data_source", default=cells.text("env_class", default=cells.text("environment", default=file.stem)))
    split = cells.checked("extra_info.split", extra.get("split", split), str)
    index = extra.get("index", number)
    selection = extra.get("tool_selection", row.get("tools"))
    names = cast("list[Any]", selection) if isinstance(selection, list) else []
    return Task(
        id=cells.text("id", default=f"{data_source}/{split}/{index}"),
        prompt=_prompt(cells),
        data_source=data_source,
        ground_truth=_ground_truth(cells),
        split=split,
        agent=cells.text("agent_name", default="") or None,
        extra_info={**_free_columns(row), **{key: value for key, value in extra.items() if key not in _LIFTED}},
        tools_kwargs=cells.checked("extra_info.tools_kwargs", extra.get("tools_kwargs", {}), dict),
        tool_selection=tuple(names) if names and all(isinstance(name, str) for name in names) else None,
    )


def write_rows(tasks: Iterable[Task], path: Path) -> int:
    """Write tasks in verl's schema, as parquet or JSONL by the suffix; returns how many. The file appears whole or not at all.

    Raises:
        DataError: the tasks' values do not fit one schema, or the suffix is unknown.
    """
    path = Path(path)
    rows = [row_from_task(task) for task in tasks]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".parquet":
        try:
            pq.write_table(pa.Table.from_pylist(_same_keys(rows)), part)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{path}: the {len(rows)} rows do not fit one parquet schema ({error}). Use one type per key, or .jsonl"
            ) from error
    elif path.suffix == ".jsonl":
        write_jsonl(rows, part)
    else:
        raise DataError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; use .parquet or .jsonl")
    os.replace(part, path)
    return len(rows)


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """One JSON object per line, UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def row_from_task(task: Task) -> dict[str, Any]:
    """A task in verl's row shape. Empty structs are left out: parquet cannot hold them."""
    extra: dict[str, Any] = {"split": task.split, **task.extra_info}
    if task.tools_kwargs:
        extra |= {"need_tools_kwargs": True, "tools_kwargs": dict(task.tools_kwargs)}
    if task.tool_selection is not None:
        extra["tool_selection"] = list(task.tool_selection)
    row: dict[str, Any] = {
        "data_source": task.data_source,
        "prompt": [dict(message) for message in task.prompt],
        "ability": extra.get("ability", "math"),
        "reward_model": {"style": "rule", "ground_truth": task.ground_truth},
        "extra_info": extra,
    }
    if task.agent is not None:
        row["agent_name"] = task.agent
    if task.id != f"{task.data_source}/{task.split}/{extra.get('index')}":
        row["id"] = task.id
    return row


class _Row:
    """Typed access to one row's columns; a wrong type is an error that says where."""

    def __init__(self, row: Mapping[str, Any], file: Path, number: int) -> None:
        self.row, self.file, self.number = row, file, number

    def error(self, column: str, problem: str) -> RowError:
        return RowError(self.file, self.number, column, problem)

    def checked(self, column: str, value: Any, kind: type) -> Any:
        if not isinstance(value, kind):
            raise self.error(column, f"is {type(value).__name__}, expected {kind.__name__}")
        return value

    def text(self, column: str, *, default: str) -> str:
        return self.checked(column, self.row.get(column, default), str)

    def mapping(self, column: str) -> dict[str, Any]:
        return self.checked(column, self.row.get(column, {}), dict)

    def first(self, columns: Sequence[str]) -> str | None:
        return next((column for column in columns if column in self.row), None)


def _prompt(cells: _Row) -> list[Message]:
    column = cells.first(("prompt", "messages", *_QUESTION_COLUMNS))
    if column is None:
        raise cells.error(
            "prompt", f"is missing, and so are messages and question; the row has {', '.join(cells.row) or 'no columns'}"
        )
    value = cells.row[column]
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    return checked_messages(value, lambda problem: cells.error(column, problem))


def checked_messages(value: Any, error: Any) -> list[Message]:
    """Chat messages, or ``raise error(problem)``. A missing content is empty text."""
    if not isinstance(value, list) or not value:
        raise error(f"is {type(value).__name__ if not isinstance(value, list) else 'empty'}, expected a list of chat messages")
    messages: list[Message] = []
    for at, message in enumerate(cast("list[Any]", value)):
        if not isinstance(message, dict):
            raise error(f"message {at} is {type(message).__name__}, expected an object with role and content")
        found = cast("Message", message)
        if found.get("role") not in _ROLES:
            raise error(f"message {at} has role {found.get('role')!r}, expected one of {', '.join(_ROLES)}")
        content = found.get("content")
        if content is None and found.get("tool_calls"):
            content = ""
        if not isinstance(content, str | list):
            raise error(f"message {at} ({found['role']}) has content of type {type(content).__name__}, expected text")
        messages.append({**found, "content": content})
    return messages


def _ground_truth(cells: _Row) -> Any:
    for column in ("reward_model", "reward_spec"):
        if column in cells.row:
            reward = cells.mapping(column)
            if "ground_truth" not in reward:
                raise cells.error(f"{column}.ground_truth", "is missing: nothing to score against")
            return reward["ground_truth"]
    column = cells.first(_ANSWER_COLUMNS)
    if column is None and "prompt" not in cells.row:
        raise cells.error("answer", "is missing: nothing to score against")
    return None if column is None else cells.row[column]


_KNOWN = {"id", "data_source", "prompt", "messages", "reward_model", "reward_spec", "extra_info", "agent_name", "tools"}


def _free_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _KNOWN}


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield number, _without_nulls(row)
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: damaged names and messages that are not UTF-8
        raise DataError(f"{path}: row {number}: not readable as parquet ({error})") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{line_number}: row {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{line_number}: row {number}: a {type(row).__name__}, expected an object")
            yield number, cast("dict[str, Any]", row)
            number += 1


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct all keys seen in the column; the ones a row did not have come back as None."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in cast("dict[str, Any]", value).items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in cast("list[Any]", value)]
    return value


def _same_keys(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``from_pylist`` takes the columns from the first row, so every row must have all of them."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{column: row.get(column) for column in columns} for row in rows]
