"""What serve checks before it deals a task."""

import pytest

from agentrl.assembly.rollouts import check_rows
from agentrl.data.task_source import TaskSource
from agentrl.errors import ConfigError
from agentrl.rollout.tool_loading import load_tools
from agentrl.types import Task


def row(name: str, **more: object) -> Task:
    return Task(id=name, prompt=[], data_source="d", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (row("t/1", tool_selection=("calculater",)), "row t/1: tool_selection names `calculater`.* Declared: calculator"),
        (row("t/1", agent="react"), "row t/1: no agent loop `react`; there are:"),
    ],
)
def test_a_row_that_names_what_the_run_lacks_is_found_before_the_run_starts(bad: Task, match: str) -> None:
    toolbox = load_tools(["tools.calculator:calculator"])
    good = [row("t/0"), row("t/2", tool_selection=("calculator",), agent="single_turn_agent"), row("t/3", tool_selection=())]
    check_rows(TaskSource(good, seed=0), toolbox)
    with pytest.raises(ConfigError, match=match):
        check_rows(TaskSource([*good, bad], seed=0), toolbox)
