"""Sessions, notebooks, compiled languages, scoring by tests: the service over HTTP."""

import base64
import concurrent.futures
import http.client
import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from sandbox_harness import AMPLE_S, DEADLINE_S, Answer, Service, running_service, wait_until

from agentrl.errors import SandboxError
from agentrl.sandbox.languages import installed
from agentrl.sandbox.scoring import AssertTest, StreamTest, run_tests


@pytest.fixture(scope="module")
def service() -> Generator[Service, None, None]:
    try:
        with running_service(max_concurrency=4, memory_limit_mb=256, max_sessions=6) as running:
            yield running
    except RuntimeError as error:
        pytest.skip(f"no tier isolates on this machine: {error}")


@pytest.fixture
def full(service: Service) -> Service:
    if service.request("/health").body["tier"] != "zygote":
        pytest.skip("needs the namespace tier: files and processes are refused in the degraded one")
    return service


def _post(service: Service, path: str, **fields: Any) -> Answer:
    return service.request(path, json.dumps(fields).encode())


LIMITS_S = (0.3, 3.0, AMPLE_S)
"""For what has to happen within a time limit and before its end: the smallest in which this machine gets so far."""


def _open(service: Service, **fields: Any) -> str:
    answer = _post(service, "/sessions", **fields)
    assert answer.status == 200, answer
    return answer.body["session_id"]


def _cell(service: Service, session: str, code: str, **fields: Any) -> dict[str, Any]:
    answer = _post(service, f"/sessions/{session}/run", code=code, **fields)
    assert answer.status == 200, answer
    return answer.body


def _delete(service: Service, session: str) -> int:
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=DEADLINE_S)
    connection.request("DELETE", f"/sessions/{session}")
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_session_remembers_variables_files_and_imports_until_it_is_deleted(full: Service) -> None:
    session = _open(full)
    assert _cell(full, session, "import math\nx = 20")["run_result"]["stdout"] == ""
    assert _cell(full, session, "open('note', 'w').write('kept')\nx += math.comb(2, 1)\nx")["run_result"]["stdout"] == "22\n"
    third = _cell(full, session, "open('note').read(), _", fetch_files=["note"])
    assert third["run_result"]["stdout"] == "('kept', 22)\n"
    assert base64.b64decode(third["files"]["note"]) == b"kept"
    assert _delete(full, session) == 200
    gone = _post(full, f"/sessions/{session}/run", code="x")
    assert (gone.status, gone.body["reason"]) == (410, "deleted")
    assert _post(full, "/sessions/never/run", code="x").status == 404


def test_an_exception_ends_the_cell_and_not_the_session(service: Service) -> None:
    session = _open(service)
    failed = _cell(service, session, "y = 5\ndef f():\n    raise KeyError('k')\nf()")
    assert (failed["status"], failed["run_result"]["return_code"], failed["session_alive"]) == ("Failed", 1, True)
    assert failed["run_result"]["stderr"].splitlines()[-1] == "KeyError: 'k'"
    assert "line 3, in f" in failed["run_result"]["stderr"]
    assert "kernel.py" not in failed["run_result"]["stderr"]
    assert _cell(service, session, "import sys; sys.exit(3)")["run_result"]["return_code"] == 3
    assert _cell(service, session, "y")["run_result"]["stdout"] == "5\n"
    _delete(service, session)


def test_a_cell_that_runs_too_long_is_interrupted_and_its_session_goes_on(service: Service) -> None:
    for limit_s in LIMITS_S:
        session = _open(service)
        late = _cell(service, session, "z = 1\nprint('begun')\nwhile True: z += 1", timeout=limit_s)
        assert late["run_result"]["status"] == "TimeLimitExceeded"
        if late["session_alive"] and late["run_result"]["stdout"] == "begun\n":
            break
    assert (late["session_alive"], late["run_result"]["stdout"]) == (True, "begun\n")
    assert _cell(service, session, "z > 0")["run_result"]["stdout"] == "True\n"
    _delete(service, session)


def test_a_cell_that_ignores_the_interrupt_loses_its_session_and_says_so(service: Service) -> None:
    session = _open(service)
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    for limit_s in LIMITS_S:  # interrupted before it ignores that, the cell ends, and not its session
        late = _cell(service, session, code, timeout=limit_s)
        if not late["session_alive"]:
            break
    assert (late["run_result"]["status"], late["session_alive"]) == ("TimeLimitExceeded", False)
    gone = _post(service, f"/sessions/{session}/run", code="1")
    assert (gone.status, gone.body["reason"]) == (410, "wall")
    assert "variables" in gone.body["detail"]


def test_idle_sessions_end_by_themselves_and_the_least_recently_used_makes_place(service: Service) -> None:
    short = _open(service, idle_ttl=0.3)
    sessions = [_open(service) for _ in range(5)]
    _cell(service, sessions[0], "1")
    service.wait_for_health(sessions=5)  # without asking for the session, which would keep it
    assert _post(service, f"/sessions/{short}/run", code="1").body["reason"] == "idle"
    more = [_open(service) for _ in range(2)]
    assert _post(service, f"/sessions/{sessions[1]}/run", code="1").body["reason"] == "evicted"
    assert _cell(service, sessions[0], "2")["run_result"]["stdout"] == "2\n"
    for session in (*sessions, *more):
        _delete(service, session)


def test_a_session_that_hangs_up_and_exits_is_not_said_to_be_killed(full: Service) -> None:
    """Its silence comes before its end: the service then asks for the end, which must not become the reason."""
    (launcher,) = _children(full.process.pid)
    (fork_server,) = _children(launcher)
    others = _children(fork_server)
    session = _open(full)
    (process,) = set(_children(fork_server)) - set(others)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        os.kill(fork_server, signal.SIGSTOP)
        try:
            code = "import os, time\nos.closerange(3, 64)\ntime.sleep(0.3)\nos._exit(5)"
            cell = pool.submit(_cell, full, session, code)
            wait_until(lambda: Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "its exit")
        finally:
            os.kill(fork_server, signal.SIGCONT)
        ended = cell.result(DEADLINE_S)
    assert (ended["run_result"]["reason"], ended["run_result"]["return_code"], ended["session_alive"]) == ("exit", 5, False)
    assert _post(full, f"/sessions/{session}/run", code="1").body["reason"] == "exit"


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def test_memory_hoarded_by_a_sessions_children_ends_it(full: Service) -> None:
    session = _open(full, memory_limit_MB=100)
    code = "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        x = os.urandom(40 << 20); time.sleep(99)\ntime.sleep(99)"
    ended = _cell(full, session, code, timeout=AMPLE_S)
    assert (ended["run_result"]["reason"], ended["session_alive"]) == ("memory", False)


def test_sessions_do_not_see_each_other(full: Service) -> None:
    one, two = _open(full), _open(full)
    _cell(full, one, "secret = 'mine'\nopen('/tmp/secret', 'w').write(secret)\nopen('secret', 'w').write(secret)")
    seen = _cell(
        full,
        two,
        "import os\n'secret' in globals(), os.path.exists('/tmp/secret'), os.path.exists('secret'), os.listdir('/proc')",
    )
    assert seen["run_result"]["stdout"].startswith("(False, False, False, ")
    assert len([n for n in eval(seen["run_result"]["stdout"])[3] if n.isdecimal()]) == 1
    _delete(full, one)
    _delete(full, two)


def test_a_forged_answer_deceives_only_its_own_session(full: Service) -> None:
    one, two = _open(full), _open(full)
    forge = """
import json, os, socket, time
for fd in range(3, 64):
    for n in range(1, 9):
        try:
            socket.socket(fileno=os.dup(fd)).send(json.dumps({"n": n, "code": 0, "op": "done", "id": n}).encode())
        except OSError:
            pass
print("forged", flush=True)
raise SystemExit(9)
"""
    _post(full, f"/sessions/{one}/run", code=forge)
    assert _cell(full, two, "6 * 7")["run_result"]["stdout"] == "42\n"
    assert full.stdout("print('fine')") == "fine\n"
    _delete(full, one)
    _delete(full, two)


def test_a_forked_child_that_returns_from_the_cell_does_not_answer_for_the_session(full: Service) -> None:
    session = _open(full)
    _cell(full, session, "import os\npid = os.fork()")
    assert [_cell(full, session, f"{n} + (pid > 0)")["run_result"]["stdout"] for n in range(4)] == ["1\n", "2\n", "3\n", "4\n"]
    _delete(full, session)


def test_a_notebook_has_sandbox_fusions_shape(service: Service) -> None:
    cells = [
        "a = 123",
        "a",
        "print(a)",
        "import sys; sys.stderr.write('stderr message')\nNone",
        "raise RuntimeError('error message')",
        "a + 1",
    ]
    body = _post(service, "/run_jupyter", cells=cells).body
    assert body.keys() >= {"status", "message", "driver", "cells", "executor_pod_name", "files"}
    assert (body["status"], body["driver"]["status"], body["driver"]["return_code"]) == ("Success", "Finished", 0)
    assert [cell["stdout"] for cell in body["cells"]] == ["", "", "123\n", "", "", ""]
    assert body["cells"][1]["display"] == [{"text/plain": "123"}]
    assert body["cells"][3]["stderr"] == "stderr message"
    (error,) = body["cells"][4]["error"]
    assert (error["ename"], error["evalue"]) == ("RuntimeError", "error message")
    assert body["cells"][5]["display"] == [{"text/plain": "124"}]


def test_a_notebook_takes_files_awaits_and_keeps_its_time(full: Service) -> None:
    body = _post(
        full,
        "/run_jupyter",
        cells=["import asyncio\nawait asyncio.sleep(0, open('in.txt').read())", "open('out.txt', 'w').write('x' * 3)"],
        files={"in.txt": base64.b64encode(b"hello").decode()},
        fetch_files=["out.txt"],
    ).body
    assert body["cells"][0]["display"] == [{"text/plain": "'hello'"}]
    assert base64.b64decode(body["files"]["out.txt"]) == b"xxx"
    late = _post(full, "/run_jupyter", cells=["b = 1", "import time; time.sleep(9)", "b"], total_timeout=0.6).body
    assert (late["status"], late["driver"]["status"]) == ("Failed", "TimeLimitExceeded")
    for limit_s in LIMITS_S:
        cells = ["print('begun'); import time; time.sleep(99)", "5"]
        slow_cell = _post(full, "/run_jupyter", cells=cells, cell_timeout=limit_s).body
        if len(slow_cell["cells"]) == 2 and slow_cell["cells"][0]["stdout"] and slow_cell["cells"][1]["display"]:
            break
    assert [cell["display"] for cell in slow_cell["cells"]] == [[], [{"text/plain": "5"}]]


PROGRAMS = {
    "bash": "read x; echo $((x * 2))",
    "nodejs": "const x = require('fs').readFileSync(0, 'utf8'); console.log(x * 2)",
    "c": '#include <stdio.h>\nint main(void) { int x; scanf("%d", &x); printf("%d\\n", 2 * x); }',
    "cpp": "#include <iostream>\n#include <vector>\nint main() { int x; std::cin >> x; std::cout << 2 * x << std::endl; }",
    "go": 'package main\nimport "fmt"\nfunc main() { var x int; fmt.Scan(&x); fmt.Println(2 * x) }',
    "perl": "my $x = <STDIN>; print 2 * $x, qq(\\n);",
    "ruby": "puts gets.to_i * 2",
    "lua": "print(2 * io.read('n'))",
}


@pytest.mark.parametrize("language", PROGRAMS)
def test_every_installed_language_reads_and_prints(full: Service, language: str) -> None:
    if language not in installed():
        pytest.skip(f"{language} is not installed")
    response = full.run(PROGRAMS[language], language=language, stdin="21", compile_timeout=30)
    assert response["status"] == "Success", response
    assert response["run_result"]["stdout"] == "42\n"
    assert (response["compile_result"] is None) == (language not in ("c", "cpp", "go"))


@pytest.mark.skipif("cpp" not in installed(), reason="g++ is not installed")
def test_a_program_that_does_not_compile_is_failed_without_a_run(full: Service) -> None:
    response = full.run("int main() { return nonsense; }", language="cpp")
    assert (response["status"], response["run_result"]) == ("Failed", None)
    assert response["compile_result"]["return_code"] == 1
    assert "nonsense" in response["compile_result"]["stderr"]
    endless = (
        "#include __FILE__\n" * 3 + "template<int n> struct A { static const int v = A<n-1>::v + A<n-2>::v; };\nint main() {}"
    )
    assert full.run(endless, language="cpp", compile_timeout=3)["status"] == "Failed"


@pytest.mark.skipif("c" not in installed(), reason="gcc is not installed")
def test_compiling_shows_the_host_no_more_than_running_does(full: Service) -> None:
    for trick in (
        '#include "/etc/passwd"',
        '__asm__(".incbin \\"/etc/hostname\\"");',
    ):
        response = full.run(f"{trick}\nint main(void) {{ return 0; }}", language="c")
        assert response["status"] == "Failed", response
        assert "root:" not in response["compile_result"]["stderr"]


def test_a_language_that_is_not_there_is_refused_by_name(service: Service) -> None:
    answer = _post(service, "/run_code", code="x", language="verilog")
    assert answer.status == 400
    assert "python" in answer.body["detail"]


@pytest.mark.asyncio
async def test_programs_are_scored_by_their_streams(service: Service) -> None:
    code = "a, b = map(int, input().split())\nprint(a + b if a < 100 else 0)"
    tests = [StreamTest(stdin=f"{a} 1", stdout=f"{a + 1}\n\n") for a in (1, 50, 200)]
    verdict = await run_tests(service.url, code, tests, run_timeout=AMPLE_S)
    assert [result.reason for result in verdict.results] == ["ok", "ok", "wrong_output"]
    assert (verdict.passed, verdict.total) == (2, 3)
    assert verdict.score == pytest.approx(2 / 3)
    late = await run_tests(service.url, "while True: pass", tests[:1], run_timeout=2)
    assert late.results[0].reason == "wall"
    stopped = await run_tests(service.url, "print(0)", tests, stop_on_failure=True)
    assert [result.reason for result in stopped.results] == ["wrong_output", "not_run", "not_run"]


@pytest.mark.asyncio
async def test_programs_are_scored_by_assertions_and_cheats_do_not_pass(service: Service) -> None:
    tests = [AssertTest(test="assert double(2) == 4"), AssertTest(test="assert double('ab') == 'abab'")]
    honest = await run_tests(service.url, "def double(x):\n    return 2 * x", tests)
    assert honest.passed == 2
    half = await run_tests(service.url, "def double(x):\n    return x + 2", tests)
    assert [result.reason for result in half.results] == ["ok", "assertion"]
    assert "TypeError" in half.results[1].stderr
    for cheat in (
        "import sys; sys.exit(0)",
        "import os\ndef double(x): os._exit(0)",
        "import sys\ndef double(x): sys.exit(0)",
        "class Yes:\n    def __eq__(self, other): return True\ndef double(x): return Yes()",
        "class Yes(str):\n    def __eq__(self, other): return True\ndef double(x): return [Yes()][0]",
        "print('\\n' + '0' * 32)",
        "import builtins\nbuiltins.AssertionError = None",
    ):
        assert (await run_tests(service.url, cheat, tests)).passed == 0, cheat
    with pytest.raises(SandboxError, match="400"):
        await run_tests(service.url, "x", [AssertTest(test="assert (")])


def test_a_client_that_goes_away_takes_its_run_with_it(service: Service) -> None:
    with service.busy():
        service.wait_for_health(running=1)
    service.wait_for_health(running=0)
    counted = 'agentrl_sandbox_rejected_total{cause="disconnected"}'
    wait_until(lambda: counted in service.request("/metrics").body, "the refusal's count")


def test_a_deadline_that_includes_queueing_is_kept() -> None:
    with running_service(max_concurrency=1) as service:
        with service.busy():
            service.wait_for_health(running=1)
            assert _post(service, "/run_code", code="1", total_timeout=0.3).status == 504
            assert service.request("/health").body["running"] == 1, "what it waited for goes on"
        for limit_s in LIMITS_S:  # a run that was not even ready by then is the service's failure, to be repeated
            response = service.run("import time; time.sleep(60)", total_timeout=limit_s)
            if response["status"] != "SandboxError":
                break
        assert response["run_result"]["status"] == "TimeLimitExceeded"


def test_a_service_that_is_told_to_stop_finishes_what_runs_and_refuses_what_waits() -> None:
    with running_service(max_concurrency=1, drain_s=DEADLINE_S) as service, concurrent.futures.ThreadPoolExecutor(1) as pool:
        runs = pool.submit(service.run, "import time; time.sleep(3); print('whole')")
        service.wait_for_health(running=1)
        with service.busy() as waits:
            service.wait_for_health(running=1, queue=1)
            service.process.terminate()
            assert waits.getresponse().status == 503
        assert runs.result(DEADLINE_S)["run_result"]["stdout"] == "whole\n"


def test_several_processes_share_sessions_and_answer_for_each_other() -> None:
    with running_service(processes=2, max_concurrency=4, max_sessions=8, tier="auto") as service:
        service.wait_for_health(processes_alive=2, capacity=4, max_sessions=8)
        sessions = [_open(service) for _ in range(6)]
        assert sorted(session[0] for session in sessions) == ["0", "0", "0", "1", "1", "1"]  # where most room is
        for number, session in enumerate(sessions):
            _cell(service, session, f"v = {number}")
        for _ in range(3):  # each on a connection of its own: both processes get to pass some on
            assert [_cell(service, session, "v")["run_result"]["stdout"] for session in sessions] == [f"{n}\n" for n in range(6)]
        service.wait_for_health(sessions=6)
        page = service.request("/metrics").body
        assert 'agentrl_sandbox_cells_total{reason="ok"} 24.0' in page
        for session in sessions:
            assert _delete(service, session) == 200
