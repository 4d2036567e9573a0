"""A real sandbox service in its own process, with a secret in its environment, for the sandbox's integration tests."""

import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from agentrl.process import ClaimedPort

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
"""Of what takes milliseconds: only a hang reaches it."""
START_LIMIT_S = 200.0
AMPLE_S = 25.0
"""Run time of programs that end by themselves: just below the most that the service gives."""
_SERVE = "import json, sys; from agentrl.sandbox.app import serve; serve(**json.loads(sys.argv[1]))"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    body: Any


@dataclass(slots=True, kw_only=True)
class Service:
    """A running service."""

    url: str
    process: subprocess.Popen[bytes]
    secret: str
    stderr: IO[bytes]
    headers: dict[str, str] = field(default_factory=dict[str, str])

    def request(self, path: str, data: bytes | None = None, timeout_s: float = 120.0) -> Answer:
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} | self.headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return _answer(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as error:
            with error:
                return _answer(error.code, dict(error.headers), error.read())

    def run(self, code: str, **fields: Any) -> dict[str, Any]:
        """The whole response to one program."""
        body = {"code": code, "language": "python", "run_timeout": AMPLE_S} | fields
        answer = self.request("/run_code", json.dumps(body).encode())
        assert answer.status == 200, answer
        return answer.body

    def run_out_of_time(self, code: str, run_timeout: float, *, until: str = "", **fields: Any) -> dict[str, Any]:
        """The response to a program that does not end by itself, and the shortest time (``run_timeout``, or some multiples of it)
        in which it printed ``until``: how long even an interpreter takes to start is the machine's affair."""
        while True:
            response = self.run(code, run_timeout=run_timeout, **fields)
            result = response["run_result"]
            if (result is not None and until in result["stdout"]) or run_timeout >= AMPLE_S:
                return response | {"run_timeout": run_timeout}
            run_timeout = min(4 * run_timeout, AMPLE_S)

    @contextmanager
    def busy(self, path: str = "/run_code", **fields: Any) -> Generator[http.client.HTTPConnection, None, None]:
        """A request under way, a program that sleeps unless ``fields`` say otherwise; it ends with the block, by hanging up."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=DEADLINE_S)
        body = {"code": "import time; time.sleep(60)", "run_timeout": 29} | fields
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"} | self.headers)
        try:
            yield connection
        finally:
            connection.close()

    def wait_for_health(self, **expected: Any) -> dict[str, Any]:
        """``/health``, once it says so."""
        wait_until(lambda: expected.items() <= self.request("/health").body.items(), f"health with {expected}")
        return self.request("/health").body

    def stdout(self, code: str, **fields: Any) -> str:
        """What a program that must succeed prints."""
        response = self.run(code, **fields)
        assert response["status"] == "Success", response
        return response["run_result"]["stdout"]


def wait_until(claim: Callable[[], bool], what: str) -> None:
    """Fails when it does not come true."""
    ends = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < ends, f"{what}: not within {DEADLINE_S:g} s"
        time.sleep(0.02)


def _answer(status: int, headers: dict[str, str], raw: bytes) -> Answer:
    try:
        body: Any = json.loads(raw)
    except ValueError:
        body = raw.decode()
    return Answer(status=status, headers={name.lower(): value for name, value in headers.items()}, body=body)


@contextmanager
def running_service(*, command_prefix: list[str] | None = None, **options: Any) -> Generator[Service, None, None]:
    """Start the service, wait until it is healthy, and end it with SIGTERM."""
    secret = secrets.token_hex(16)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "API_KEY": secret}
    with ClaimedPort("127.0.0.1") as port, tempfile.TemporaryFile() as stderr:  # no pipe: a full one would stop the service
        arguments = json.dumps({"host": "127.0.0.1", "port": port} | options)
        process = subprocess.Popen(
            [*(command_prefix or []), sys.executable, "-c", _SERVE, arguments], env=environment, cwd="/", stderr=stderr
        )
        service = Service(url=f"http://127.0.0.1:{port}", process=process, secret=secret, stderr=stderr)
        if options.get("token"):
            service.headers["Authorization"] = f"Bearer {options['token']}"
        try:
            _wait_until_healthy(service)
            yield service
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_healthy(service: Service) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if service.process.poll() is not None:
            service.stderr.seek(0)
            raise RuntimeError(service.stderr.read().decode())
        try:
            if service.request("/health", timeout_s=DEADLINE_S).status == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"the service did not become healthy within {START_LIMIT_S:g} s")


def tier_is_available(tier: str) -> str | None:
    """None, or why this machine cannot give the tier: the service's own words."""
    try:
        with running_service(tier=tier):
            return None
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1][:300]


UNPRIVILEGED_UID = 62_000
_BECOME_USER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from inside import linux
uid = int(sys.argv[2])
needed = sorted({os.path.realpath(path) for path in (sys.base_prefix, sys.prefix, sys.argv[3])})
linux.unshare(linux.CLONE_NEWNS)
linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
for path in needed:
    parts = path.split("/")
    above = ["/".join(parts[:depth]) for depth in range(2, len(parts))]
    closed = next((parent for parent in above if not os.stat(parent).st_mode & 1), None)
    if closed:  # an interpreter below a private directory: show only it, in this process's own mount namespace
        fd = os.open(path, os.O_PATH)
        linux.mount("tmpfs", closed, "tmpfs", 0, "mode=0755")
        os.makedirs(path)
        linux.mount(f"/proc/self/fd/{fd}", path, None, linux.MS_BIND | linux.MS_REC)
if uid:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
os.execv(sys.argv[4], sys.argv[4:])
"""


def with_readable_interpreter(uid: int) -> list[str]:
    """A command prefix: what follows runs as ``uid`` and sees this interpreter, even one below a private directory. Needs root."""
    inside = str(REPOSITORY / "agentrl" / "sandbox")
    return [sys.executable, "-S", "-c", _BECOME_USER, inside, str(uid), str(REPOSITORY)]
