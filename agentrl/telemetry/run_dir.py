"""The run directory: every path in it, and the small files that several processes keep true together.

config.resolved.yaml  processes.json  metrics.jsonl  events.jsonl  status/<role>.json
trajectories/  weights/  checkpoints/step_N/  evals/  logs/  redis/
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from agentrl.errors import ConfigError
from agentrl.process import start_time


class RunDir:
    """Paths of one run and atomic access to its shared files."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    @classmethod
    def open(cls, root: Path | str) -> "RunDir":
        """An existing run, for commands that read one.

        Raises:
            ConfigError: the folder is no run.
        """
        run = cls(root)
        if not run.config.is_file():
            raise ConfigError(f"{root} is not a run directory: it has no config.resolved.yaml. Give the folder under runs/")
        return run

    def create(self) -> "RunDir":
        for folder in (self.trajectories, self.checkpoints, self.evals, self.logs, self.status, self.weights):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    @property
    def config(self) -> Path:
        return self.root / "config.resolved.yaml"

    @property
    def processes_file(self) -> Path:
        return self.root / "processes.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def trajectories(self) -> Path:
        return self.root / "trajectories"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def evals(self) -> Path:
        return self.root / "evals"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def status(self) -> Path:
        return self.root / "status"

    @property
    def redis(self) -> Path:
        return self.root / "redis"

    def processes(self) -> list[dict[str, Any]]:
        """Live processes of the run as ``{role, pid, url, created}``; dead ones are left out."""
        return [entry for entry in self._read_processes() if is_alive(entry)]

    def recorded_processes(self) -> list[dict[str, Any]]:
        """Every recorded process, dead ones too."""
        return self._read_processes()

    def register(self, role: str, *, pid: int | None = None, url: str = "") -> None:
        """Record a process under its role, replacing an earlier one and forgetting dead ones."""
        pid = pid or os.getpid()
        self.update_processes(drop=[role], add=[{"role": role, "pid": pid, "url": url}])

    def deregister(self, role: str) -> None:
        self.update_processes(drop=[role])

    def update_processes(
        self, *, drop: Sequence[str] = (), drop_prefix: str | None = None, add: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Drop roles, drop every role that starts with a prefix, add entries, and forget the dead: one locked rewrite."""
        self.root.mkdir(parents=True, exist_ok=True)
        with _locked(self.root / ".processes.lock"):
            kept = [
                e
                for e in self._read_processes()
                if e["role"] not in drop and not (drop_prefix and e["role"].startswith(drop_prefix)) and is_alive(e)
            ]
            write_json(self.processes_file, kept + [_with_start_time(dict(entry)) for entry in add])

    def write_config(self, text: str) -> None:
        """Record the resolved config. The file makes the folder a run, so others read it as soon as it is there: whole, or not yet."""
        _replace(self.config, text)

    def url_of(self, role: str) -> str | None:
        """The url of a live process, or None."""
        return next((e["url"] for e in self.processes() if e["role"] == role and e["url"]), None)

    def event(self, name: str, **fields: Any) -> None:
        """Append one lifecycle event; several processes may append at once."""
        line = json.dumps({"time": round(time.time(), 3), "pid": os.getpid(), "event": name, **fields}, default=str)
        with LineFile(self.events) as file:
            file.write(line.encode())

    def write_status(self, role: str, status: Mapping[str, Any]) -> None:
        """Replace the status of a process: what it does, what it waits for and since when."""
        write_json(self.status / f"{role}.json", {"time": round(time.time(), 3), "pid": os.getpid(), **status})

    def read_status(self, role: str) -> dict[str, Any]:
        return read_json(self.status / f"{role}.json") or {}

    def status_age_s(self, role: str) -> float:
        """Seconds since a process last wrote its status; 0 when it never did. Both times are the file system's, so that neither a
        clock that is set nor another machine's makes a live process look silent."""
        probe = self.status / f".now-{os.getpid()}-{threading.get_ident()}"
        try:
            written = (self.status / f"{role}.json").stat().st_mtime
        except OSError:
            return 0.0
        try:
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
        except OSError:  # a reader without the right to write, or a full disk
            now = time.time()
        return max(0.0, now - written)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The steps recorded so far. A torn last line, of a process killed in mid-write, is left out."""
        return list(read_jsonl(self.metrics))

    def _read_processes(self) -> list[dict[str, Any]]:
        return read_json(self.processes_file) or []


class LineFile:
    """Appends whole lines, unbuffered. A line that a full disk cuts short is taken back; one that a killed process left torn is
    ended by the next, so that it costs no other. Several processes may append to one file."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def __enter__(self) -> "LineFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, line: bytes) -> None:
        """Append ``line`` and a newline.

        Raises:
            OSError: the disk refused; the file is as it was.
        """
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            size = os.fstat(self._descriptor).st_size
            is_torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
            left = memoryview((b"\n" if is_torn else b"") + line + b"\n")
            try:
                while left:  # a nearly full disk takes a part and says so only by its number
                    left = left[os.write(self._descriptor, left) :]
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_alive(entry: Mapping[str, Any]) -> bool:
    """Whether the recorded process still runs: same pid and same start time, and no zombie."""
    try:
        process = psutil.Process(int(entry["pid"]))
        created = entry.get("created")
        return process.status() != psutil.STATUS_ZOMBIE and (created is None or abs(start_time(process.pid) - created) < 1.0)
    except psutil.Error:
        return False


def write_json(path: Path, value: Any) -> None:
    """Replace a file's content whole: readers see the old or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(value, indent=1, default=str) + "\n")


def _replace(path: Path, text: str) -> None:
    # Two threads of one process may replace the same file: with one name, the second to finish would find nothing to rename.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file; a line that a killed process left torn is skipped."""
    if not path.is_file():
        return
    with path.open() as file:
        for line in file:
            if line.endswith("\n") and line.strip():
                try:
                    value = json.loads(line)
                except ValueError:
                    if line.endswith("}\n"):
                        raise
                    continue  # torn, and ended by the next writer
                yield value


def _with_start_time(entry: dict[str, Any]) -> dict[str, Any]:
    try:
        entry["created"] = start_time(int(entry["pid"]))
    except psutil.Error:
        entry["created"] = None
    return entry


@contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
