"""The sandbox service over HTTP: SandboxFusion's shape, limits, files, admission, recovery."""

import base64
import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from sandbox_harness import DEADLINE_S, REPOSITORY, Service, running_service, wait_until

FUSION_RESPONSE = {"status", "message", "compile_result", "run_result", "executor_pod_name", "files"}
FUSION_RESULT = {"status", "execution_time", "return_code", "stdout", "stderr"}


@pytest.fixture(scope="module")
def service() -> Generator[Service, None, None]:
    try:
        with running_service(max_concurrency=8, memory_limit_mb=256) as running:
            yield running
    except RuntimeError as error:
        pytest.skip(f"no tier isolates on this machine: {error}")


@pytest.fixture
def full(service: Service) -> Service:
    if service.request("/health").body["tier"] != "zygote":
        pytest.skip("needs the namespace tier: files and processes are refused in the degraded one")
    return service


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_successful_run_has_sandbox_fusions_shape(service: Service) -> None:
    response = service.run("print(6 * 7)")
    assert response.keys() >= FUSION_RESPONSE
    assert response["run_result"].keys() >= FUSION_RESULT
    assert (response["status"], response["message"], response["compile_result"]) == ("Success", "", None)
    assert (response["executor_pod_name"], response["files"]) == (None, {})
    result = response["run_result"]
    assert (result["status"], result["return_code"], result["stdout"], result["stderr"]) == ("Finished", 0, "42\n", "")
    assert result["reason"] == "ok"
    assert 0 < result["execution_time"] < 25
    assert response["queue_time"] >= 0


def test_every_response_names_the_tier_and_health_agrees(service: Service) -> None:
    answer = service.request("/health")
    assert answer.status == 200
    assert answer.body["ok"] is True
    assert answer.body["self_test"] is True
    assert answer.body["capacity"] == 8
    assert answer.headers["x-sandbox-tier"] == answer.body["tier"]
    assert service.request("/nowhere").headers["x-sandbox-tier"] == answer.body["tier"]


def test_ping_isolation_and_metrics_answer(service: Service) -> None:
    assert service.request("/v1/ping").body == "pong"
    service.run("pass")
    isolation = service.request("/v1/isolation").body
    assert isolation["self_test"]["passed"] is True
    assert len(isolation["self_test"]["attacks"]) >= 15
    assert isolation["limits"]["processes"] == 32
    metrics = service.request("/metrics").body
    assert 'agentrl_sandbox_runs_total{reason="ok"}' in metrics
    assert "agentrl_sandbox_queue_seconds_count" in metrics


def test_an_exception_is_failed_with_a_traceback_of_the_users_frames_only(service: Service) -> None:
    response = service.run("def f():\n    return 1 / 0\nprint('before')\nf()\n")
    assert response["status"] == "Failed"
    result = response["run_result"]
    assert (result["status"], result["return_code"], result["stdout"]) == ("Finished", 1, "before\n")
    assert result["stderr"].splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert 'File "main.py", line 4' in result["stderr"]
    assert "    return 1 / 0" in result["stderr"]
    assert "child.py" not in result["stderr"]


def test_a_syntax_error_is_the_programs_failure(service: Service) -> None:
    result = service.run("x = (1,\nprint(")["run_result"]
    assert (result["status"], result["return_code"]) == ("Finished", 1)
    assert "SyntaxError" in result["stderr"]


@pytest.mark.parametrize(
    ("code", "status", "stderr"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit('gone')", 1, "gone\n"),
        ("import os; os._exit(9)", 9, ""),
        ("raise SystemExit(256 + 3)", 3, ""),
    ],
)
def test_exit_statuses_are_the_interpreters(service: Service, code: str, status: int, stderr: str) -> None:
    result = service.run(code)["run_result"]
    assert (result["return_code"], result["stderr"]) == (status, stderr)


def test_a_crash_of_the_interpreter_is_a_signal(service: Service) -> None:
    response = service.run("import ctypes; ctypes.string_at(0)")
    assert response["status"] == "Failed"
    assert response["run_result"]["return_code"] == -signal.SIGSEGV
    assert response["run_result"]["reason"] == "signal"


def test_a_timeout_keeps_the_output_so_far_and_ends_on_time(service: Service) -> None:
    response = service.run_out_of_time("print('partial')\nwhile True: pass", 0.7, until="partial")
    limit_s = response["run_timeout"]
    assert response["status"] == "Failed"
    result = response["run_result"]
    assert (result["status"], result["return_code"], result["stdout"]) == ("TimeLimitExceeded", None, "partial\n")
    assert result["reason"] == "wall"
    assert f"{limit_s:g} s" in response["message"]
    assert limit_s <= result["execution_time"] < limit_s + 10


def test_a_large_allocation_is_a_memory_error(service: Service) -> None:
    result = service.run("x = bytearray(1 << 30)")["run_result"]
    assert result["return_code"] == 1
    assert result["stderr"].splitlines()[-1] == "MemoryError"


def test_a_smaller_memory_limit_can_be_asked_for_and_a_larger_one_is_capped(service: Service) -> None:
    code = "x = bytearray({} << 20); print(len(x) >> 20)"
    assert service.run(code.format(100), memory_limit_MB=50)["run_result"]["return_code"] == 1
    assert service.stdout(code.format(100), memory_limit_MB=200) == "100\n"
    assert service.run(code.format(400), memory_limit_MB=4096)["run_result"]["return_code"] == 1


def test_long_output_keeps_head_and_tail_without_a_timeout(service: Service) -> None:
    response = service.run("print('head'); print('x' * 300_000); print('tail')")
    result = response["run_result"]
    assert response["status"] == "Success"
    assert result["truncated"] is True
    assert result["stdout"].startswith("head\n")
    assert result["stdout"].endswith("tail\n")
    assert "bytes omitted" in result["stdout"]
    assert len(result["stdout"]) < 70_000


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_is_killed_at_once(service: Service, stream: str) -> None:
    response = service.run(f"import sys\nwhile True: sys.{stream}.write('x' * 10000)")
    assert response["status"] == "Failed"
    assert response["run_result"]["reason"] == "output", "not its time limit"
    assert len(response["run_result"][stream]) < 70_000


def test_unicode_and_invalid_bytes_come_through(service: Service) -> None:
    assert service.stdout("print('žluťoučký 🐎 漢字')") == "žluťoučký 🐎 漢字\n"
    assert service.stdout("import sys; sys.stdout.buffer.write(b'ok \\xff end')") == "ok \ufffd end"
    assert service.stdout("print('\\ud800')") == "\\ud800\n"


def test_stdin_is_read_and_is_empty_by_default(service: Service) -> None:
    assert service.stdout("import sys; print(input()[::-1]); print(sys.stdin.read())", stdin="abc\nžž") == "cba\nžž\n"
    assert service.stdout("import sys; print(repr(sys.stdin.read()))") == "''\n"


def test_code_that_closes_its_streams_still_ends_well(service: Service) -> None:
    response = service.run("import os; os.close(1); os.close(2)")
    assert response["run_result"]["status"] == "Finished"


def test_threads_are_joined_and_exit_handlers_run(service: Service) -> None:
    code = (
        "import atexit, threading, time\natexit.register(lambda: print('bye'))\nlast = threading.Event()\n"
        "threading.Thread(target=lambda: (last.wait(), time.sleep(0.1), print('thread'))).start()\nprint('main')\nlast.set()"
    )
    assert service.stdout(code) == "main\nthread\nbye\n"


def test_twenty_threads_fit_into_the_memory_limit(service: Service) -> None:
    code = (
        "import threading, time\nthreads = [threading.Thread(target=lambda: (bytearray(1000), time.sleep(0.1))) for _ in range(20)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; print('done')"
    )
    assert service.stdout(code) == "done\n"


def test_files_go_in_and_come_out(full: Service) -> None:
    data = bytes(range(256))
    code = (
        "import os\nb = open('in/a.bin', 'rb').read()\nos.makedirs('out')\nopen('out/b.bin', 'wb').write(b[::-1])\nprint(len(b))"
    )
    response = full.run(code, files={"in/a.bin": _b64(data), "empty": None}, fetch_files=["out/b.bin", "/work/empty", "missing"])
    assert response["run_result"]["stdout"] == "256\n"
    assert response["files"] == {"out/b.bin": _b64(data[::-1]), "empty": ""}
    assert response["file_errors"] == {"missing": "not found"}


def test_ordinary_programs_that_need_the_system_work(full: Service) -> None:
    assert (
        full.stdout("import subprocess; print(subprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout)") == "hi\n\n"
    )
    assert full.stdout("import asyncio\nasync def f(): return 5\nprint(asyncio.run(f()))") == "5\n"
    assert full.stdout("import multiprocessing as m\nprint(m.Pool(2).map(abs, [-1, -2]))") == "[1, 2]\n"
    assert full.stdout("import tempfile; print(tempfile.TemporaryFile().write(b'abc'))") == "3\n"


def test_packages_of_the_environment_can_be_imported_without_preloading(service: Service) -> None:
    # The environment may lie below /work or /tmp, which a run covers with its own tmpfs.
    assert service.stdout("import numpy\nprint(numpy.arange(3).sum(), numpy.random.default_rng(0).integers(5) < 5)") == "3 True\n"
    assert service.stdout("import sys, os; print(os.access(sys.executable, os.X_OK))") == "True\n"


def test_bash_runs_with_its_own_exit_status(full: Service) -> None:
    response = full.run("echo $((6 * 7)); cat; exit 3", language="bash", stdin="in")
    assert response["run_result"]["stdout"] == "42\nin"
    assert response["run_result"]["return_code"] == 3


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 422, "JSON"),
        (b"[]", 422, "object"),
        (b'{"language": "python"}', 422, "Field required"),
        (b'{"code": 5, "language": "python"}', 422, "string"),
        (b'{"code": "\\ud800"}', 422, ""),
        (b'{"code": "", "run_timeout": -1}', 422, "greater than 0"),
        (b'{"code": "", "language": "cobol"}', 400, "python, bash"),
        (b'{"code": "", "memory_limit_MB": 0}', 400, "memory_limit_MB"),
        (b'{"code": "", "files": {"../x": ""}}', 400, "/work"),
        (b'{"code": "", "files": {"/etc/x": ""}}', 400, "/work"),
        (b'{"code": "", "files": {"x": "!!"}}', 400, "base64"),
        (b'{"code": "", "files": {"a": "", "a/b": ""}}', 400, "both a file and a directory"),
        (b'{"code": "", "fetch_files": ["/etc/hostname"]}', 400, "/work"),
    ],
)
def test_a_malformed_request_is_refused_with_its_reason(service: Service, body: bytes, status: int, says: str) -> None:
    answer = service.request("/run_code", body)
    assert answer.status == status, answer
    assert says in json.dumps(answer.body)


def test_code_over_a_mebibyte_is_refused_with_the_numbers(service: Service) -> None:
    answer = service.request("/run_code", json.dumps({"code": "#" * (1 << 20) + "x"}).encode())
    assert answer.status == 400
    assert "1048576" in answer.body["detail"]


def test_concurrent_runs_keep_their_outputs_apart(service: Service) -> None:
    def one(index: int) -> str:
        return service.stdout(f"import time\nfor i in range(20):\n    print({index}); time.sleep(0.005)")

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        outputs = list(pool.map(one, range(32)))
    assert outputs == [f"{index}\n" * 20 for index in range(32)]


def test_waiting_in_the_queue_is_reported_and_does_not_count_as_run_time() -> None:
    with running_service(max_concurrency=1) as service, concurrent.futures.ThreadPoolExecutor(1) as pool:
        for limit_s in (0.7, 4, 16):  # the smallest in which this machine runs a program that does nothing
            first = pool.submit(service.run, f"import time; time.sleep({limit_s + 1})")
            service.wait_for_health(running=1)
            response = service.run("pass", run_timeout=limit_s)
            assert first.result(DEADLINE_S)["status"] == "Success"
            if response["status"] == "Success" and response["queue_time"] > limit_s:
                break
        assert (response["status"], response["queue_time"] > limit_s) == ("Success", True)
        assert response["run_result"]["execution_time"] < limit_s


def test_a_full_queue_answers_429_with_retry_after() -> None:
    with running_service(max_concurrency=1, max_queue=1) as service, contextlib.ExitStack() as first:
        first.enter_context(service.busy())
        service.wait_for_health(running=1)
        with service.busy(code="print('in turn')") as waiting:
            service.wait_for_health(running=1, queue=1)
            refused = [service.request("/run_code", b'{"code": "1"}') for _ in range(3)]
            assert [answer.status for answer in refused] == [429] * 3
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
            assert 'agentrl_sandbox_rejected_total{cause="queue_full"} 3.0' in service.request("/metrics").body
            first.close()
            assert json.loads(waiting.getresponse().read())["run_result"]["stdout"] == "in turn\n"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # init's to reap
    except OSError:
        return True


def test_a_killed_fork_server_fails_only_its_own_runs_and_is_replaced() -> None:
    with running_service(max_concurrency=4) as service, concurrent.futures.ThreadPoolExecutor(1) as pool:
        launcher = next(pid for pid in _descendants(service.process.pid))
        lost = pool.submit(service.run, "import time; time.sleep(60)")
        service.wait_for_health(running=1)
        zygote = _children(launcher)[0]
        os.kill(zygote, signal.SIGKILL)
        response = lost.result(timeout=DEADLINE_S)
        assert response["status"] == "SandboxError"
        assert "may be repeated" in response["message"]
        assert service.stdout("print('back')") == "back\n"
        assert service.request("/health").body["restarts"] == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_survives_the_service_however_it_ends(how: signal.Signals) -> None:
    with running_service(max_concurrency=4) as service, concurrent.futures.ThreadPoolExecutor(1) as pool:
        busy = pool.submit(service.run, "import time; time.sleep(60)", run_timeout=29)
        wait_until(
            lambda: len(_descendants(service.process.pid)) >= 3, "launcher, fork server and run"
        )  # admitted is not yet forked
        pids = _descendants(service.process.pid)
        service.process.send_signal(how)
        service.process.wait(DEADLINE_S)
        for pid in pids:
            wait_until(lambda pid=pid: _is_gone(pid), f"the end of process {pid}")
        assert busy.exception(timeout=DEADLINE_S) is not None or busy.result()["status"] == "SandboxError"


def test_preloaded_modules_are_warm_and_a_missing_one_is_named() -> None:
    with running_service(preload=["numpy", "no_such_module"]) as service:
        assert service.request("/health").body["preload_missing"] == ["no_such_module"]
        assert service.stdout("import sys; print('numpy' in sys.modules)") == "True\n"
        draws = {service.stdout("import numpy, random; print(numpy.random.rand(), random.random())") for _ in range(3)}
        assert len(draws) == 3
        result = service.run("import numpy as np; print(np.linalg.det(2 * np.eye(3)))")["run_result"]
        assert result["stdout"].startswith("8.0") or result["stdout"].startswith("7.99")


def test_a_token_is_required_when_one_is_set() -> None:
    with running_service(token="s3cret") as service:
        assert service.stdout("print(1)") == "1\n"
        service.headers["Authorization"] = "Bearer wrong"
        answer = service.request("/run_code", b'{"code": "1"}')
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert service.request("/metrics").status == 401
        assert service.request("/v1/ping").body == "pong"


def test_unsafe_needs_to_be_allowed_and_marks_every_response() -> None:
    with pytest.raises(RuntimeError, match="needs allow_unsafe=True"), running_service(tier="unsafe"):
        pass
    with running_service(tier="unsafe", allow_unsafe=True) as service:
        answer = service.request("/run_code", b'{"code": "print(input())", "stdin": "x", "files": {"a/b": ""}}')
        assert answer.headers["x-sandbox-tier"] == "unsafe"
        assert answer.body["run_result"]["stdout"] == "x\n"
        assert service.request("/health").headers["x-sandbox-tier"] == "unsafe"
        assert service.request("/health").body["degraded"] is True
        assert service.run("while True: pass", run_timeout=0.5)["run_result"]["status"] == "TimeLimitExceeded"
        assert service.run("while True: print('x' * 1000)")["run_result"]["reason"] == "output"
        assert service.secret not in service.stdout("import os; print(dict(os.environ))")


def test_a_host_other_than_loopback_needs_a_token() -> None:
    code = "from agentrl.sandbox.app import serve; serve('0.0.0.0', 1)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        timeout=200,
    )
    assert done.returncode == 1
    assert "give a token" in done.stderr
