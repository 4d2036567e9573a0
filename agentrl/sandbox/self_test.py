"""The start-up self-test: real canaries on the host, a program inside that attacks them, and the host's own look at the damage."""

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agentrl.sandbox.job import MIB, Job, Limits, Outcome

_PROBE = Path(__file__).parent / "inside" / "probe.py"
_PORT_ATTEMPTS = 20
_SECRET_VARIABLE = "AGENTRL_SANDBOX_CANARY"

# Names whose "reached" is judged by the canary itself, not by the attempt: an empty answer is fine.
_JUDGED_BY_CONTENT = ("environment", "host environments")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What the self-test found: per attack "denied" or what was reached, and the breaches the host saw."""

    attacks: dict[str, str] = field(default_factory=dict[str, str])
    breaches: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.breaches


@dataclass(slots=True)
class _Canaries:
    secret: str
    file: Path
    process: subprocess.Popen[bytes]
    sockets: list[socket.socket]
    abstract: str

    def targets(self) -> dict[str, object]:
        return {
            "pid": self.process.pid,
            "service": os.getpid(),
            "file": str(self.file),
            "port": self.sockets[0].getsockname()[1],
            "socket": str(self.file) + ".sock",
            "abstract": self.abstract,
        }

    def damage(self) -> Iterator[str]:
        if self.process.poll() is not None:
            yield "a host process was killed"
        if not self.file.exists() or self.file.read_text() != self.secret:
            yield "a host file was changed"
        if self.file.with_name(self.file.name + ".new").exists():
            yield "a host file was created"
        for canary, name in zip(self.sockets, ("tcp", "udp", "unix", "abstract unix"), strict=True):
            with contextlib.suppress(BlockingIOError):
                if canary.type == socket.SOCK_DGRAM:
                    canary.recv(100)
                else:
                    canary.accept()[0].close()
                yield f"the host's {name} socket was reached"


def tcp_and_udp() -> tuple[socket.socket, socket.socket]:
    """Of one port: what is free for the one may be somebody's for the other."""
    for attempts_left in reversed(range(_PORT_ATTEMPTS)):
        tcp = socket.create_server(("127.0.0.1", 0))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.bind(tcp.getsockname())
        except OSError:
            tcp.close()
            udp.close()
            if not attempts_left:
                raise
        else:
            return tcp, udp
    raise AssertionError("unreachable: the last attempt returns or raises")


@contextmanager
def _canaries() -> Generator[_Canaries, None, None]:
    secret = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentrl-canary-")))
        directory.chmod(0o777)  # the attack must fail by the jail, not by luck of permissions
        file = directory / "secret.txt"
        file.write_text(secret)
        file.chmod(0o666)
        process = stack.enter_context(
            subprocess.Popen(
                ["/bin/cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={_SECRET_VARIABLE: secret},
                start_new_session=True,
            )
        )
        stack.callback(process.kill)
        abstract = f"agentrl-canary-{secrets.token_hex(8)}"
        sockets = [*tcp_and_udp()]
        for address in (str(file) + ".sock", "\0" + abstract):
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            server.bind(address)
            server.listen()
            sockets.append(server)
        for canary in sockets:
            stack.callback(canary.close)
            canary.setblocking(False)
        os.chmod(str(file) + ".sock", 0o777)
        yield _Canaries(secret, file, process, sockets, abstract)


async def run_self_test(run: Callable[[Job], Awaitable[Outcome]]) -> SelfTest:
    """Attack live canaries through ``run``.

    Returns:
        The result; the caller refuses to start unless it passed.
    """
    with _canaries() as canaries:
        job = Job(
            code=await asyncio.to_thread(_PROBE.read_text),
            stdin=json.dumps(canaries.targets()).encode(),
            limits=Limits(wall_s=10.0, memory_bytes=256 * MIB),
        )
        outcome = await run(job)
        breaches = list(canaries.damage())
        if canaries.secret in outcome.stdout + outcome.stderr:
            breaches.append("a host secret was read")
    try:
        attacks: dict[str, str] = json.loads(outcome.stdout)
    except ValueError:
        breaches.append(f"the probe did not finish (status {outcome.code}, {outcome.reason}): {outcome.stderr[-500:]}")
        return SelfTest(breaches=tuple(breaches))
    for name, result in attacks.items():
        if result.startswith("reached") and name not in _JUDGED_BY_CONTENT:
            breaches.append(f"{name}: {result[:200]}")
    return SelfTest(
        attacks={name: "contained" if name in _JUDGED_BY_CONTENT else result[:200] for name, result in attacks.items()},
        breaches=tuple(breaches),
    )
