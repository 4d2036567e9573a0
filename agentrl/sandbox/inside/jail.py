"""Two steps of isolation: the fork server's own namespaces and root (once), and a run's nested ones (every time)."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator

from . import linux

WORK = "/work"
STAGE = "/.run"
PRIVATE = {"work": WORK, "tmp": "/tmp", "shm": "/dev/shm"}
_SYSTEM_DIRECTORIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/usr/local/lib", "/usr/bin", "/usr/share/zoneinfo")
MERGED_USR = ("/bin", "/lib", "/lib32", "/lib64", "/libx32")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
FD_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"}
_TOO_BROAD = ("/", "/etc", "/home", "/opt", "/proc", "/root", "/tmp", "/usr", "/usr/local", "/var")


def interpreter_paths() -> list[str]:
    """The directories this interpreter needs beyond the system libraries: its prefix and its virtual environment.

    Raises:
        OSError: a prefix is so broad that showing it to the jail would show the host.
    """
    found: list[str] = []
    for prefix in (sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix):
        if os.path.realpath(prefix) in ("/usr", "/usr/local"):
            continue  # /usr/lib, /usr/bin and /usr/local/lib are shown anyway
        for path in (os.path.abspath(prefix), os.path.realpath(prefix)):
            if path in _TOO_BROAD or path == os.path.expanduser("~"):
                raise OSError(f"the interpreter's prefix {path} would expose too much to the sandbox; use a virtual environment")
            if path not in found:
                found.append(path)
    return found


def readable_paths() -> list[str]:
    """Everything of the host that code may read, for the tier that shows it in place."""
    return [*_SYSTEM_DIRECTORIES, *MERGED_USR, *_SYSTEM_FILES, *interpreter_paths()]


def enter_namespaces(*, user: bool) -> None:
    """Leave the host's mount, pid (for children), network, ipc and uts namespaces; without root also its user namespace."""
    if user:
        uid, gid = os.geteuid(), os.getegid()
        linux.unshare(linux.CLONE_NEWUSER)
        map_one_user(inside=0, uid=uid, gid=gid)
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)


def map_one_user(*, inside: int, uid: int, gid: int) -> None:
    """Map one id of the parent user namespace; the rest of the host's ids do not exist in it."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"), ("gid_map", f"{inside} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def build_root(*, extra: Iterable[str] = (), hostname: str = "sandbox") -> list[str]:
    """Replace the root by one that holds only libraries, the interpreter, five devices and empty mount points, read-only.

    Call as pid 1 of the new pid namespace. Sources are bound through the old root while it is still attached, with the
    privileges of the starter, so that an interpreter below a private directory stays reachable after the uid changes.
    ``extra`` are further directories to show, such as a compiler's headers.

    Returns:
        What a run's own tmpfs would cover, such as an environment below /tmp; ``enter_run`` puts it back.
    """
    stage = next(path for path in ("/tmp", "/run", "/mnt", "/var") if os.path.isdir(path))
    sources = dict(wanted_paths(extra))
    previous_umask = os.umask(0o022)
    linux.mount("tmpfs", stage, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755,size=1m")
    os.mkdir(f"{stage}/new")
    os.mkdir(f"{stage}/old")
    linux.pivot_root(stage, f"{stage}/old")
    os.chdir("/")
    linux.mount("tmpfs", "/new", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755,size=4m")
    shown: list[str] = []
    for target, source in sorted(sources.items()):
        if any(target == path or target.startswith(path + "/") for path in shown):
            continue
        if _bind("/old" + source, "/new" + target, linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV):
            shown.append(target)
    for path in MERGED_USR:
        if os.path.islink("/old" + path):
            os.symlink(os.readlink("/old" + path), "/new" + path)
    _make_devices()
    for path in (*PRIVATE.values(), "/proc", STAGE):
        os.makedirs("/new" + path, mode=0o755, exist_ok=True)
    linux.mount("proc", "/new/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    linux.set_mount_attributes("/new", linux.MOUNT_ATTR_RDONLY, recursive=False)
    linux.umount("/old", linux.MNT_DETACH)
    os.chdir("/new")
    linux.pivot_root(".", ".")
    linux.umount(".", linux.MNT_DETACH)
    os.chdir("/")
    os.umask(previous_umask)
    with contextlib.suppress(OSError):
        _set_hostname(hostname)
    return covered(shown)


def covered(shown: Iterable[str]) -> list[str]:
    """Those of the shown paths that a run's own tmpfs hides."""
    return [path for path in shown if any(path.startswith(f"{place}/") for place in PRIVATE.values())]


def _set_hostname(hostname: str) -> None:
    import socket

    socket.sethostname(hostname)


def wanted_paths(extra: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(path in the jail, path on the host) of everything that is shown."""
    for path in (*_SYSTEM_DIRECTORIES, *_SYSTEM_FILES, *interpreter_paths(), *extra):
        if os.path.exists(path):
            yield path, os.path.realpath(path)
    for path in MERGED_USR:
        if os.path.isdir(path) and not os.path.islink(path):
            yield path, path


def _bind(source: str, target: str, attributes: int) -> bool:
    if not os.path.exists(source):
        return False
    if os.path.isdir(source):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT, 0o444))
    linux.mount(source, target, None, linux.MS_BIND | linux.MS_REC)
    linux.set_mount_attributes(target, attributes)
    return True


def _make_devices() -> None:
    for path in DEVICES:
        _bind("/old" + path, "/new" + path, linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NOEXEC)
    for name, link in FD_LINKS.items():
        os.symlink(link, f"/new/dev/{name}")


def enter_run(*, size_bytes: int, inodes: int, uid: int, gid: int, covered: Iterable[str]) -> None:
    """A run's own mounts and ipc: one bounded tmpfs behind /work, /tmp and /dev/shm, and a /proc that shows only the run.

    Call in the child that is pid 1 of the run's pid namespace, while it still has the fork server's capabilities.
    """
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
    flags = linux.MS_NOSUID | linux.MS_NODEV
    kept = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in covered}
    linux.mount("tmpfs", STAGE, "tmpfs", flags, f"mode=0755,size={size_bytes},nr_inodes={inodes},uid={uid},gid={gid}")
    for name, target in PRIVATE.items():
        path = f"{STAGE}/{name}"
        os.mkdir(path)
        os.chmod(path, 0o755 if target == WORK else 0o1777)
        os.chown(path, uid, gid)
        linux.mount(path, target, None, linux.MS_BIND)
    linux.umount(STAGE, linux.MNT_DETACH)
    for path, fd in kept.items():
        os.makedirs(path, mode=0o755)
        linux.mount(f"/proc/self/fd/{fd}", path, None, linux.MS_BIND | linux.MS_REC)
        os.close(fd)
    linux.mount("proc", "/proc", "proc", flags | linux.MS_NOEXEC, "subset=pid")


def drop_to(uid: int, gid: int) -> None:
    """Become an unprivileged user for good: no groups, no capabilities now, in the bounding set, or to regain by exec."""
    linux.drop_bounding_set()
    if os.geteuid() == 0 and uid != 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    linux.drop_capabilities()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    # Changing uid made the process undumpable, which hands its own /proc/self/fd to root.
    linux.prctl(linux.PR_SET_DUMPABLE, 1)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every file descriptor above stderr except these."""
    low = 3
    for fd in sorted(set(keep)):
        if fd >= low:
            os.closerange(low, fd)
            low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
