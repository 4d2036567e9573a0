"""SandboxFusion's wire shape: what a request becomes, what an outcome becomes."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.sandbox.job import MIB, Job, Limits, Outcome, Reason, check_path
from agentrl.sandbox.languages import installed
from agentrl.sandbox.wire import BadRequest, RunCodeRequest, to_program, to_response


def job(**fields: Any) -> Job:
    return to_program(RunCodeRequest(**({"code": "1"} | fields)), memory_limit_mb=512).run


def outcome(code: int, reason: Reason) -> Outcome:
    return Outcome(code=code, reason=reason, stdout="o", stderr="e", wall_s=1.5, cpu_s=1.0, max_rss_kb=7)


def test_defaults_are_sandbox_fusions() -> None:
    request = RunCodeRequest(code="x")
    assert (request.compile_timeout, request.run_timeout, request.memory_limit_MB) == (10, 10, -1)
    assert (request.stdin, request.files, request.fetch_files) == (None, {}, [])


def test_unknown_fields_are_ignored_as_sandbox_fusion_does() -> None:
    assert RunCodeRequest.model_validate_json('{"code": "x", "somebody_elses": 1}').code == "x"


def test_limits_follow_the_request_up_to_the_services_own() -> None:
    assert job().limits.memory_bytes == 512 * MIB
    assert job(memory_limit_MB=100).limits.memory_bytes == 100 * MIB
    assert job(memory_limit_MB=4096).limits.memory_bytes == 512 * MIB
    assert job(run_timeout=3).limits.wall_s == 3
    assert job(run_timeout=300).limits.wall_s == 30


def test_files_are_decoded_and_null_is_an_empty_file() -> None:
    made = job(files={"a/b": base64.b64encode(b"\0x").decode(), "/work/c": None}, fetch_files=["/work/d", "e"])
    assert made.files == {"a/b": b"\0x", "c": b""}
    assert made.fetch == ["d", "e"]


@pytest.mark.parametrize("path", ["", "/", "..", "a/../../b", "/etc/passwd", "/work/../x", ".", "a\0b", "/work/", "x" * 2000])
def test_paths_that_leave_the_working_directory_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="working directory"):
        check_path(path)


@given(st.text(max_size=30))
def test_an_accepted_path_is_relative_and_never_climbs(path: str) -> None:
    try:
        accepted = check_path(path)
    except (ValueError, UnicodeEncodeError):
        return
    assert not accepted.startswith("/")
    assert ".." not in accepted.split("/")
    assert check_path(accepted) == accepted


@pytest.mark.parametrize("language", ["verilog", "cobol", "pytest", ""])
def test_other_languages_are_refused_by_name_of_what_there_is(language: str) -> None:
    with pytest.raises(BadRequest, match="supported: python, bash"):
        job(language=language)


@pytest.mark.parametrize(
    ("code", "reason", "status", "run_status", "return_code"),
    [
        (0, "ok", "Success", "Finished", 0),
        (3, "exit", "Failed", "Finished", 3),
        (-11, "signal", "Failed", "Finished", -11),
        (-9, "wall", "Failed", "TimeLimitExceeded", None),
        (-9, "cpu", "Failed", "TimeLimitExceeded", None),
        (-9, "memory", "Failed", "Finished", -9),
        (-9, "output", "Failed", "Finished", -9),
        (0, "output", "Failed", "Finished", 0),
    ],
)
def test_outcomes_map_to_sandbox_fusions_statuses(
    code: int, reason: Reason, status: str, run_status: str, return_code: int | None
) -> None:
    response = to_response(outcome(code, reason), job().limits, queue_time_s=0.5, tier="zygote")
    assert response.run_result is not None
    assert (response.status, response.run_result.status, response.run_result.return_code) == (status, run_status, return_code)
    assert (response.message == "") == (reason in ("ok", "exit"))
    assert (response.queue_time, response.tier) == (0.5, "zygote")


def test_the_golden_response_keeps_its_keys() -> None:
    response = json.loads(to_response(outcome(0, "ok"), job().limits, queue_time_s=0.0, tier="zygote").model_dump_json())
    assert {name: response[name] for name in ("status", "message", "compile_result", "executor_pod_name", "files")} == {
        "status": "Success", "message": "", "compile_result": None, "executor_pod_name": None, "files": {},
    }  # fmt: skip
    fusion = ("status", "execution_time", "return_code", "stdout", "stderr")
    assert [response["run_result"][name] for name in fusion] == ["Finished", 1.5, 0, "o", "e"]


def test_a_job_is_packed_as_header_code_and_files() -> None:
    packed = Job(
        code="é", files={"a": b"12", "b": b"3"}, executables=frozenset("b"), limits=Limits(wall_s=1, memory_bytes=1)
    ).encode()
    size = int.from_bytes(packed[:4], "little")
    assert json.loads(packed[4 : 4 + size]) == {"code_size": 2, "files": [["a", 2, False], ["b", 1, True]]}
    assert packed[4 + size :] == "é".encode() + b"123"


def test_a_language_that_is_known_but_not_installed_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrl.sandbox.languages.installed", lambda: {"python": None})
    with pytest.raises(BadRequest, match="'go' needs go, which is not installed here; supported: python"):
        job(language="go")


@pytest.mark.skipif("cpp" not in installed(), reason="g++ is not installed")
def test_a_compiled_program_runs_its_artifact_beside_its_input_files() -> None:
    files: dict[str, str | None] = {"in": "eA=="}
    request = RunCodeRequest(
        code="int main() {}", language="c++", files=files, fetch_files=["out"], run_timeout=2, compile_timeout=60
    )
    program = to_program(request, memory_limit_mb=128)
    assert program.compile is not None
    assert (program.compile.fetch, program.compile.limits.wall_s, program.compile.source_name) == (["main.bin"], 30, "main.cpp")
    built = program.built(b"ELF")
    assert built.files == {"in": b"x", "main.bin": b"ELF"}
    assert (built.executables, built.code, built.command) == (frozenset(["main.bin"]), "", ("./main.bin",))
    assert (built.fetch, built.limits.wall_s) == (["out"], 2)
