"""What every ``envs.<name>:prepare`` ends with: tasks and cold-start conversations become files, and a report says what was written."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agentrl.data.conversations import Conversation, write_conversations
from agentrl.data.rows import write_rows
from agentrl.types import Task


def write_dataset(
    out_dir: Path, splits: Mapping[str, Iterable[Task]], conversations: Iterable[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Write ``<split>.parquet`` for every split, and ``sft.jsonl`` when there are conversations.

    Args:
        out_dir: created when missing.
        splits: split name -> tasks.
        conversations: ``{messages, tools}`` each, in the order in which they are to be trained on.

    Returns:
        ``{<split>: {path, rows}, "sft": {path, rows}}``; the caller adds what it left out and why.
    """
    out_dir = Path(out_dir)
    report: dict[str, Any] = {}
    for split, tasks in splits.items():
        path = out_dir / f"{split}.parquet"
        report[split] = {"path": str(path), "rows": write_rows(tasks, path)}
    if conversations is not None:
        path = out_dir / "sft.jsonl"
        report["sft"] = {"path": str(path), "rows": write_conversations((Conversation(**one) for one in conversations), path)}
    return report
