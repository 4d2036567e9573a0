"""The program that the start-up self-test runs inside the jail: it attacks the canaries named on stdin and prints what it got.

It is told where the canaries are, never the secrets they guard.
"""

import contextlib
import ctypes
import errno
import json
import os
import socket
import sys


def main() -> None:
    """One line of JSON: attack name -> "denied: why" or "reached: what"."""
    targets = json.loads(sys.stdin.read())
    attacks = {
        "environment": lambda: dict(os.environ),
        "host environments": lambda: _environments(targets["pid"]),
        "host file read": lambda: _read(targets["file"]),
        "host file write": lambda: _write(targets["file"]),
        "host directory write": lambda: _write(targets["file"] + ".new"),
        "shadow": lambda: _read("/etc/shadow"),
        "tcp": lambda: _connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", targets["port"])),
        "udp": lambda: _send(("127.0.0.1", targets["port"])),
        "unix socket": lambda: _connect(socket.AF_UNIX, socket.SOCK_STREAM, targets["socket"]),
        "abstract socket": lambda: _connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + targets["abstract"]),
        "vsock": lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM),
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "kill": lambda: os.kill(targets["pid"], 9),
        "signal parent": lambda: os.kill(os.getppid() or targets["service"], 0),
        "ptrace": lambda: _call("ptrace", 16, targets["pid"], 0, 0),
        "mount": _mount,
        "unshare": lambda: _call("unshare", 0x1000_0000),
        "setuid": lambda: os.setuid(0),
        "memfd": lambda: os.memfd_create("probe"),
        "chroot": lambda: os.chroot("/"),
    }
    json.dump({name: _outcome(attack) for name, attack in attacks.items()}, sys.stdout)


def _outcome(attack) -> str:  # pyright: ignore[reportMissingParameterType, reportUnknownParameterType]
    try:
        return f"reached: {attack()!r}"
    except (OSError, ValueError) as error:
        return f"denied: {error}"


def _environments(pid: int) -> str:
    found = ""
    for name in {str(pid), *(entry for entry in _list("/proc") if entry.isdecimal())}:
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ") as file:
            found += file.read()
    return found


def _list(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _write(path: str) -> str:
    with open(path, "w") as file:
        file.write("overwritten by the self-test")
    return path


def _connect(family: int, kind: int, address: object) -> str:
    with socket.socket(family, kind) as client:
        client.settimeout(0.5)
        client.connect(address)  # pyright: ignore[reportArgumentType]
        return "connected"


def _send(address: tuple[str, int]) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"probe", address)
        return "sent"


def _mount() -> str:
    """A mount of a kind that does not exist: harmless, and refused for its kind only where mounting is allowed at all."""
    try:
        return _call("mount", b"none", b"/", b"no-such-kind", 0, None)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise
        return f"allowed, then: {error}"


def _call(name: str, *arguments: object) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return "done"


if __name__ == "__main__":
    main()
