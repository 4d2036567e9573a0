"""cgroup v2, where a delegated subtree with the memory and pids controllers is writable: exact limits for a run's whole tree."""

import contextlib
import os
import time

_MOUNT = "/sys/fs/cgroup"
_NEEDED = {"memory", "pids"}


def find_writable(mount: str = _MOUNT, membership: str = "/proc/self/cgroup") -> str | None:
    """The directory below which runs may get their own cgroups, or None. Decided by trying, and leaves nothing behind."""
    try:
        with open(membership) as file:
            lines = file.read().splitlines()
        path = next(line[3:] for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    own = os.path.normpath(f"{mount}/{path}")
    probe = f"{own}/agentrl-probe-{os.getpid()}"
    try:
        with open(f"{own}/cgroup.controllers") as file:
            if not set(file.read().split()) >= _NEEDED:
                return None
        with contextlib.suppress(OSError), open(f"{own}/cgroup.subtree_control", "w") as file:
            file.write("+memory +pids")  # refused while processes are in it, which is no matter when it is already on
        os.mkdir(probe)
    except OSError:
        return None
    try:
        usable = all(os.access(f"{probe}/{name}", os.W_OK) for name in ("memory.max", "pids.max", "cgroup.procs"))
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(probe)
    return own if usable else None


def create(parent_fd: int, name: str, *, memory_bytes: int, processes: int) -> None:
    """A run's cgroup with its limits."""
    os.mkdir(name, dir_fd=parent_fd)
    _write(parent_fd, f"{name}/memory.max", str(memory_bytes))
    _write(parent_fd, f"{name}/pids.max", str(processes))
    for path, value in ((f"{name}/memory.swap.max", "0"), (f"{name}/memory.oom.group", "1")):
        with contextlib.suppress(OSError):  # kernels without swap accounting
            _write(parent_fd, path, value)


def join(parent_fd: int, name: str) -> None:
    """Move the calling process in, before it loses the right to."""
    _write(parent_fd, f"{name}/cgroup.procs", "0")


def remove(parent_fd: int, name: str) -> bool:
    """Kill what is left in it and remove it.

    Returns:
        Whether the kernel killed something in it for memory.
    """
    out_of_memory = False
    with contextlib.suppress(OSError, ValueError):
        events = dict(line.split() for line in _read(parent_fd, f"{name}/memory.events").splitlines())
        out_of_memory = int(events.get("oom_kill", 0)) > 0
    with contextlib.suppress(OSError):
        _write(parent_fd, f"{name}/cgroup.kill", "1")
    for _ in range(50):
        try:
            os.rmdir(name, dir_fd=parent_fd)
            break
        except FileNotFoundError:
            break
        except OSError:
            time.sleep(0.001)  # its last process is being reaped
    return out_of_memory


def _write(parent_fd: int, path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=parent_fd)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _read(parent_fd: int, path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=parent_fd)
    try:
        return os.read(fd, 65536).decode()
    finally:
        os.close(fd)
