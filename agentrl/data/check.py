"""Look at data files before a run does: schema, duplicates, leaks between splits, prompt lengths."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from agentrl.data.rows import RowError, raw_rows, task_from_row
from agentrl.errors import DataError
from agentrl.types import Message, Task

MAX_EXAMPLES = 10
"""Problems that are quoted per file; all of them are counted."""


def check_rows(
    paths: Path | str | Sequence[Path | str], *, count_tokens: Callable[[Sequence[Message]], int] | None = None
) -> dict[str, Any]:
    """Read everything, stop at nothing, and report.

    Args:
        paths: files, or a directory whose ``.parquet`` files are taken.
        count_tokens: length of a rendered prompt; None counts the characters of the messages' contents.

    Returns:
        ``ok``; ``files``: per file ``rows, malformed, problems, duplicate_ids, duplicate_prompts, without_ground_truth, data_sources,
        prompt_length {unit, mean, max}``; ``overlap``: per pair of files the number of prompts they share. ``ok`` is False when a row is
        malformed, an id repeats, a file has no rows, or two files share prompts.

    Raises:
        DataError: a path does not exist, or a directory has no parquet files.
    """
    prompts: dict[str, set[str]] = {}
    files: dict[str, Any] = {}
    for path in _files(paths):
        tasks, problems = _read(path)
        keys = [_prompt_key(task) for task in tasks]
        prompts[str(path)] = set(keys)
        files[str(path)] = {
            "rows": len(tasks) + len(problems),
            "malformed": len(problems),
            "problems": problems[:MAX_EXAMPLES],
            "duplicate_ids": _repeats(task.id for task in tasks),
            "duplicate_prompts": _repeats(keys),
            "without_ground_truth": sum(task.ground_truth is None for task in tasks),
            "data_sources": dict(Counter(task.data_source for task in tasks)),
            "prompt_length": _lengths(tasks, count_tokens),
        }
    overlap = {f"{a} & {b}": len(prompts[a] & prompts[b]) for a, b in combinations(prompts, 2)}
    sound = all(file["rows"] and not file["malformed"] and not file["duplicate_ids"] for file in files.values())
    return {"ok": sound and not any(overlap.values()), "files": files, "overlap": overlap}


def _files(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    if not isinstance(paths, str | Path):
        return [Path(path) for path in paths]
    path = Path(paths)
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.parquet"))
    if not found:
        raise DataError(f"{path}: no .parquet files in this directory")
    return found


def _read(path: Path) -> tuple[list[Task], list[str]]:
    tasks: list[Task] = []
    problems: list[str] = []
    rows = raw_rows(path)
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return tasks, problems
        except DataError as error:  # the file itself is broken from here on
            if not path.is_file():
                raise
            return tasks, [*problems, str(error)]
        try:
            tasks.append(task_from_row(row, file=path, number=number))
        except RowError as error:
            problems.append(str(error))


def _prompt_key(task: Task) -> str:
    """What makes two prompts the same: the words of everyone but the system, spaces and case aside."""
    said = [str(message["content"]) for message in task.prompt if message["role"] != "system"]
    return " ".join(" ".join(said).split()).casefold()


def _repeats(values: Iterable[str]) -> int:
    return sum(count - 1 for count in Counter(values).values())


def _lengths(tasks: Sequence[Task], count_tokens: Callable[[Sequence[Message]], int] | None) -> dict[str, Any]:
    unit = "characters" if count_tokens is None else "tokens"
    measure = count_tokens or (lambda messages: sum(len(str(message["content"])) for message in messages))
    lengths = [measure(task.prompt) for task in tasks]
    return {"unit": unit, "mean": sum(lengths) / len(lengths) if lengths else 0.0, "max": max(lengths, default=0)}
