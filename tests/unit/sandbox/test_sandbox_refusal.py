"""When nothing isolates: the self-test sees it, the pool refuses, and only allow_unsafe goes on."""

import shutil
import socket
import sys

import pytest

from agentrl.errors import ConfigError, SandboxError
from agentrl.sandbox.app import create_app, serve
from agentrl.sandbox.job import Job, Outcome
from agentrl.sandbox.pool import Pool
from agentrl.sandbox.self_test import run_self_test, tcp_and_udp
from agentrl.sandbox.unsafe import UnsafeRunner

NO_PYTHON = "/nowhere/python"


@pytest.mark.asyncio
async def test_the_self_test_fails_where_nothing_isolates() -> None:
    """The positive control: the same program, unprotected, reaches the canaries."""
    runner = UnsafeRunner()

    async def run(job: Job) -> Outcome:
        return await runner.run(job, 0)

    result = await run_self_test(run)
    assert not result.passed
    assert {"a host secret was read", "a host file was changed", "a host file was created", "a host process was killed"} <= set(
        result.breaches
    )
    assert {"the host's tcp socket was reached", "the host's udp socket was reached"} <= set(result.breaches)
    assert {"the host's unix socket was reached", "the host's abstract unix socket was reached"} <= set(result.breaches)


@pytest.mark.asyncio
async def test_a_probe_that_does_not_finish_is_a_failure() -> None:
    async def run(job: Job) -> Outcome:
        return Outcome(code=1, reason="exit", stdout="", stderr="boom", wall_s=0, cpu_s=0, max_rss_kb=0)

    result = await run_self_test(run)
    assert not result.passed
    assert "boom" in result.breaches[0]


@pytest.mark.asyncio
async def test_a_pool_that_cannot_isolate_refuses_to_start_and_says_what_to_do() -> None:
    pool = Pool(python=NO_PYTHON)
    with pytest.raises(SandboxError, match="cannot isolate code .*zygote: .*zygote-landlock: .*allow_unsafe=True"):
        async with pool.running():
            pass
    assert pool.active_tier is None


@pytest.mark.asyncio
async def test_a_program_that_is_no_fork_server_is_refused() -> None:
    false = shutil.which("false") or "/bin/false"
    with pytest.raises(SandboxError, match="the fork server died"):
        async with Pool(python=false).running():
            pass


@pytest.mark.asyncio
async def test_allow_unsafe_goes_on_without_isolation_and_says_so() -> None:
    pool = Pool(python=NO_PYTHON, allow_unsafe=True)
    async with pool.running():
        assert pool.active_tier == "unsafe"
        assert pool.describe()["degraded"] is True
        assert set(pool.refused) == {"zygote", "zygote-landlock"}


@pytest.mark.asyncio
async def test_the_unsafe_tier_is_never_taken_without_consent() -> None:
    with pytest.raises(SandboxError, match="needs allow_unsafe=True"):
        async with Pool(tier="unsafe", python=sys.executable).running():
            pass


@pytest.mark.parametrize("options", [{"workers": 0}, {"max_concurrency": 0}, {"max_queue": -1}, {"memory_limit_mb": 0}])
def test_numbers_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        create_app(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_only_loopback_may_be_served_without_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="token"):
        serve(host, 0)


def test_the_canaries_get_a_port_that_is_free_for_tcp_and_for_udp(monkeypatch: pytest.MonkeyPatch) -> None:
    create, occupied = socket.create_server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    occupied.bind(("127.0.0.1", 0))
    ports = [occupied.getsockname()[1]]
    monkeypatch.setattr(socket, "create_server", lambda address: create((address[0], ports.pop() if ports else 0)))
    tcp, udp = tcp_and_udp()
    assert tcp.getsockname() == udp.getsockname() != occupied.getsockname()
    for held in (tcp, udp, occupied):
        held.close()
