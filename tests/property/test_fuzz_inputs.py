"""Whatever a file or a client sends: a value, or one of our errors that names the place; never another exception, never a hang."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agentrl.config import Config, load_config, parse_config
from agentrl.data.rows import read_rows
from agentrl.errors import CheckpointError, CodecError, ConfigError, DataError
from agentrl.learner.checkpoint import STATE_FILE, damage, read_state
from agentrl.sandbox.wire import BadRequest, RunCodeRequest, to_program
from agentrl.serving.embedded.http import AbortBody, GenerateBody, PauseBody, UpdateFromDiskBody
from agentrl.stream.codec import decode
from agentrl.telemetry.trajectory_log import read_records

EXAMPLES = int(os.environ.get("AGENTRL_FUZZ", "100"))
"""Inputs per parser; AGENTRL_FUZZ=10000 for a long run."""
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4), max_leaves=12
)


@contextmanager
def accepted_or(*refusals: type[Exception], naming: str = "") -> Iterator[None]:
    """The block succeeds, or is refused with one of these, whose message names the place."""
    try:
        yield
    except refusals as error:
        if not str(error) or naming not in str(error):
            pytest.fail(f"{error!r} does not name {naming!r}")


def objects(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Objects whose keys are mostly the right ones and whose values are anything."""
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=8), values, max_size=len(names))


def damaged(text: bytes) -> st.SearchStrategy[bytes]:
    """Valid bytes with some of them cut out, doubled or replaced."""
    edits = st.lists(st.tuples(st.integers(0, len(text)), st.integers(0, 6), st.binary(max_size=4)), min_size=1, max_size=4)

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        out = text
        for at, length, new in changes:
            out = out[:at] + new + out[at + length :]
        return out

    return edits.map(apply)


SECTIONS = {name: list(field.annotation.model_fields) if hasattr(field.annotation, "model_fields") else []  # pyright: ignore
            for name, field in Config.model_fields.items()}  # fmt: skip
configs = (
    st.fixed_dictionaries({}, optional={name: (objects(*keys) if keys else values) | scalars for name, keys in SECTIONS.items()})
    | values
)


@FUZZ
@given(raw=configs)
def test_a_config_of_anything_is_valid_or_refused_with_its_place(raw: Any) -> None:
    with accepted_or(ConfigError, naming="here.yaml"):
        parse_config(raw, place="here.yaml")


VALID_YAML = (Path(__file__).parents[2] / "configs/quickstart.yaml").read_bytes()


@FUZZ
@given(text=st.binary(max_size=60) | damaged(VALID_YAML))
def test_a_damaged_yaml_file_is_valid_or_refused(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(text)
        with accepted_or(ConfigError, naming="run.yaml"):
            load_config(path)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "a: !!python/name:os.system", "run: *nothing"])
def test_yaml_that_names_python_objects_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)


ROW_KEYS = ("prompt", "reward_model", "extra_info", "data_source", "question", "answer", "messages", "id", "tools", "agent_name")
GOOD_ROW = json.dumps({
    "prompt": [{"role": "user", "content": "How much is 2 + 3?"}], "data_source": "d",
    "reward_model": {"style": "rule", "ground_truth": "5"}, "extra_info": {"index": 1, "split": "train"},
}).encode()  # fmt: skip


def rows_of(name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        with accepted_or(DataError, naming=str(path)):
            assert all(task.prompt for task in read_rows(path))


@FUZZ
@given(rows=st.lists(objects(*ROW_KEYS), min_size=1, max_size=3))
def test_jsonl_rows_of_anything_are_tasks_or_refused_with_the_row(rows: list[Any]) -> None:
    rows_of("rows.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))


@FUZZ
@given(data=st.binary(max_size=80) | damaged(GOOD_ROW + b"\n"))
def test_damaged_jsonl_is_read_or_refused(data: bytes) -> None:
    rows_of("rows.jsonl", data)


@pytest.fixture(scope="module")
def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        pq.write_table(pa.Table.from_pylist([json.loads(GOOD_ROW)] * 3), path)
        return path.read_bytes()


@FUZZ
@given(data=st.data())
def test_damaged_parquet_is_read_or_refused(parquet: bytes, data: st.DataObject) -> None:
    rows_of("rows.parquet", data.draw(damaged(parquet)))


STATE = {
    "schema": 1, "step": 3, "policy_version": 3, "num_updates": 3, "num_skipped_updates": 0, "rng": "AA==", "parent": None,
    "state": {"consumed_groups": 4}, "files": {STATE_FILE: 9, "../../etc/passwd": 3},
}  # fmt: skip


@FUZZ
@given(
    data=(objects(*STATE).map(lambda o: {**STATE, **o}) | values).map(lambda o: json.dumps(o).encode())
    | damaged(json.dumps(STATE).encode())
)
def test_a_checkpoint_state_of_anything_is_complete_or_called_damaged(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / STATE_FILE).write_bytes(data)
        assert damage(Path(folder)), "its files are not there"
        with accepted_or(CheckpointError, naming=STATE_FILE):
            assert isinstance(read_state(Path(folder))["policy_version"], int)


@FUZZ
@given(data=st.binary(max_size=200) | st.binary(max_size=80).map(lambda tail: b"ARLE\x01\x00\x01\x01" + tail))
def test_bytes_that_are_no_entry_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data)


@FUZZ
@given(line=objects("v", "id", "segments", "turns", "reward").map(lambda o: json.dumps(o).encode()) | st.binary(max_size=80))
def test_a_trajectory_log_of_anything_is_read_or_refused_with_the_line(line: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "t.jsonl").write_bytes(line + b"\n")
        with accepted_or(DataError, naming="t.jsonl:"):
            list(read_records(Path(folder)))


RUN_CODE = ("code", "language", "stdin", "files", "fetch_files", "run_timeout", "compile_timeout", "memory_limit_MB")


@FUZZ
@given(body=objects(*RUN_CODE).map(lambda o: {"code": "print(1)", "language": "python", **o}))
def test_a_run_code_body_of_anything_is_a_job_or_refused(body: dict[str, Any]) -> None:
    with accepted_or(ValidationError, BadRequest):
        job = to_program(RunCodeRequest.model_validate_json(json.dumps(body)), memory_limit_mb=256).run
        assert 0 < job.limits.memory_bytes <= 256 << 20


BODIES: dict[type[msgspec.Struct], tuple[str, ...]] = {
    GenerateBody: ("input_ids", "rid", "sampling_params", "stream", "return_logprob", "logprob_start_len", "text"),
    AbortBody: ("rid", "abort_all"),
    PauseBody: ("mode",),
    UpdateFromDiskBody: ("model_path", "weight_version", "flush_cache", "expected_digest"),
}


@pytest.mark.parametrize("kind", BODIES)
def test_engine_bodies_of_anything_decode_or_are_refused(kind: type[msgspec.Struct]) -> None:
    @FUZZ
    @given(body=objects(*BODIES[kind]).map(lambda o: json.dumps(o).encode()) | st.binary(max_size=60))
    def check(body: bytes) -> None:
        with accepted_or(msgspec.ValidationError, msgspec.DecodeError):
            msgspec.json.decode(body, type=kind)

    check()


def test_sandbox_paths_cannot_leave_the_work_directory() -> None:
    refuse: Callable[[str], None] = lambda path: to_program(  # noqa: E731
        RunCodeRequest.model_validate({"code": "", "language": "python", "files": {path: ""}}), memory_limit_mb=64
    )
    for path in ("../x", "/etc/passwd", "a/../../x", "a/\0b"):
        with pytest.raises((BadRequest, ValidationError)):
            refuse(path)


def test_a_yaml_bomb_is_refused_or_small() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x]\n" + "\n".join(
        f"{b}: &{b} [{','.join(['*' + a] * 8)}]" for a, b in zip("abcdef", "bcdefg", strict=True)
    )
    with pytest.raises(ConfigError):
        parse_config(yaml.safe_load(bomb), place="bomb.yaml")
