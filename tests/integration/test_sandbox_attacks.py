"""Attacks on the sandbox with live canaries, over HTTP, on every tier this machine can give, with and without root.

An attack prints ``REACHED`` when it got somewhere it must not. After each one the canaries themselves are looked at: what the
attack says is never the only evidence.
"""

import base64
import concurrent.futures
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sandbox_harness import AMPLE_S, DEADLINE_S, REPOSITORY, UNPRIVILEGED_UID, Service, running_service, with_readable_interpreter

from agentrl.sandbox.self_test import tcp_and_udp

MEMORY_MB = 192
ON_TIME_S = 10.0
"""How late the end of a run may be noticed where two cores are everybody's."""
TIERS = ("zygote", "zygote-landlock", "bubblewrap", "nsjail")

PRELUDE = """
import ctypes, errno, os, signal, socket, struct, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def attempt(what, attack):
    try:
        result = attack()
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        print("denied", what, type(error).__name__, error)
        return None
    print("REACHED", what, repr(result)[:300])
    return result
def call(number, *arguments):
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


@dataclass(slots=True)
class Target:
    """A service under attack and the canaries beside it."""

    service: Service
    tier: str
    is_root: bool
    directory: Path
    secret: str
    process: subprocess.Popen[bytes]
    sockets: dict[str, socket.socket]
    abstract: str

    @property
    def has_namespaces(self) -> bool:
        return self.tier != "zygote-landlock"

    def attack(self, code: str, **fields: Any) -> dict[str, Any]:
        names = {
            "CANARY_PID": self.process.pid,
            "SERVICE_PID": self.service.process.pid,
            "FILE": str(self.directory / "secret.txt"),
            "DIRECTORY": str(self.directory),
            "PORT": self.sockets["tcp"].getsockname()[1],
            "SOCKET": str(self.directory / "socket"),
            "ABSTRACT": self.abstract,
            "REPOSITORY": str(REPOSITORY),
        }
        assignments = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        # A launcher's own start, and on a busy machine that is long, counts as run time.
        limit_s = fields.pop("run_timeout", AMPLE_S) + (0.7 if self.tier in ("bubblewrap", "nsjail") else 0.0)
        response = self.service.run_out_of_time(PRELUDE + assignments + code + "\nprint('END')", limit_s, **fields)
        self.check_damage(response)
        return response

    def denied(self, code: str, **fields: Any) -> str:
        """The attack must run to its end, be denied at least once, and reach nothing."""
        response = self.attack(code, **fields)
        result = response["run_result"]
        assert result["stdout"].endswith("END\n"), result
        assert "denied" in result["stdout"]
        return result["stdout"]

    def check_damage(self, response: dict[str, Any]) -> None:
        result = response["run_result"]
        assert "REACHED" not in result["stdout"], result["stdout"]
        text = result["stdout"] + result["stderr"] + "".join(response["files"].values())
        assert self.secret not in text
        assert self.service.secret not in text
        assert self.process.poll() is None
        assert self.service.process.poll() is None
        assert sorted(path.name for path in self.directory.iterdir()) == ["secret.txt", "socket"]
        assert (self.directory / "secret.txt").read_text() == self.secret
        for name, canary in self.sockets.items():
            with contextlib.suppress(BlockingIOError):
                reached: Any = canary.recv(10) if name == "udp" else canary.accept()
                pytest.fail(f"the host's {name} socket was reached: {reached}")

    def processes(self) -> set[int]:
        return set(_descendants(self.service.process.pid))

    def wait_for_processes(self, expected: set[int]) -> set[int]:
        deadline = time.monotonic() + DEADLINE_S
        while (left := self.processes() - expected) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from _descendants(int(child))


@contextlib.contextmanager
def _canaries(directory: Path) -> Generator[tuple[subprocess.Popen[bytes], dict[str, socket.socket], str, str], None, None]:
    secret, abstract = base64.b32encode(os.urandom(15)).decode(), f"canary-{os.getpid()}-{os.urandom(4).hex()}"
    (directory / "secret.txt").write_text(secret)
    (directory / "secret.txt").chmod(0o666)
    directory.chmod(0o777)
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(["/bin/sleep", "600"], env={"SECRET": secret}))
        stack.callback(process.kill)
        tcp, udp = (stack.enter_context(canary) for canary in tcp_and_udp())
        path = stack.enter_context(socket.socket(socket.AF_UNIX))
        path.bind(str(directory / "socket"))
        (directory / "socket").chmod(0o777)
        path.listen()
        hidden = stack.enter_context(socket.socket(socket.AF_UNIX))
        hidden.bind("\0" + abstract)
        hidden.listen()
        sockets = {"tcp": tcp, "udp": udp, "path": path, "abstract": hidden}
        for canary in sockets.values():
            canary.setblocking(False)
        yield process, sockets, secret, abstract


@pytest.fixture(scope="module", params=[f"{tier}/{who}" for tier in TIERS for who in ("root", "user")])
def target(request: pytest.FixtureRequest) -> Generator[Target, None, None]:
    tier, _, who = request.param.partition("/")
    prefix: list[str] | None = None
    if os.geteuid() != 0 and who == "root":
        pytest.skip("needs root")
    if os.geteuid() == 0 and (who == "user" or tier == "zygote-landlock"):
        prefix = with_readable_interpreter(UNPRIVILEGED_UID if who == "user" else 0)
    with contextlib.ExitStack() as stack:
        try:
            service = stack.enter_context(
                running_service(command_prefix=prefix, tier=tier, max_concurrency=4, memory_limit_mb=MEMORY_MB)
            )
        except RuntimeError as error:
            pytest.skip(f"tier {tier} is not available here: {str(error).strip().splitlines()[-1][:300]}")
        directory = stack.enter_context(_world_directory())
        process, sockets, secret, abstract = stack.enter_context(_canaries(directory))
        yield Target(service, tier, who == "root", directory, secret, process, sockets, abstract)


@contextlib.contextmanager
def _world_directory() -> Generator[Path, None, None]:
    """A directory anyone could reach if the jail did not hold: pytest's own are private to the user."""
    with tempfile.TemporaryDirectory(prefix="agentrl-attack-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_the_services_environment_is_not_visible(target: Target) -> None:
    code = """
print(dict(os.environ))
for pid in ["self", "1", str(SERVICE_PID), str(CANARY_PID), str(os.getppid())]:
    try:
        print(open(f"/proc/{pid}/environ").read())
    except OSError as error:
        print("denied", error)
"""
    output = target.denied(code)
    assert "API_KEY" not in output


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/etc/shadow", "/etc/hostname", "/root/.bashrc", "/proc/kallsyms", "/proc/cmdline", "/proc/config.gz",
     "/proc/sys/kernel/random/boot_id", "/proc/mounts_of_host", "/sys/kernel/uevent_seqnum", "/dev/kvm", "/dev/mem", "/dev/vda"],
)  # fmt: skip
def test_host_files_are_not_readable(target: Target, path: str) -> None:
    target.denied(f"attempt('read', lambda: open({path!r}, 'rb').read(100))")


def test_the_canary_file_and_the_repository_are_not_readable(target: Target) -> None:
    code = """
attempt("canary", lambda: open(FILE).read())
attempt("canary directory", lambda: os.listdir(DIRECTORY))
attempt("repository", lambda: open(REPOSITORY + "/pyproject.toml").read())
attempt("parent", lambda: open("../" * 20 + FILE[1:]).read())
attempt("proc root", lambda: open("/proc/1/root" + FILE).read())
attempt("proc cwd", lambda: open("/proc/self/cwd/../../.." + FILE).read())
attempt("service root", lambda: open(f"/proc/{SERVICE_PID}/root" + FILE).read())
"""
    target.denied(code)


def test_only_the_runs_own_processes_are_visible(target: Target) -> None:
    code = """
try:
    pids = [name for name in os.listdir("/proc") if name.isdecimal()]
except OSError as error:
    pids = []
    print("denied", error)
print("PIDS", pids, "denied")
attempt("host process", lambda: open(f"/proc/{CANARY_PID}/cmdline").read())
attempt("service process", lambda: open(f"/proc/{SERVICE_PID}/maps").read())
"""
    output = target.denied(code)
    assert "PIDS ['1']" in output if target.has_namespaces else "PIDS []" in output


@pytest.mark.parametrize(
    "attack",
    [
        "socket.create_connection(('127.0.0.1', PORT), 1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
        "socket.socket(socket.AF_INET6, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_UNIX).connect(SOCKET)",
        "socket.socket(socket.AF_UNIX).connect(chr(0) + ABSTRACT)",
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', SOCKET)",
        "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
        "socket.create_server(('127.0.0.1', 0))",
        "socket.getaddrinfo('example.com', 80)",
        "socket.socketpair()[0].connect(chr(0) + ABSTRACT)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].connect(SOCKET)",
    ],
)
def test_no_socket_reaches_anything(target: Target, attack: str) -> None:
    target.denied(f"attempt('socket', lambda: {attack})")


def test_nothing_outside_the_working_directory_can_be_written(target: Target) -> None:
    code = """
import sysconfig
places = ["/", "/etc", "/usr", "/usr/lib", "/usr/bin", "/lib", "/dev", "/proc", "/root", DIRECTORY, os.path.dirname(sys.executable),
          sys.prefix, sys.base_prefix, sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"]]
for place in places:
    attempt(place, lambda: open(place + "/planted", "w").write("x"))
attempt("canary", lambda: open(FILE, "w").write("x"))
attempt("delete", lambda: os.remove(os.__file__))
attempt("rename", lambda: os.rename(sys.prefix, sys.prefix + ".old"))
attempt("link", lambda: os.link(os.__file__, "stolen.py"))
attempt("chmod", lambda: os.chmod(os.path.dirname(os.__file__), 0o777))
attempt("own binary", lambda: open("/proc/self/exe", "r+b").write(b"x"))
attempt("oom score", lambda: open("/proc/self/oom_score_adj", "wb", 0).write(b"-1000"))
attempt("uid map", lambda: open("/proc/self/uid_map", "wb", 0).write(b"0 0 1"))
"""
    target.denied(code)


def test_devices_cannot_be_made_or_opened(target: Target) -> None:
    code = """
import stat
attempt("mknod", lambda: os.mknod("disk", 0o600 | stat.S_IFBLK, os.makedev(254, 0)))
attempt("null twin", lambda: os.mknod("null", 0o600 | stat.S_IFCHR, os.makedev(1, 1)))
attempt("kvm", lambda: os.open("/dev/kvm", os.O_RDWR))
attempt("tty", lambda: os.open("/dev/tty", os.O_RDWR))
attempt("console", lambda: os.open("/dev/console", os.O_RDWR))
"""
    target.denied(code)


def test_signals_reach_nothing_outside(target: Target) -> None:
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for pid in [CANARY_PID, SERVICE_PID, os.getppid() or CANARY_PID]:
    attempt("kill", lambda: os.kill(pid, 9))
    attempt("stop", lambda: os.kill(pid, signal.SIGSTOP))
for pid in [-1, -CANARY_PID, 1]:
    try:
        os.kill(pid, 15)
    except OSError as error:
        print("denied", error)
attempt("pidfd", lambda: os.pidfd_open(CANARY_PID))
attempt("tgkill", lambda: call(234, CANARY_PID, CANARY_PID, 9))
attempt("tkill", lambda: call(200, CANARY_PID, 9))
"""
    target.denied(code)
    assert target.service.stdout("print('alive')") == "alive\n"


def test_other_processes_cannot_be_traced_limited_or_scheduled(target: Target) -> None:
    code = """
for pid in [CANARY_PID, SERVICE_PID, os.getppid() or SERVICE_PID]:
    attempt("ptrace attach", lambda: call(101, 16, pid, 0, 0))
    attempt("ptrace seize", lambda: call(101, 0x4206, pid, 0, 0))
    attempt("process_vm_readv", lambda: call(310, pid, 0, 0, 0, 0, 0))
    attempt("memory", lambda: open(f"/proc/{pid}/mem", "rb"))
    import resource
    attempt("prlimit", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (1, 1)))
    attempt("affinity", lambda: os.sched_setaffinity(pid, {0}))
    attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    attempt("scheduler", lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)))
attempt("ptrace self", lambda: call(101, 0, 0, 0, 0))
"""
    target.denied(code)


def test_mounts_namespaces_and_roots_cannot_be_changed(target: Target) -> None:
    code = """
flags = {"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x8000000, "uts": 0x4000000}
for name, flag in flags.items():
    attempt("unshare " + name, lambda: call(272, flag))
    attempt("clone " + name, lambda: call(56, flag | 17, 0, 0, 0, 0))
attempt("mount", lambda: call(165, b"none", b"/tmp", b"tmpfs", 0, 0))
attempt("remount", lambda: call(165, b"none", b"/usr/lib", 0, 0x1020, 0))
attempt("bind", lambda: call(165, b"/usr", b"/tmp", 0, 0x1000, 0))
attempt("umount proc", lambda: call(166, b"/proc", 2))
attempt("umount work", lambda: call(166, b"/work", 2))
attempt("pivot_root", lambda: call(155, b"/work", b"/work"))
attempt("chroot", lambda: os.chroot("."))
attempt("fsopen", lambda: call(430, b"proc", 0))
attempt("open_tree", lambda: call(428, -100, b"/", 1))
attempt("mount_setattr", lambda: call(442, -100, b"/", 0, b"\\0" * 32, 32))
attempt("setns", lambda: call(308, 0, 0))
attempt("hostname", lambda: socket.sethostname("owned"))
"""
    target.denied(code)


def test_kernel_attack_surface_is_closed(target: Target) -> None:
    code = """
numbers = {"bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "keyctl": 250,
  "add_key": 248, "request_key": 249, "open_by_handle_at": 304, "name_to_handle_at": 303, "init_module": 175,
  "finit_module": 313, "kexec_load": 246, "reboot": 169, "swapon": 167, "acct": 163, "settimeofday": 164, "personality": 135,
  "modify_ldt": 154, "iopl": 172, "quotactl": 179, "fanotify_init": 300, "kcmp": 312, "pidfd_getfd": 438, "clone3": 435,
  "process_madvise": 440, "io_setup": 206, "syslog": 103, "move_pages": 279, "seccomp": 317, "landlock_future": 463,
  "far future": 600, "x32 getpid": 0x40000000 + 39}
for name, number in numbers.items():
    attempt(name, lambda: call(number, 0, 0, 0, 0, 0, 0))
"""
    output = target.denied(code)
    assert output.count("denied") == 33


def test_the_32_bit_system_call_door_kills(target: Target) -> None:
    code = """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print("REACHED", ctypes.CFUNCTYPE(ctypes.c_int)(address)())
"""
    response = target.attack(code)
    assert response["run_result"]["return_code"] == -31  # SIGSYS


def test_privileges_cannot_be_gained(target: Target) -> None:
    code = """
for name in ["setuid", "setgid", "seteuid", "setegid"]:
    attempt(name, lambda: getattr(os, name)(0))
attempt("setresuid", lambda: os.setresuid(0, 0, 0))
attempt("setgroups", lambda: os.setgroups([0]))
attempt("nice", lambda: os.nice(-10))
attempt("capset", lambda: call(126, struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[0xFFFFFFFF] * 6)))
try:
    done = subprocess.run(["/usr/bin/su", "-c", "id -u"], input=b"", capture_output=True)
    print("REACHED su" if done.returncode == 0 else "denied su", done)
except OSError as error:
    print("denied su", error)
import resource
for limit in ["RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE"]:
    attempt(limit, lambda: resource.setrlimit(getattr(resource, limit), (resource.RLIM_INFINITY,) * 2))
print("UID", os.getuid() != 0 and os.geteuid() != 0)
"""
    assert "UID True" in target.denied(code)


def test_a_fork_bomb_is_bounded_and_leaves_nothing(target: Target) -> None:
    before = target.processes()
    code = """
forks = 0
try:
    for _ in range(500):
        if os.fork() == 0:
            time.sleep(30)
        forks += 1
except OSError as error:
    print("denied", error, "forks", forks)
sys.stdout.flush()
time.sleep(30 if forks else 0)
"""
    response = target.attack(code, run_timeout=1, until="forks " if target.has_namespaces else "denied")
    result = response["run_result"]
    assert result["status"] == ("TimeLimitExceeded" if target.has_namespaces else "Finished")
    forks = int(result["stdout"].split("forks ")[1].split()[0])
    assert forks <= (32 if target.has_namespaces else 0)
    assert target.wait_for_processes(before) == set()


def test_an_exponential_fork_bomb_ends_on_time(target: Target) -> None:
    before = target.processes()
    bomb = target.attack("while True:\n    try:\n        os.fork()\n    except OSError:\n        pass", run_timeout=1)
    assert bomb["run_result"]["status"] == "TimeLimitExceeded"
    assert bomb["run_result"]["execution_time"] < bomb["run_timeout"] + ON_TIME_S
    assert target.wait_for_processes(before) == set()
    assert target.service.stdout("print('alive')") == "alive\n"


def test_a_memory_bomb_in_one_process_is_a_memory_error(target: Target) -> None:
    code = """
blocks = []
try:
    while True:
        blocks.append(bytearray(8 << 20))
except MemoryError:
    size = len(blocks) * 8
    blocks.clear()
    print("denied after", size, "MiB")
"""
    result = target.attack(code)["run_result"]
    if result["reason"] == "memory":  # behind a launcher the watchdog may come before the address space ends
        assert target.tier in ("bubblewrap", "nsjail")
        return
    assert int(result["stdout"].split("denied after ")[1].split()[0]) <= MEMORY_MB


def test_a_memory_bomb_over_many_processes_is_killed_as_one(target: Target) -> None:
    code = """
for _ in range(30):
    try:
        if os.fork() == 0:
            hoard = bytearray(os.urandom(1 << 20) * 40)
            time.sleep(30)
    except OSError as error:
        print("denied", error, flush=True)
        sys.exit()
time.sleep(30)
"""
    response = target.attack(code)
    if target.has_namespaces:
        assert response["run_result"]["reason"] == "memory"
        assert f"{MEMORY_MB} MiB" in response["message"]
    else:
        assert "denied" in response["run_result"]["stdout"]


def test_memory_files_and_system_v_objects_do_not_exist(target: Target) -> None:
    code = """
attempt("memfd", lambda: os.memfd_create("x"))
attempt("memfd_secret", lambda: call(447, 0))
attempt("shmget", lambda: call(29, 0, 1 << 20, 0o1600))
attempt("semget", lambda: call(64, 0, 1, 0o1600))
attempt("msgget", lambda: call(68, 0, 0o1600))
attempt("mq_open", lambda: call(240, b"queue", 0o102, 0o600, 0))
"""
    assert target.denied(code).count("denied") == 6


def test_writing_is_bounded_by_the_runs_own_tmpfs(target: Target) -> None:
    code = """
total = 0
for place in ["/work", "/tmp", "/dev/shm"]:
    for index in range(20):
        try:
            with open(f"{place}/fill{index}", "wb") as file:
                for _ in range(15):
                    file.write(b"x" * (1 << 20)); file.flush(); total += 1
        except OSError as error:
            print("denied", error)
            break
print("TOTAL", total)
try:
    with open("/tmp/big", "wb") as file:
        file.truncate(1 << 30)
    print("REACHED a sparse gigabyte")
except OSError as error:
    print("denied", error)
"""
    total = int(target.denied(code).split("TOTAL ")[1].split()[0])
    assert 40 <= total <= 64 if target.has_namespaces else total == 0


def test_an_inode_bomb_is_bounded(target: Target) -> None:
    code = """
made = 0
try:
    for index in range(20000):
        os.close(os.open(f"/tmp/{index}", os.O_CREAT | os.O_WRONLY)); made += 1
except OSError as error:
    print("denied", error)
print("MADE", made)
"""
    made = int(target.denied(code).split("MADE ")[1].split()[0])
    assert 3000 < made <= 4096 if target.has_namespaces else made == 0


def test_pipes_cannot_hoard_kernel_memory(target: Target) -> None:
    code = """
pipes = []
try:
    while True:
        r, w = os.pipe(); pipes.append(w); os.set_blocking(w, False)
        import fcntl
        try: fcntl.fcntl(w, 1031, 1 << 20)
        except OSError: pass
        try: os.write(w, b"x" * (1 << 20))
        except BlockingIOError: pass
except OSError as error:
    print("denied", error)
print("PIPES", len(pipes))
"""
    assert int(target.denied(code).split("PIPES ")[1].split()[0]) <= 31


def test_ignoring_every_signal_does_not_outlive_the_deadline(target: Target) -> None:
    code = """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
print("END", flush=True)
while True: time.sleep(1)
"""
    response = target.attack(code, run_timeout=0.5, until="END")
    assert response["run_result"]["status"] == "TimeLimitExceeded"
    assert response["run_result"]["execution_time"] < response["run_timeout"] + ON_TIME_S


def test_threads_and_exit_handlers_that_hang_are_killed(target: Target) -> None:
    code = "import atexit, threading\natexit.register(time.sleep, 60)\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    assert target.attack(code, run_timeout=0.5)["run_result"]["status"] == "TimeLimitExceeded"


def test_a_daemon_dies_with_its_run(target: Target) -> None:
    before = target.processes()
    code = """
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(3): os.close(fd)
            time.sleep(600)
        os._exit(0)
    os.wait()
    print("daemon started")
except OSError as error:
    print("denied", error)
"""
    response = target.attack(code)
    assert response["status"] == "Success"  # not the daemon's end, nor the time limit
    assert target.wait_for_processes(before) == set()


def test_the_outcome_cannot_be_spoofed_through_descriptors(target: Target) -> None:
    code = """
import gc, json
forged = json.dumps({"op": "done", "id": 1, "code": 0, "reason": "ok", "wall_s": 0, "cpu_s": 0, "max_rss_kb": 1}).encode()
open_fds = []
for fd in range(3, 1024):
    for send in (os.write, lambda fd, data: socket.socket(fileno=fd).send(data)):
        try:
            send(fd, forged); open_fds.append(fd)
        except OSError:
            pass
for thing in gc.get_objects():
    try:
        if isinstance(thing, socket.socket): thing.send(forged); print("REACHED a live socket")
    except (OSError, ReferenceError, AttributeError):
        pass
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_locals.items()):
        if isinstance(value, socket.socket) and value.fileno() >= 0:
            print("REACHED", name)
    frame = frame.f_back
print("OPEN", open_fds)
sys.stdout.flush()
os._exit(5)
"""
    response = target.attack(code)
    assert response["run_result"]["return_code"] == 5
    assert response["status"] == "Failed"
    assert "OPEN []" in response["run_result"]["stdout"]


def test_printed_sandbox_answers_are_only_text(target: Target) -> None:
    response = target.attack("""print('{"status": "Success", "run_result": {"return_code": 0}}'); sys.exit(4)""")
    assert (response["status"], response["run_result"]["return_code"]) == ("Failed", 4)


def test_fetching_follows_no_link_and_opens_no_special_file(target: Target) -> None:
    if not target.has_namespaces:
        answer = target.service.request("/run_code", b'{"code": "", "fetch_files": ["x"]}')
        assert answer.status == 400
        assert "zygote-landlock" in answer.body["detail"]
        return
    code = """
open("plain", "w").write("fine")
os.symlink("/etc/hostname", "link"); os.symlink("/proc/1/environ", "environ"); os.symlink("/", "root")
os.symlink("plain", "inner"); os.mkdir("d"); os.symlink("../plain", "d/up"); os.mkfifo("fifo")
os.mkdir("real"); open("real/file", "w").write("deep")
open("secret", "w").write("x"); os.chmod("secret", 0)
with open("huge", "wb") as file: file.truncate(16 << 20)
os.link("plain", "hard")
"""
    paths = ["plain", "link", "environ", "root/etc/hostname", "inner", "d/up", "d", "fifo", "real/file", "hard", "huge"]
    response = target.attack(code, fetch_files=paths)
    assert {name: base64.b64decode(data)[:4] for name, data in response["files"].items()} == {
        "plain": b"fine", "real/file": b"deep", "hard": b"fine", "huge": b"\0\0\0\0",
    }  # fmt: skip
    assert set(response["file_errors"]) == {"link", "environ", "root/etc/hostname", "inner", "d/up", "d", "fifo"}


def test_nothing_of_one_run_is_left_for_the_next(target: Target) -> None:
    target.attack(
        """
import builtins, json, random
builtins.leak = 1; json.leak = 1; os.environ["LEAK"] = "1"; sys.path.append("/leak"); sys.modules["leak"] = sys
builtins.print("x"); random.seed(1); os.umask(0o777); sys.setrecursionlimit(50_000)
for place in ["/work", "/tmp", "/dev/shm"]:
    try: open(place + "/leak", "w").write("leak")
    except OSError: pass
"""
    )
    code = """
import builtins, json
print(hasattr(builtins, "leak"), hasattr(json, "leak"), "LEAK" in os.environ, "/leak" in sys.path, "leak" in sys.modules,
      [place for place in ["/work/leak", "/tmp/leak", "/dev/shm/leak"] if os.path.exists(place)], sys.getrecursionlimit())
"""
    assert target.attack(code)["run_result"]["stdout"] == "False False False False False [] 1000\nEND\n"


def test_two_runs_at_once_do_not_see_each_other(target: Target) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        other = pool.submit(target.attack, "open('/tmp/mine', 'w').write('x') if os.access('/tmp', 2) else None\ntime.sleep(0.6)")
        time.sleep(0.2)
        output = target.attack("print(os.path.exists('/tmp/mine'))")["run_result"]["stdout"]
        other.result()
    assert output == "False\nEND\n"


def test_randomness_differs_between_runs(target: Target) -> None:
    code = "import random, uuid; print(random.random(), uuid.uuid4(), os.urandom(8))"
    assert len({target.attack(code)["run_result"]["stdout"] for _ in range(3)}) == 3


def test_a_run_has_no_privilege_by_the_kernels_own_account(target: Target) -> None:
    if not target.has_namespaces:
        pytest.skip("/proc is closed in this tier")
    status = dict(
        line.split(":\t", 1)
        for line in target.attack("print(open('/proc/self/status').read())")["run_result"]["stdout"].splitlines()
        if ":\t" in line
    )
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Pid"], status["Groups"].strip()) == ("1", "2", "1", "")
    assert "0" not in status["Uid"].split()
    assert "0" not in status["Gid"].split()


def _post(target: Target, path: str, **fields: Any) -> dict[str, Any]:
    answer = target.service.request(path, json.dumps(fields).encode())
    assert answer.status == 200, answer
    return answer.body


def _cell(target: Target, session: str, code: str) -> str:
    """A cell's output, with the canaries looked at afterwards as after a run."""
    response = _post(target, f"/sessions/{session}/run", code=code)
    target.check_damage(response)
    return response["run_result"]["stdout"]


def test_sessions_do_not_reach_each_other_or_the_host(target: Target) -> None:
    one, two = (_post(target, "/sessions")["session_id"] for _ in range(2))
    _cell(target, one, "secret = 'of one'\nimport builtins, os\nbuiltins.leak = 1\nos.environ['LEAK'] = '1'")
    code = f"""
import builtins, os
try:
    pids = [name for name in os.listdir("/proc") if name.isdecimal()]
except OSError:
    pids = []
print(len(pids))
print("secret" in globals(), hasattr(builtins, "leak"), "LEAK" in os.environ)
try:
    print("REACHED", open({str(target.directory / "secret.txt")!r}).read())
except OSError as error:
    print("denied", error)
"""
    lines = _cell(target, two, code).splitlines()
    assert int(lines[0]) <= 1
    assert lines[1] == "False False False"
    assert lines[2].startswith("denied")


def test_a_session_cannot_answer_for_another(target: Target) -> None:
    one, two = (_post(target, "/sessions")["session_id"] for _ in range(2))
    code = """
import json, os, socket
for fd in range(3, 64):
    for n in range(1, 9):
        for message in ({"n": n, "code": 0}, {"op": "done", "id": n, "code": 0, "reason": "ok", "wall_s": 0, "cpu_s": 0}):
            try:
                socket.socket(fileno=os.dup(fd)).send(json.dumps(message).encode())
            except OSError:
                pass
raise SystemExit(7)
"""
    target.service.request(f"/sessions/{one}/run", json.dumps({"code": code}).encode())
    assert _cell(target, two, "print(6 * 7)") == "42\n"
    assert target.service.stdout("print('fine')") == "fine\n"


def test_a_session_that_will_not_stop_is_killed_with_everything_in_it(target: Target) -> None:
    before = target.processes()
    session = _post(target, "/sessions")["session_id"]
    code = """
import os, signal, time
signal.signal(2, signal.SIG_IGN)
try:
    if os.fork() == 0:
        os.setsid()
except OSError:
    pass
while True:
    time.sleep(1)
"""
    for timeout in (0.3, 3, AMPLE_S):  # interrupted before it ignores that, the cell ends, and not its session
        answer = _post(target, f"/sessions/{session}/run", code=code, timeout=timeout)
        if not answer["session_alive"]:
            break
    assert answer["session_alive"] is False
    assert target.wait_for_processes(before) == set()


def test_a_notebook_reaches_nothing_either(target: Target) -> None:
    secret = str(target.directory / "secret.txt")
    cells = [
        f"open({secret!r}).read()",
        "import socket\nsocket.socket()",
        f"import os\nos.kill({target.process.pid}, 9)",
        "dict(os.environ)",
    ]
    body = _post(target, "/run_jupyter", cells=cells)
    assert [len(cell["error"]) for cell in body["cells"]] == [1, 1, 1, 0]
    assert target.service.secret not in json.dumps(body)
    assert target.secret not in json.dumps(body)
    assert target.process.poll() is None


def test_sub_interpreters_are_in_the_same_jail(target: Target) -> None:
    code = """
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
inner = interpreters.create()
program = '''
import os
for attack in (lambda: open(FILE).read(), lambda: os.kill(PID, 9), lambda: os.listdir(DIRECTORY)):
    try:
        print("REACHED", attack(), flush=True)
    except OSError as error:
        print("denied", error, flush=True)
'''
interpreters.run_string(inner, f"FILE, PID, DIRECTORY = {FILE!r}, {CANARY_PID}, {DIRECTORY!r}" + program)
"""
    lines = target.denied(code).splitlines()
    assert sum(line.startswith("denied") for line in lines) == 3


def test_damage_to_the_interpreter_stays_in_its_run(target: Target) -> None:
    code = """
import types
for name, module in list(sys.modules.items()):
    if isinstance(module, types.ModuleType) and name not in ("sys", "builtins", "__main__", "posix", "types"):
        for attribute in list(vars(module)):
            try:
                delattr(module, attribute)
            except Exception:
                pass
ctypes = __import__("_ctypes")
__import__("posix")._exit(3)
"""
    response = target.attack(code)
    assert response["run_result"]["return_code"] == 3
    assert target.service.stdout("import json, os; print(json.dumps([1]), os.getpid() > 0)") == "[1] True\n"


def test_slow_binary_and_endless_lines_are_bounded(target: Target) -> None:
    slow = target.attack("while True: os.write(1, b'\\xff\\x00'); time.sleep(0.01)", run_timeout=0.6, until="\0")
    assert slow["run_result"]["status"] == "TimeLimitExceeded"
    assert slow["run_result"]["stdout"].startswith("\ufffd\0")
    wide = target.attack("os.write(2, b'\\x80' * 900_000)")
    assert wide["run_result"]["truncated"] is True
    assert len(wide["run_result"]["stderr"]) < 70_000


def test_names_from_outside_cannot_leave_the_working_directory(target: Target) -> None:
    for name in ("../x", "/etc/x", "a/../../x", "/work/../x", "x\0y", ".", "a" * 2000):
        for fields in ({"files": {name: ""}}, {"fetch_files": [name]}):
            answer = target.service.request("/run_code", json.dumps({"code": "pass", **fields}).encode())
            assert answer.status == 400, (name, answer)


def test_exhausted_descriptors_and_recursion_end_only_the_run(target: Target) -> None:
    code = """
fds = []
try:
    while True:
        fds.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error:
    for fd in fds:
        os.close(fd)
    print("denied FDS", len(fds), error, flush=True)
sys.setrecursionlimit(10**9)
def deep(n):
    return deep(n + 1) + 1
deep(0)
"""
    result = target.attack(code, run_timeout=5, until="FDS ")["run_result"]
    assert int(result["stdout"].split("FDS ")[1].split()[0]) <= 64
    assert result["status"] == "TimeLimitExceeded" or result["return_code"] != 0
    assert target.service.stdout("print('alive')") == "alive\n"


def test_a_program_beside_python_is_in_the_same_jail(target: Target) -> None:
    port = target.sockets["tcp"].getsockname()[1]
    code = (
        f"cat {target.directory}/secret.txt /etc/passwd\nid -u\nkill -9 {target.process.pid}\nexec 3<>/dev/tcp/127.0.0.1/{port}"
    )
    answer = target.service.request("/run_code", json.dumps({"code": code, "language": "bash"}).encode())
    if not target.has_namespaces:
        assert answer.status == 400
        return
    target.check_damage(answer.body)
    assert answer.body["run_result"]["stdout"].strip() not in ("", "0")
    assert "root:" not in answer.body["run_result"]["stdout"]
