"""One run, from the moment it is forked: take the descriptors, enter the jail, drop everything, execute the code.

Nothing that reports the outcome exists in this process: the exit status is collected by the fork server with waitpid, the
output is read by the service, and the channel that says "ready" is closed before the first line of foreign code runs.
"""

import atexit
import builtins
import contextlib
import io
import json
import linecache
import math
import os
import resource
import signal
import socket
import sys
import threading
import traceback
import types
from typing import Any, NoReturn

from . import cgroup, jail, kernel, landlock, launchers, linux, seccomp

SOURCE_NAME = "main.py"
SETUP_FAILED = 120

_forget = ("inside",)


def run(request: dict[str, Any], fds: list[int], config: dict[str, Any], ruleset: int | None) -> NoReturn:
    """Never returns; the exit status is the code's own, or SETUP_FAILED after a message on the ready channel."""
    ready_fd = fds[4]
    try:
        source = _enter(request, fds, config, ruleset)
    except BaseException as error:  # noqa: BLE001 - the edge of this process: report and leave
        _report(ready_fd, f"error:{type(error).__name__}: {error}")
        os._exit(SETUP_FAILED)
    if request["command"]:
        _run_command(request["command"])
    search_path = [jail.WORK] if ruleset is None else []
    if request["session"]:
        main = _fresh_main(search_path)
        kernel.serve(fds[5], main.__dict__, unpack=unpack_files)
    _run_python(source, search_path=search_path)


def _enter(request: dict[str, Any], fds: list[int], config: dict[str, Any], ruleset: int | None) -> bytes:
    job_fd, stdin_fd, stdout_fd, stderr_fd, ready_fd, *kept = fds
    if request["cgroup"]:
        cgroup.join(config["cgroup"], request["cgroup"])
    os.dup2(stdin_fd, 0)
    os.dup2(stdout_fd, 1)
    os.dup2(stderr_fd, 2)
    jail.close_all_but([job_fd, ready_fd, *kept, *([] if ruleset is None else [ruleset])])
    with contextlib.suppress(PermissionError):  # already the leader where a launcher made the session
        os.setsid()
    uid, gid = _identity(request, config)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    work_fd = None
    if ruleset is None:
        jail.enter_run(size_bytes=request["tmpfs_bytes"], inodes=request["inodes"], uid=uid, gid=gid, covered=config["covered"])
        work_fd = os.open(jail.WORK, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if config["user_namespace"]:
            # A private user namespace per run also makes its process count private.
            linux.unshare(linux.CLONE_NEWUSER)
            jail.map_one_user(inside=config["uid_base"], uid=0, gid=0)
        os.chdir(jail.WORK)
    else:
        os.chdir("/")
    jail.drop_to(uid, gid)
    if config["tier"] in launchers.NAMES:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # the launcher's own was lost with the change of uid
    if not os.access(os.__file__, os.R_OK):
        raise OSError(
            f"uid {os.getuid()} cannot read the interpreter's library {os.__file__}: make its directories world-readable"
        )
    source = unpack_files(job_fd, source_name=request["source_name"] if ruleset is None else None)
    _set_limits(request, in_namespace=ruleset is None, private_uid=config["private_uids"])
    if ruleset is not None:
        landlock.restrict_self(ruleset)
        os.close(ruleset)
    os.close(job_fd)
    seccomp.install(seccomp.build_filter(own_pid=None if ruleset is None else os.getpid()))
    _report(ready_fd, "ready", *([work_fd] if (request["fetch"] or request["session"]) and work_fd is not None else []))
    if work_fd is not None:
        os.close(work_fd)
    os.close(ready_fd)
    return source


def _identity(request: dict[str, Any], config: dict[str, Any]) -> tuple[int, int]:
    if not config["private_uids"]:
        return (0, 0) if config["user_namespace"] else (os.getuid(), os.getgid())
    uid = config["uid_base"] + request["slot"]
    return uid, uid


def _report(ready_fd: int, text: str, *fds: int) -> None:
    try:
        with socket.socket(fileno=os.dup(ready_fd)) as channel:
            socket.send_fds(channel, [text.encode("utf-8", "replace")[:4000]], list(fds))
    except OSError:
        pass  # the service is gone; so will this process be


def unpack_files(job_fd: int, *, source_name: str | None = None) -> bytes:
    """The code, after writing the input files below /work. The service has checked the names."""
    with open(job_fd, "rb", closefd=False) as job:
        job.seek(0)
        header = json.loads(job.read(int.from_bytes(job.read(4), "little")))
        source = job.read(header["code_size"])
        for path, size, executable in header["files"]:
            target = f"{jail.WORK}/{path}"
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as file:
                file.write(job.read(size))
            if executable:
                os.chmod(target, 0o755)
    if source_name is not None:
        with open(f"{jail.WORK}/{source_name}", "wb") as file:
            file.write(source)
    return source


def _set_limits(request: dict[str, Any], *, in_namespace: bool, private_uid: bool) -> None:
    limits = {
        resource.RLIMIT_CPU: math.ceil(request["cpu_s"]),
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_NOFILE: request["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 128,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    if request["bound_address_space"]:
        limits[resource.RLIMIT_AS] = request["address_space_bytes"]
    if in_namespace or private_uid:
        # Where the uid is shared with the service, the count would include the service's own processes.
        limits[resource.RLIMIT_NPROC] = request["processes"]
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        capped = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (capped, capped))


def _run_command(command: list[str]) -> NoReturn:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]} could not be started: {error}\n".encode())
    os._exit(SETUP_FAILED)


def _fresh_interpreter_state(search_path: list[str]) -> None:
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    for fd, name in ((1, "stdout"), (2, "stderr")):
        raw = open(fd, "wb", closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = [SOURCE_NAME]
    sys.path[:0] = search_path
    for name in [name for name in sys.modules if name.split(".")[0] in _forget]:
        del sys.modules[name]
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()  # the stdlib's random reseeds itself after fork


def _fresh_main(search_path: list[str]) -> types.ModuleType:
    _fresh_interpreter_state(search_path)
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __file__=SOURCE_NAME)
    sys.modules["__main__"] = main
    return main


def _run_python(source: bytes, *, search_path: list[str]) -> NoReturn:
    """What ``python main.py`` does, in this process."""
    main = _fresh_main(search_path)
    text = source.decode("utf-8", "replace")
    # An entry without a modification time is never checked against the disk.
    linecache.cache[SOURCE_NAME] = (len(text), None, text.splitlines(keepends=True), SOURCE_NAME)
    status = 0
    try:
        exec(compile(source, SOURCE_NAME, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as stop:
        status = _exit_status(stop)
    except BaseException as error:  # noqa: BLE001 - this is the top of the user's program
        status = 1
        _show(error)
    os._exit(_finish(status))


def _exit_status(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    sys.stderr.write(f"{stop.code}\n")
    return 1


def _show(error: BaseException) -> None:
    """The traceback without the frames of this file."""
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    try:
        if sys.excepthook is not sys.__excepthook__:
            sys.excepthook(type(error), error, trace)
        else:
            traceback.print_exception(type(error), error, trace)
    except BaseException as second:  # noqa: BLE001 - a broken hook or no memory left: say the least
        os.write(2, f"{type(error).__name__}: (its traceback could not be printed: {type(second).__name__})\n".encode())


def _finish(status: int) -> int:
    """Wait for non-daemon threads, run exit handlers, flush: the end of an ordinary interpreter."""
    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - what the interpreter itself calls at its end
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage] - os._exit below would skip them
    except SystemExit as stop:
        status = _exit_status(stop)
    except BaseException as error:  # noqa: BLE001 - user handlers may raise anything
        _show(error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            status = status or 1
    return status
