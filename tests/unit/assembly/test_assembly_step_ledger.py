"""``agentrl ledger RUN --step N`` on files written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from agentrl.assembly.step_ledger import step_ledger
from agentrl.errors import ConfigError, DataError
from agentrl.telemetry.run_dir import RunDir

OUTCOMES = [("a/0", "trained"), ("a/1", "trained"), ("b/0", "filtered"), ("b/1", "failed:reward")]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    checkpoint = run.checkpoints / "step_2"
    checkpoint.mkdir(parents=True)
    run.config.write_text("run: {name: test}\n")
    (run.checkpoints / "latest").symlink_to("step_2")
    (checkpoint / "state.json").write_text('{"policy_version": 2}')
    write(
        checkpoint / "ledger.jsonl",
        [{"step": 1, "id": "z/0", "outcome": "trained"}, *({"step": 2, "id": i, "outcome": o} for i, o in OUTCOMES)],
    )
    write(checkpoint / "trained_ids.jsonl", [{"step": 2, "id": "a/0", "digest": "d"}, {"step": 2, "id": "a/1", "digest": "d"}])
    counts = {"trained": 2.0, "filtered": 1.0, "stale": 0.0, "failed": 1.0}
    before_a_resume = {"step": 2, "agentrl/trajectories/trained": 9.0}
    write(
        run.metrics, [before_a_resume, {"step": 2, **{f"agentrl/trajectories/{name}": count for name, count in counts.items()}}]
    )
    return run


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_steps_outcomes_add_up_and_the_three_files_agree(run: RunDir) -> None:
    book = step_ledger(run.root, 2)
    assert book.outcomes == {"trained": 2, "filtered": 1, "failed:reward": 1}
    assert book.trained_ids == ("a/0", "a/1")
    assert (book.measured["failed"], book.closes) == (1, True)
    assert book.table().splitlines()[-2:] == [
        "consumed                4",
        "The step closes: ledger.jsonl, trained_ids.jsonl and metrics.jsonl agree.",
    ]


def test_each_file_that_disagrees_is_named_with_both_numbers(run: RunDir) -> None:
    book = step_ledger(run.root, 1)  # trained_ids.jsonl lacks it, and no metrics were written
    assert book.differences == ["ledger.jsonl says that 1 were trained, trained_ids.jsonl lists 0"]
    with run.metrics.open("a") as metrics:
        metrics.write('{"step": 2, "agentrl/trajectories/trained": 2.0, "agentrl/trajectories/filtered": 5.0}\n')
    book = step_ledger(run.root, 2)
    assert "THE STEP DOES NOT CLOSE: ledger.jsonl says 1 filtered, metrics.jsonl 5" in book.table()
    assert json.loads(book.to_json())["closes"] is False


def test_steps_and_lines_that_cannot_be_are_refused_with_their_place(run: RunDir) -> None:
    with pytest.raises(ConfigError, match="step 3 is in no checkpoint.*step_2, holds steps 1 to 2"):
        step_ledger(run.root, 3)
    path = run.checkpoints / "step_2" / "ledger.jsonl"
    path.write_text('{"step": 2, "id": "a/0"}\n')
    with pytest.raises(DataError, match=r"ledger\.jsonl:1 is no entry with step and outcome"):
        step_ledger(run.root, 2)
